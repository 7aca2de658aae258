"""What produced a result: command, code, package versions and machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from fastssl.common.distributed import world_size
from fastssl.common.system import cpu_name, total_memory, usable_cores

PACKAGES = ("fastssl-trainer", "torch", "torchvision", "timm", "ffcv", "numba", "numpy", "torch-optimizer")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return what environment.json and profile.json say about this process, ready for JSON."""
    return {
        "command": sys.argv,
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "processes": world_size(),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that fastssl runs from, with -dirty if files have changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
