"""The run directory: which one, who writes in it, and its first files: recipe, environment, picture of the views."""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from fastssl.common.distributed import world_size
from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.common.system import cpu_name, total_memory
from fastssl.models.checkpoint import LAST, Checkpoint, find_checkpoints
from fastssl.recipe import Recipe
from fastssl.views.operations import unnormalize

IMAGES_SHOWN = 16  # in views.png
LOCK = ".lock"


class RunDirBusy(UserError):
    """Another process trains there."""


def choose_run_dir(recipe: Recipe, resume: Path | Literal["auto"] | None, restarted: bool) -> tuple[Path, bool]:
    """The run directory, and whether a checkpoint in it is to go on.

    resume: a directory whose run goes on; "auto": the one in run.dir (or runs/NAME), where there is one. None: a new
    run, in run.dir, refused if a run is in it, else in runs/NAME or NAME-2 and so on. But where torchrun has restarted
    the processes because one died, None means the run that they had begun.
    """
    free, newest = _numbered_dirs(recipe.name)
    named = recipe.run.dir and Path(recipe.run.dir)
    if resume == "auto":
        path = named or Path("runs") / recipe.name
        return path, bool(find_checkpoints(path))
    if resume is not None:
        if not find_checkpoints(resume) and not (resume / "recipe.yaml").exists():
            raise UserError(f"{resume} holds no run: name a run directory of fastssl train.")
        return resume, bool(find_checkpoints(resume))  # without one it was killed before its first: from the beginning
    if restarted and _launcher_of(named or newest) == _launcher():
        return named or newest, bool(find_checkpoints(named or newest))
    if named and (named / "recipe.yaml").exists():
        raise UserError(f"{named} already holds a run: continue it with --resume {named}, or set another run.dir.")
    return named or free, False


def _launcher() -> str:
    """Tells torchrun's agent apart, which stays while it restarts its processes."""
    return f"{platform.node()} {os.getppid()}"


def _launcher_of(run_dir: Path) -> str | None:
    try:
        return (run_dir / LOCK).read_text()
    except OSError:
        return None


def set_damaged_aside(checkpoint: Checkpoint) -> None:
    """Where a run goes on from the checkpoint before a damaged one: the next save must not make that the previous."""
    if checkpoint.warning:
        last = checkpoint.path.with_name(LAST)
        last.replace(last.with_name("damaged.pt"))


def _numbered_dirs(name: str) -> tuple[Path, Path]:
    """Of runs/NAME, runs/NAME-2 and so on the first that is free, and the one before it."""
    newest = free = Path("runs") / name
    number = 1
    while free.exists():
        newest, number = free, number + 1
        free = Path("runs") / f"{name}-{number}"
    return free, newest


@contextmanager
def opened_run_dir(path: Path) -> Iterator[None]:
    """Make the directory where needed, and keep other processes from training in it meanwhile."""
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(path / LOCK, "ab", buffering=0)
    except OSError as error:
        raise UserError(f"The run directory {path} cannot be made ({error.strerror}): set another run.dir.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
        except BlockingIOError:
            raise RunDirBusy(f"Another process is training in {path}: wait for it, or set another run.dir.") from None
        except OSError:
            pass  # some network file systems know no locks
        try:
            lock.truncate(0)
            lock.write(_launcher().encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): free some space, or set run.dir.") from None
        for folder in (path, path / "checkpoints"):
            for abandoned in folder.glob(".*.part*"):  # of a process that was killed while it wrote
                abandoned.unlink()
        yield


def describe_run(run_dir: Path, recipe: Recipe, device: torch.device, step: int) -> None:
    """Write recipe.yaml (resolved) and environment.json: this start of the run, and under "earlier" those before it."""
    write_atomically(run_dir / "recipe.yaml", lambda path: path.write_text(recipe.to_yaml()))
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        **describe_machine(device),
        "earlier": _earlier_starts(run_dir / "environment.json"),
    }
    text = json.dumps(environment, indent=2) + "\n"
    write_atomically(run_dir / "environment.json", lambda path: path.write_text(text))


def describe_machine(device: torch.device) -> dict:
    """Command, versions and machine of this process."""
    packages = ("fastssl-trainer", "torch", "torchvision", "timm", "ffcv", "numba", "numpy", "torch-optimizer")
    return {
        "command": sys.argv,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "machine": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(total_memory() / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _earlier_starts(path: Path) -> list[dict]:
    try:
        last = json.loads(path.read_text())
        return [*last.pop("earlier", []), last]
    except (OSError, ValueError, AttributeError):  # there is none, or not one of ours
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """The commit of the checkout that fastssl runs from, with -dirty where files changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_view_sheet(run_dir: Path, views: tuple[torch.Tensor, ...], recipe: Recipe) -> None:
    """views.png: augmented views, an image's two side by side, as the encoder sees them."""
    images = min(IMAGES_SHOWN, len(views[0]))
    columns = 4
    rows = -(-images // columns)
    size = views[0].shape[-1]  # views.progressive_resize may start below views.size
    gap = max(2, size // 16)
    width = len(views) * size + 2 * gap
    sheet = np.full((rows * (size + gap) + gap, columns * width + gap, 3), 255, np.uint8)
    for i in range(images):
        for view, v in enumerate(views):
            pixels = unnormalize(v[i : i + 1], recipe.views)[0].permute(1, 2, 0)
            y = gap + (i // columns) * (size + gap)
            x = gap + (i % columns) * width + view * size
            sheet[y : y + size, x : x + size] = (pixels * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(sheet)
    if size < 100:  # small views are enlarged, so that a person sees something
        factor = 128 // size
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    write_atomically(run_dir / "views.png", lambda path: picture.save(path))
