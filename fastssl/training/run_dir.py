"""The run directory: which one, its lock, and the files that describe the run."""

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torchvision.utils import make_grid, save_image

from fastssl.common.commands import training_command
from fastssl.common.environment import describe_environment
from fastssl.common.errors import UserError
from fastssl.common.files import (
    LARGEST_TEXT,
    UnsafeFile,
    explain_write_errors,
    machine_fix,
    make_folder,
    open_regular,
    read_bytes,
    read_text,
    remove_abandoned_files,
    try_lock,
    write_atomically,
    write_error,
)
from fastssl.common.terminal import console, print_line
from fastssl.models.checkpoint import LAST, Checkpoint, find_checkpoints, find_run_dir, is_run_dir
from fastssl.recipe import Recipe, ViewsConfig
from fastssl.views.operations import unnormalize

IMAGES_SHOWN = 16  # in views.png
LOCK = ".lock"
LOCK_CONTENT = re.compile(r"(\S+ \d+)?")  # see _launcher
WRITTEN = ("recipe.yaml", "environment.json", "metrics.jsonl", "views.png", "encoder.safetensors")


class RunDirBusy(UserError):
    """Another process is training in the run directory."""


class RunDir(NamedTuple):
    path: Path
    resumes: bool  # whether training continues from a checkpoint in it
    taken: Path | None  # an existing directory, for which this new run got a number: runs/NAME, runs/NAME-2, ...


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
    taken = None
    if resume == "auto":
        path = named or Path("runs") / recipe.name
    elif resume is not None:
        path = find_run_dir(resume)
    elif restarted and _launcher_of(named or newest) == _launcher():
        path = named or newest
    elif named and is_run_dir(named):
        raise UserError(
            f"{named} already holds a run",
            hint=f"continue it with {training_command('--resume', named)}, or set another run.dir",
        )
    elif named:
        path = named
    else:
        path = free
        taken = newest if newest != free else None
    # A run that was killed before it wrote a checkpoint starts over.
    if not is_run_dir(path):
        _refuse_to_overwrite(path)
    return RunDir(path, bool(find_checkpoints(path)), taken)


def _refuse_to_overwrite(path: Path) -> None:
    """Raise UserError if a new run would write over files in an existing directory, which are not of a run."""
    in_the_way = [path / name for name in WRITTEN if os.path.lexists(path / name)]
    in_the_way += sorted((path / "checkpoints").glob("[!.]*"))
    if in_the_way:
        raise UserError(
            f"{in_the_way[0]} is in the way of a new run, which might overwrite it", hint="set another run.dir"
        )


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
        return read_text(run_dir / LOCK)
    except (OSError, ValueError):
        return None


@contextmanager
def locked_run_dir(path: Path) -> Iterator[None]:
    """Create the directory if it is missing, and lock it: no other process can train in it inside the context.

    Raises:
        RunDirBusy: if another process holds the lock.
        UserError: if the directory cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        make_folder(path / "checkpoints")
        lock = open_regular(path / LOCK, "a+b", buffering=0)
    except OSError as error:
        if machine_fix(error) or isinstance(error, UnsafeFile):
            raise write_error(path, error) from None
        raise UserError(
            f"The run directory {path} cannot be made ({error.strerror})", hint="set another run.dir"
        ) from None
    with lock:
        with explain_write_errors(path):
            try:
                if not try_lock(lock):
                    warning = f"warning: {path} is on a file system without locks: train in it with one process."
                    print_line(console(stderr=True), warning)
            except BlockingIOError:
                raise RunDirBusy(
                    f"Another process is training in {path}", hint="wait for it, or set another run.dir"
                ) from None
            lock.seek(0)
            if not LOCK_CONTENT.fullmatch(lock.read(500).decode(errors="replace")):
                raise UserError(f"{path / LOCK} is a file of another program", hint="set another run.dir")
            lock.truncate(0)
            lock.write(_launcher().encode())
            for folder in (path, path / "checkpoints"):
                remove_abandoned_files(folder)
        yield


def rename_damaged(checkpoint: Checkpoint) -> None:
    """Rename last.pt to damaged.pt if it was, so that the next save does not keep it as previous.pt."""
    if checkpoint.warning:
        last = checkpoint.path.with_name(LAST)
        last.replace(last.with_name("damaged.pt"))


def describe_run(run_dir: Path, recipe: Recipe, device: torch.device, precision: str, step: int) -> None:
    """Write recipe.yaml (resolved), and environment.json with this start of the run and the "earlier" ones."""
    write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
    path = run_dir / "environment.json"
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        **describe_environment(device),
        "precision": precision,
        "earlier": _earlier_starts(path),
    }
    write_atomically(path, json.dumps(environment, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[dict[str, object]]:
    try:
        last = TypeAdapter(dict[str, Any]).validate_json(read_bytes(path, LARGEST_TEXT))
        earlier = TypeAdapter(list[dict[str, Any]]).validate_python(last.pop("earlier", []))
    except (OSError, ValidationError):  # no such file, or not one of ours
        return []
    return [*earlier, last]


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
