"""The run directory: which one, its lock, and the files that describe the run."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from fastssl.common.environment import describe_environment
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, machine_fix, try_lock, write_atomically, write_error
from fastssl.common.terminal import console, print_line
from fastssl.models.checkpoint import LAST, Checkpoint, find_checkpoints, find_run_dir
from fastssl.recipe import Recipe, ViewsConfig
from fastssl.views.operations import unnormalize

IMAGES_SHOWN = 16  # in views.png
LOCK = ".lock"


class RunDirBusy(UserError):
    """Another process is training in the run directory."""


class RunDir(NamedTuple):
    path: Path
    resumes: bool  # whether training continues from a checkpoint in it


def choose_run_dir(recipe: Recipe, resume: Path | Literal["auto"] | None, restarted: bool) -> RunDir:
    """Return the directory to train in. It is not created yet.

    Args:
        recipe: its `run.dir` and `name` are used.
        resume: a path that `find_run_dir` takes, to continue that run; "auto", to continue the run in `run.dir` (else
            runs/NAME) if there is one, and to start it if there is none; None, to start a new run in `run.dir`, else in
            the first of runs/NAME, runs/NAME-2 and so on that does not exist.
        restarted: whether torchrun has restarted this process. Then None means the run that the same torchrun began.

    Raises:
        UserError: if there is no run to continue, or a new run would overwrite one.
    """
    named = Path(recipe.run.dir) if recipe.run.dir else None
    newest, free = _numbered_dirs(recipe.name)
    if resume == "auto":
        path = named or Path("runs") / recipe.name
    elif resume is not None:
        path = find_run_dir(resume)
    elif restarted and _launcher_of(named or newest) == _launcher():
        path = named or newest
    elif named and (named / "recipe.yaml").exists():
        raise UserError(f"{named} already holds a run: continue it with --resume {named}, or set another run.dir.")
    else:
        return RunDir(named or free, resumes=False)
    # A run that was killed before it wrote a checkpoint starts over.
    return RunDir(path, resumes=bool(find_checkpoints(path)))


def _numbered_dirs(name: str) -> tuple[Path, Path]:
    """Return the last of runs/NAME, runs/NAME-2 and so on that exists, and the first that does not."""
    newest = free = Path("runs") / name
    number = 1
    while free.exists():
        number += 1
        newest = free
        free = Path("runs") / f"{name}-{number}"
    return newest, free


def _launcher() -> str:
    """Identify torchrun's agent, the parent process, which stays the same while it restarts its processes."""
    return f"{platform.node()} {os.getppid()}"


def _launcher_of(run_dir: Path) -> str | None:
    try:
        return (run_dir / LOCK).read_text()
    except OSError:
        return None


@contextmanager
def locked_run_dir(path: Path) -> Iterator[None]:
    """Create the directory if it is missing, and lock it: no other process can train in it inside the context.

    Raises:
        RunDirBusy: if another process holds the lock.
        UserError: if the directory cannot be written.
    """
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(path / LOCK, "ab", buffering=0)
    except OSError as error:
        if machine_fix(error):
            raise write_error(path, error) from None
        raise UserError(f"The run directory {path} cannot be made ({error.strerror}): set another run.dir.") from None
    with lock:
        with explain_write_errors(path):
            try:
                if not try_lock(lock):
                    warning = f"Warning: {path} is on a file system without locks: train in it with one process."
                    print_line(console(stderr=True), warning)
            except BlockingIOError:
                busy = f"Another process is training in {path}: wait for it, or set another run.dir."
                raise RunDirBusy(busy) from None
            lock.truncate(0)
            lock.write(_launcher().encode())
        # Partial files of a process that was killed while it wrote.
        for folder in (path, path / "checkpoints"):
            for part in folder.glob(".*.part*"):
                part.unlink()
        yield


def rename_damaged(checkpoint: Checkpoint) -> None:
    """Rename last.pt to damaged.pt if it was, so that the next save does not keep it as previous.pt."""
    if checkpoint.warning:
        last = checkpoint.path.with_name(LAST)
        last.replace(last.with_name("damaged.pt"))


def describe_run(run_dir: Path, recipe: Recipe, device: torch.device, step: int) -> None:
    """Write recipe.yaml (resolved), and environment.json with this start of the run and the "earlier" ones."""
    write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
    path = run_dir / "environment.json"
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        **describe_environment(device),
        "earlier": _earlier_starts(path),
    }
    write_atomically(path, json.dumps(environment, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[dict[str, object]]:
    try:
        last = json.loads(path.read_text())
        return [*last.pop("earlier", []), last]
    except (OSError, ValueError, AttributeError):  # no such file, or not one of ours
        return []


def save_views(run_dir: Path, views: tuple[Tensor, ...], config: ViewsConfig) -> None:
    """Write views.png: the views of the first images as the encoder sees them, those of one image side by side.

    views: (B, C, size, size) each, normalized. Of more than three channels the first three are shown, of two the first.
    """
    shown = {1: 1, 2: 1}.get(views[0].shape[1], 3)
    pixels = torch.cat([unnormalize(view[:IMAGES_SHOWN], config)[:, :shown] for view in views], dim=3)
    size = views[0].shape[-1]
    sheet = make_grid(pixels, nrow=4, padding=max(2, size // 16), pad_value=1.0)
    if size < 100:
        factor = 128 // size
        sheet = sheet.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(run_dir / "views.png", lambda path: save_image(sheet, path))
