#!/usr/bin/env bash
# usage: scripts/install_ffcv.sh [PIP]      Compile FFCV and install it with this pip (default: the first on PATH).
set -euo pipefail
pip=${1:-pip}
# FFCV's build asks pkg-config for all of OpenCV (689 MB of packages); it uses core and imgproc.
shim=$(mktemp -d)
trap 'rm -rf "$shim"' EXIT
mkdir -p "$shim/opencv2"
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/opencv2/opencv.hpp"
cat >"$shim/opencv4.pc" <<END
Name: OpenCV
Description: core and imgproc
Version: 4
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I$shim -I/usr/include/opencv4
END
# --no-deps: its metadata asks for opencv-python, which clashes with the headless build.
PKG_CONFIG_PATH=$shim "$pip" install -q --no-deps --no-build-isolation --no-cache-dir ffcv==1.0.2
