#!/usr/bin/env bash
# Installs with apt what pip cannot install, and only what is missing.
#
#   scripts/system_packages.sh run      what the environment needs
#   scripts/system_packages.sh build    what building the FFCV wheel needs as well
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

purpose=${1:?run or build}
python=${PYTHON:-python3}
require_linux_and_python "$python"
python_package=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')

missing=()
needs() { missing+=("$1"); }

# Debian packages venv and the C headers separately from its Python; every other Python has them.
"$python" -c 'import venv, ensurepip' 2>/dev/null || needs "$python_package-venv"
# numba's OpenMP threading layer; torch brings an OpenMP of its own under another name.
"$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || needs libgomp1

if [[ $purpose == build ]]; then
    command -v g++ >/dev/null || needs g++
    command -v pkg-config >/dev/null || needs pkg-config
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        needs "$python_package-dev"
    pkg-config --exists libturbojpeg 2>/dev/null || needs libturbojpeg0-dev
    # Two of OpenCV's modules (20 MB) are enough: build_ffcv_wheel.sh writes the opencv4.pc that
    # comes only with all of them (690 MB).
    if ! pkg-config --exists opencv4 2>/dev/null; then
        for module in core imgproc; do
            [[ -e /usr/include/opencv4/opencv2/$module.hpp ]] || needs "libopencv-$module-dev"
        done
    fi
fi

[[ ${#missing[@]} -gt 0 ]] || exit 0

command -v apt-get >/dev/null ||
    die "apt-get was not found; install the contents of these Debian packages with your own package manager, then run the same command again: ${missing[*]}"
if [[ $(id -u) == 0 ]]; then
    as_root=()
elif command -v sudo >/dev/null; then
    as_root=(sudo)
else
    die "not root and no sudo; ask an administrator to run: apt-get install --no-install-recommends ${missing[*]}"
fi

say "installing with apt: ${missing[*]}"
"${as_root[@]}" apt-get update -qq || die "'apt-get update' failed; see its output above."
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
    die "apt could not install ${missing[*]}; see its output above."
