# fastssl on a base image whose own torch, DALI and apex stay as they are; docs/docker.md has the commands.
# A base without torch, such as a plain Debian 12, gets requirements/cpu.txt.
ARG BASE=nvcr.io/nvidia/pytorch:26.02-py3

# Compilers and headers stay in this stage.
FROM ${BASE} AS build
ARG DEBIAN_FRONTEND=noninteractive
# Debian's archive keeps only the newest build of a package: a pinned version would soon stop to install.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ libjpeg-dev libopencv-imgproc-dev libturbojpeg0-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Where torch and torchvision come from if the base has none; empty: where pip is pointed at.
ARG TORCH_INDEX_URL=
WORKDIR /build
COPY requirements requirements/
COPY docker docker/
COPY scripts/install_ffcv.sh scripts/
COPY setup.py pyproject.toml ./
COPY pipelines/engines/jpeg_check.c pipelines/engines/jpeg_region.c pipelines/engines/
RUN docker/install_packages.sh /opt/venv

FROM ${BASE}
ARG DEBIAN_FRONTEND=noninteractive
LABEL org.opencontainers.image.title="fastssl" \
      org.opencontainers.image.description="Pre-training of image encoders without labels" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
# What FFCV was linked with, under the names that this base's distribution gives it. No compiler is added: numba brings
# LLVM, DeepSpeed compiles nothing on the CPU, and a base for GPUs has the compilers that Triton calls.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        numactl $(cat /opt/venv/system-packages.txt) $(command -v python3 >/dev/null || echo python3) \
    && rm -rf /var/lib/apt/lists/*

# Any user may run the image (--user): the home is open to all, and USER names those whom /etc/passwd does not know.
ENV PATH=/opt/venv/bin:${PATH} HOME=/home/fastssl USER=fastssl
RUN useradd --uid 10001 --create-home --no-log-init fastssl \
    && mkdir -p /data /runs \
    && chmod 1777 "${HOME}" /data /runs
WORKDIR /opt/fastssl
COPY . .
# The relative paths in configs/ lead to the mount points. The check's caches go: other users could not write to them.
RUN chmod -R a+rX . \
    && ln -s /data /runs . \
    && pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && HOME=/tmp/check python docker/base_packages.py check /opt/venv/base-packages.txt \
    && rm -rf /tmp/check
# The C files, compiled. Last: an installation without a compiler leaves them out.
COPY --from=build /build/pipelines/engines/ pipelines/engines/

USER 10001:10001
CMD ["scripts/demo.sh"]
