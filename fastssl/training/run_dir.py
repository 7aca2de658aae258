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

from fastssl.beton.atomic import write_atomically
from fastssl.models.checkpoint import LAST, PREVIOUS, Checkpoint, find_checkpoints, newest_checkpoint
from fastssl.recipe import Recipe, UserError
from fastssl.views.paired import unnormalize

from .distributed import world_size

PAIRS_SHOWN = 16


def choose_run_dir(recipe: Recipe, resume: Path | Literal["auto"] | None, restarted: bool) -> tuple[Path, bool]:
    """The run directory, and whether a run in it goes on.

    resume: a directory whose run goes on; "auto": the one in run.dir (or runs/NAME), where there is one. None: a new
    run, in run.dir, refused if a run is in it, else in runs/NAME or NAME-2 and so on. But where torchrun has restarted
    the processes because one died, None means their own run.
    """
    if resume not in (None, "auto"):
        newest_checkpoint(resume)  # says at once where there is nothing to resume
        return Path(resume), True
    free, newest = _numbered_dirs(recipe.name)
    named = recipe.run.dir and Path(recipe.run.dir)
    if resume == "auto" or restarted:
        path = named or (newest if restarted else Path("runs") / recipe.name)
        return path, bool(find_checkpoints(path))
    if named and (named / "recipe.yaml").exists():
        raise UserError(f"{named} already holds a run: continue it with --resume {named}, or set another run.dir.")
    return named or free, False


def _numbered_dirs(name: str) -> tuple[Path, Path]:
    """Of runs/NAME, runs/NAME-2 and so on the first that is free, and the one before it."""
    newest = free = Path("runs") / name
    number = 1
    while free.exists():
        newest, number = free, number + 1
        free = Path("runs") / f"{name}-{number}"
    return free, newest


@contextmanager
def opened_run_dir(path: Path, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Make the directory where needed, and keep other processes from training in it meanwhile.

    checkpoint: the one that the run goes on from.
    """
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")
    except OSError as error:
        raise UserError(f"The run directory {path} cannot be made ({error.strerror}): set another run.dir.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
        except BlockingIOError:
            raise UserError(f"Another process is training in {path}: wait for it, or set another run.dir.") from None
        except OSError:
            pass  # some network file systems know no locks
        for abandoned in (path / "checkpoints").glob(".*.part*"):  # of a process that was killed while it saved
            abandoned.unlink()
        last = path / "checkpoints" / LAST
        if checkpoint and checkpoint.path.name == PREVIOUS and last.exists():
            last.replace(last.with_name("damaged.pt"))  # the next save must not make it the previous one
        yield


def describe_run(run_dir: Path, recipe: Recipe, device: torch.device, step: int) -> None:
    """Write recipe.yaml (resolved) and environment.json: this start of the run, and under "earlier" those before it."""
    write_atomically(run_dir / "recipe.yaml", lambda path: path.write_text(recipe.to_yaml()))
    packages = ("fastssl-trainer", "torch", "torchvision", "timm", "ffcv", "numba", "numpy", "torch-optimizer")
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "machine": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "earlier": _earlier_starts(run_dir / "environment.json"),
    }
    text = json.dumps(environment, indent=2) + "\n"
    write_atomically(run_dir / "environment.json", lambda path: path.write_text(text))


def _earlier_starts(path: Path) -> list[dict]:
    try:
        last = json.loads(path.read_text())
        return [*last.pop("earlier", []), last]
    except (OSError, ValueError, AttributeError):  # there is none, or not one of ours
        return []


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "cpu")


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


def save_view_sheet(run_dir: Path, v1: torch.Tensor, v2: torch.Tensor, recipe: Recipe) -> None:
    """views.png: pairs of augmented views side by side, as the encoder sees them."""
    pairs = min(PAIRS_SHOWN, len(v1))
    columns = 4
    rows = -(-pairs // columns)
    size = v1.shape[-1]  # views.grow may start below views.size
    gap = max(2, size // 16)
    sheet = np.full((rows * (size + gap) + gap, columns * (2 * size + 2 * gap) + gap, 3), 255, np.uint8)
    for i in range(pairs):
        for view, v in enumerate((v1, v2)):
            pixels = unnormalize(v[i : i + 1], recipe.views)[0].permute(1, 2, 0)
            y = gap + (i // columns) * (size + gap)
            x = gap + (i % columns) * (2 * size + 2 * gap) + view * size
            sheet[y : y + size, x : x + size] = (pixels * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(sheet)
    if size < 100:  # small views are enlarged, so that a person sees something
        factor = 128 // size
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    write_atomically(run_dir / "views.png", lambda path: picture.save(path))
