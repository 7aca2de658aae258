# Sourced by the other scripts: messages, and the versions that they share.

export PIP_DISABLE_PIP_VERSION_CHECK=1  # its notices would hide the lines that matter

FFCV_VERSION=1.0.2
PIP_VERSION=26.3  # resolves for another Python, and goes into the offline bundle

say() { printf 'fastssl: %s\n' "$*"; }
die() { printf 'fastssl: %s\n' "$*" >&2; exit 1; }

# Ends with one message on an unsupported machine or Python.
require_linux_and_python() {
    local python=$1
    [[ $(uname -sm) == "Linux x86_64" ]] ||
        die "runs on Linux x86-64 only, and this is $(uname -sm)."
    command -v "$python" >/dev/null ||
        die "'$python' was not found; install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "needs Python 3.11 or newer, and '$python' is $("$python" -V 2>&1); name another: make setup PYTHON=/path/to/python3.12"
}

# The folder of the FFCV wheel for this C library; one wheel serves every Python.
wheel_folder() { echo ".cache/wheels/$(getconf GNU_LIBC_VERSION | tr -d ' ')"; }

# The wheel itself; nothing if it has not been built yet.
ffcv_wheel() { compgen -G "$(wheel_folder)/ffcv-$FFCV_VERSION-*-abi3-*.whl" || true; }
