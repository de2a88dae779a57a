#!/usr/bin/env bash
# usage: scripts/install.sh run|dev      Installs system packages (Debian, where missing) and a virtual environment.
# VENV            the environment's folder (default .venv)
# PYTHON          the interpreter to build it with (default: the first of python3.11, python3.12, python3 that fits)
# FASTSSL_BUILD   cpu or gpu (default: gpu where nvidia-smi finds a GPU)
# TORCH_INDEX_URL a wheel index to take torch and torchvision from, such as PyTorch's own for CPU builds
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-run}
venv=${VENV:-.venv}
build=${FASTSSL_BUILD:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)}
say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 2; }

requirements=(-r "requirements/$build.txt")
[ "$kind" = dev ] && requirements+=(-r requirements/dev.txt)
stamp=$(cat requirements/{common,cpu,gpu,dev}.txt setup.py scripts/install*.sh pipelines/engines/*.c | sha256sum | cut -c1-16)-$build
# An environment with the developers' tools also serves to run.
for have in dev "$kind"; do
    [ "$(cat "$venv/.fastssl-$have" 2>/dev/null)" = "$stamp" ] && exit 0
done
SECONDS=0

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

system_packages() {
    local missing=() package
    for package in g++ pkg-config libjpeg-dev libopencv-imgproc-dev libturbojpeg0-dev numactl python3-venv python3-dev; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "install the equivalents of these Debian packages first: ${missing[*]}"
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "run once as root: apt-get install --no-install-recommends ${missing[*]}"
        sudo=(sudo)
    fi
    say "system packages: ${missing[*]}"
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

command -v dpkg-query >/dev/null && system_packages
python=$(find_python)
[ -n "$python" ] || die "no Python 3.11 or 3.12 found: install one, or name it with PYTHON="
say "$build build in $venv with $python"
[ -x "$venv/bin/pip" ] || "$python" -m venv --clear "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    grep -hE '^(torch|torchvision)==' "requirements/$build.txt" >"$venv/torch.txt"
    "$venv/bin/pip" install -q --index-url "$TORCH_INDEX_URL" -r "$venv/torch.txt"
fi
"$venv/bin/pip" install -q "setuptools>=77.0.3,<82" wheel
"$venv/bin/pip" install -q "${requirements[@]}"
scripts/install_ffcv.sh "$venv/bin/pip"
"$venv/bin/pip" install -q --no-deps --no-build-isolation -e .
"$venv/bin/python" -c 'import deepspeed, ffcv.loader; import fastssl.models.backbones, timm' >/dev/null 2>"$venv/import.log" ||
    { cat "$venv/import.log" >&2; die "the packages are installed but do not import"; }
echo "$stamp" >"$venv/.fastssl-$kind"
say "done in ${SECONDS} s"
