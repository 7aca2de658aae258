#!/usr/bin/env bash
# Creates .venv with everything that fastssl needs. A second run with nothing changed takes a moment.
#
#   PYTHON=python3.12   the Python to create it with (default: the last choice, else python3)
#   TORCH=system        keep the torch and torchvision that this Python already has;
#   TORCH=pip           install them from PyPI (default: the last choice, else pip)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

# The last choice stays until another one is made: `make demo` after `make setup TORCH=system` must not download
# another torch.
last() { cat ".venv/$1" 2>/dev/null || echo "$2"; }
python=${PYTHON:-$(last fastssl-python python3)}
torch=${TORCH:-$(last fastssl-torch pip)}
[[ $torch == pip || $torch == system ]] || die "TORCH is 'pip' or 'system', not '$torch'."

# The environment is out of date if the checkout has moved or a file that describes it has changed.
stamp=$(printf '%s\n' "$PWD" "$python" "$torch" | cat - pyproject.toml constraints.txt scripts/*.sh scripts/system_torch.py | sha256sum)
if [[ $(last fastssl-stamp none) == "$stamp" ]] && .venv/bin/python -c ''; then
    exit 0
fi

mkdir -p .cache
exec 9>.cache/setup.lock
flock 9  # `make demo` and `make test` in parallel: the second one waits, then finds everything installed
if [[ $(last fastssl-stamp none) == "$stamp" ]]; then
    exit 0
fi

require_linux_and_python "$python"
SECONDS=0
# One request for all missing packages: a user without root gets one message, not two.
purpose=run
[[ -n $(ffcv_wheel) ]] || purpose=build
PYTHON=$python scripts/system_packages.sh "$purpose"
PYTHON=$python scripts/build_ffcv_wheel.sh

# Another Python, another torch or a Python that no longer exists: start over.
if [[ -e .venv ]] && ! { [[ $(last fastssl-python '') == "$python" && $(last fastssl-torch '') == "$torch" ]] &&
    .venv/bin/python -c '' 2>/dev/null; }; then
    say "creating .venv again"
    rm -rf .venv
fi

constraints=constraints.txt
if [[ $torch == system ]]; then
    [[ -e .venv ]] || "$python" -m venv --system-site-packages .venv
    constraints=.venv/fastssl-constraints.txt
    # The dependencies of torch (numpy, NVIDIA's libraries, ...) keep their installed versions.
    "$python" scripts/system_torch.py constraints.txt .venv >"$constraints"
else
    [[ -e .venv ]] || "$python" -m venv .venv
fi
printf '%s\n' "$python" >.venv/fastssl-python
printf '%s\n' "$torch" >.venv/fastssl-torch

say "installing into .venv (the first time with torch from PyPI: a 3 GB download, a few minutes)"
.venv/bin/pip install --constraint "$constraints" --find-links "$(wheel_folder)" \
    --only-binary ffcv --editable '.[demo,parquet,tensorboard,onnx,ood,slurm,docs,dev]'

.venv/bin/python -c 'import ffcv, numba, timm, torch, torchvision' ||
    die "the installed packages cannot be imported; start over with 'make clean' and the same command again."
printf '%s\n' "$stamp" >.venv/fastssl-stamp
say "the environment is ready after $SECONDS s; .venv/bin/fastssl doctor shows its versions"
