#!/usr/bin/env bash
# usage: docker/install_packages.sh VENV      The image's Python packages, in an environment that sees the base's too.
# TORCH_INDEX_URL a wheel index to take torch and torchvision from where the base has none
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    { echo "install_packages: error: the base has $(python3 --version), not Python 3.11 or 3.12" >&2; exit 2; }
# In an environment of our own, pip can neither replace nor delete what the base has.
python3 -m venv --system-site-packages "$venv"
export PATH="$venv/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
base=$venv/base-packages.txt
python docker/base_packages.py list >"$base"
echo "install_packages: the base has $(wc -l <"$base") packages; they stay as they are"
# This also replaces a constraints file of the base: it pins packages that only NVIDIA's own build needed.
export PIP_CONSTRAINT=$base
python docker/base_packages.py missing "$base" requirements/cpu.txt requirements/common.txt >/tmp/missing.txt
cat /tmp/missing.txt
torch=$(grep -E '^(torch|torchvision)==' /tmp/missing.txt || true)
if [ -n "$torch" ] && [ -n "${TORCH_INDEX_URL:-}" ]; then
    # shellcheck disable=SC2086  # one argument for each requirement
    pip install -q --index-url "$TORCH_INDEX_URL" $torch
fi
pip install -q "setuptools>=77.0.3,<82" wheel
pip install -q -r /tmp/missing.txt
scripts/install_ffcv.sh
python setup.py -q build_ext --inplace # pipelines/engines/*.c
# The names of these packages differ between Debian's and Ubuntu's releases.
ldd "$venv"/lib/python3*/site-packages/ffcv/_libffcv*.so pipelines/engines/*.so |
    grep -oE '/[^ ]*(opencv|turbojpeg|libjpeg)[^ ]*' | xargs realpath | xargs dpkg-query -S | cut -d: -f1 | sort -u \
    >"$venv/system-packages.txt"
