#!/usr/bin/env bash
# Collects in dist/offline-cp312 every wheel that a host without network or compiler lacks.
#
#   PY=3.12                      the host's Python
#   HOST_HAS="torch numba"       leave out these and their dependencies; `usual` for what a host with
#                                PyTorch commonly has; or a file: pip list --format=freeze >host.txt
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

py=${PY:-}
[[ $py =~ ^3\.[1-9][0-9]*$ ]] ||
    die "PY is the Python of the host, such as 3.12, and not '$py': make offline-bundle PY=3.12"
[[ ${py#3.} -ge 11 ]] || die "needs Python 3.11 or newer on the host, and PY is $py."

# Packages that PyPI has only as source; a host without network cannot build them.
SOURCE_ONLY=(fastargs assertpy)

python=${PYTHON:-python3}
PYTHON=$python scripts/build_ffcv_wheel.sh

name=offline-cp${py/./}
mkdir -p dist
work=$(mktemp -d "$PWD/dist/.$name.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "collecting for Python $py"
"$python" -m venv "$work/venv"
tools=$work/venv/bin
"$tools/pip" install --quiet --upgrade -c constraints.txt "pip==$PIP_VERSION" packaging setuptools wheel hatchling \
    2>"$work/pip.log" || { tail -n 1 "$work/pip.log" >&2; die "pip could not download the packages; run this on a machine with network, then copy the folder."; }
mkdir "$work/wheels" "$work/bundle"
cp "$(ffcv_wheel)" "$work/wheels/"
"$tools/pip" wheel --quiet --no-deps --no-build-isolation -c constraints.txt -w "$work/wheels" . "${SOURCE_ONLY[@]}" ||
    die "pip could not build the wheels; see its output above."

read -ra host_has <<<"${HOST_HAS:-}"
"$tools/python" scripts/offline_bundle.py "$work/bundle" "$py" "$work/wheels" constraints.txt "${host_has[@]}"

# The finished folder replaces the last one; a call that fails leaves that one unchanged.
[[ ! -e dist/$name ]] || mv "dist/$name" "$work/last"
mv "$work/bundle" "dist/$name"
say "copy dist/$name to the host, and there run: python$py $name/install.py"
