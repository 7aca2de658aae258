#!/usr/bin/env bash
# Makes .venv with everything that fastssl needs. A second run with nothing changed takes a moment.
#
#   PYTHON=python3.12   the Python to make it with (default: the last one named, else python3)
#   TORCH=system        keep the torch and torchvision that this Python already has;
#   TORCH=pip           install them from PyPI (default: the last one named, else pip)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

# What was named last time holds until something else is named: `make setup TORCH=system` and then
# `make demo` must not fetch another torch.
last() { cat ".venv/$1" 2>/dev/null || echo "$2"; }
python=${PYTHON:-$(last fastssl-python python3)}
torch=${TORCH:-$(last fastssl-torch pip)}
[[ $torch == pip || $torch == system ]] || die "TORCH is 'pip' or 'system', not '$torch'."

# An environment is out of date once the checkout moved, or a file that describes it changed.
stamp=$(printf '%s\n' "$PWD" "$python" "$torch" | cat - pyproject.toml constraints.txt scripts/*.sh scripts/*.py | sha256sum)
if [[ $(last fastssl-stamp none) == "$stamp" ]] && .venv/bin/python -c ''; then
    exit 0
fi

mkdir -p .cache
exec 9>.cache/setup.lock
flock 9  # `make demo` and `make test` at once: the second waits, then finds the work done
if [[ $(last fastssl-stamp none) == "$stamp" ]]; then
    exit 0
fi

require_linux_and_python "$python"
SECONDS=0
# All that is missing is asked for at once: whoever has no root hears one sentence, not two.
purpose=run
[[ -n $(ffcv_wheel) ]] || purpose=build
PYTHON=$python scripts/system_packages.sh "$purpose"
PYTHON=$python scripts/build_ffcv_wheel.sh

# Another Python, another torch or a Python that is gone: start over.
if [[ -e .venv ]] && ! { [[ $(last fastssl-python '') == "$python" && $(last fastssl-torch '') == "$torch" ]] &&
    .venv/bin/python -c '' 2>/dev/null; }; then
    say "making .venv anew"
    rm -rf .venv
fi

constraints=constraints.txt
if [[ $torch == system ]]; then
    [[ -e .venv ]] || "$python" -m venv --system-site-packages .venv
    constraints=.venv/fastssl-constraints.txt
    # What torch stands on (numpy, NVIDIA's libraries, ...) keeps the version it has here.
    "$python" scripts/system_torch.py constraints.txt .venv >"$constraints"
else
    [[ -e .venv ]] || "$python" -m venv .venv
fi
printf '%s\n' "$python" >.venv/fastssl-python
printf '%s\n' "$torch" >.venv/fastssl-torch

say "installing into .venv (the first time with torch from PyPI: a 3 GB download, a few minutes)"
.venv/bin/pip install --constraint "$constraints" --find-links "$(wheel_folder)" \
    --only-binary ffcv --editable '.[demo,parquet,tensorboard,onnx,ood,slurm,dev]'

.venv/bin/python -c 'import ffcv, numba, timm, torch, torchvision' ||
    die "the installed packages do not import; 'make clean' and then the same command again starts over."
printf '%s\n' "$stamp" >.venv/fastssl-stamp
say "the environment is ready after $SECONDS s; .venv/bin/fastssl doctor shows what it found"
