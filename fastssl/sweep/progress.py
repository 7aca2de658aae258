"""The state of each run, read from its directory: any process can read it, and a killed sweep loses nothing."""

from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from fastssl.beton import beton_file
from fastssl.common.errors import UserError
from fastssl.common.files import UnsafeFile, open_regular, read_lines, try_lock, write_error
from fastssl.loading import SampleSelection
from fastssl.recipe import Recipe, load_recipe
from fastssl.sweep.grid import SweepRun
from fastssl.training.state import changed_keys
from fastssl.training.tracking import parse_metrics

TAIL = 8192  # bytes, about ten lines of metrics.jsonl


@dataclass
class Task:
    """A run and its state in the sweep."""

    run: SweepRun
    state: Literal["waiting", "running", "finished", "failed"] = "waiting"
    locked: bool = False  # waits because a process of another sweep or command trains in its directory
    failures: int = 0
    error: str = ""  # why it failed the last time
    device: str = ""  # of its process: a GPU as CUDA_VISIBLE_DEVICES names it, or "cpu"
    process: BaseProcess | None = None


@dataclass
class RunProgress:
    """The latest values in a run's metrics.jsonl."""

    step: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    knn: float | None = None  # accuracy of the last kNN probe, from 0 to 1


def make_tasks(runs: list[SweepRun]) -> list[Task]:
    """One task per run, finished or waiting. Raises UserError if a directory holds a run of another recipe."""
    return [Task(run, "finished" if is_finished(run) else "waiting") for run in runs]


def log_path(run: SweepRun) -> Path:
    """The file with everything that the run has printed, over all attempts. The process that trains holds its lock."""
    return run.dir / "output.log"


def is_finished(run: SweepRun) -> bool:
    """Whether the run's last file exists. Raises UserError if its directory holds a run of another recipe."""
    path = run.dir / "recipe.yaml"
    if not path.exists():
        return False
    changed = changed_keys(load_recipe(path).model_dump(mode="json"), run.recipe.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{run.dir} holds a run with other values of {', '.join(changed)}",
            hint="give the sweep another `dir`, or move that run away",
        )
    return (run.dir / "encoder.safetensors").exists()


def is_locked(run: SweepRun) -> bool:
    """Whether any process trains in the run's directory now. Raises UserError if a file there cannot be locked."""
    # The first file is locked by processes of sweeps, from their start; the second by everything that trains.
    for path in (log_path(run), run.dir / ".lock"):
        try:
            with open_regular(path, "r+b") as file:
                try_lock(file)
        except BlockingIOError:
            return True
        except UnsafeFile as error:
            raise write_error(path, error) from None
        except OSError:
            continue  # no such file
    return False


def images_per_epoch(recipe: Recipe) -> int:
    """Number of images that one epoch trains on, in whole batches. Raises UserError if there is less than one batch."""
    images = _images_in(recipe.data.train, recipe.data.subset)
    images = min(images, recipe.data.limit or images)
    batch = recipe.train.batch_size
    if images < batch:
        raise UserError(
            f"{recipe.run.dir} would train on {images} images of {recipe.data.train}, fewer than one batch of {batch}",
            hint="lower train.batch_size or raise data.limit",
        )
    return images // batch * batch


@cache  # the count checks all tables of the file, so it is made once for all runs
def _images_in(path: str, subset: str | None) -> int:
    return SampleSelection(subset).count(beton_file(path, "train"))


def read_progress(run: SweepRun) -> RunProgress:
    progress = RunProgress()
    for entry in parse_metrics(_tail(run.dir / "metrics.jsonl")):
        for key in ("step", "loss", "images_per_second", "knn"):
            if entry.get(key) is not None:
                setattr(progress, key, entry[key])
    return progress


def last_knn(run: SweepRun) -> float | None:
    """Accuracy of the last kNN probe, from 0 to 1, however long ago it was; None if there was no probe."""
    path = run.dir / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else ()
    probes = [entry["knn"] for entry in parse_metrics(line for line in lines if '"knn"' in line) if "knn" in entry]
    return probes[-1] if probes else None


def last_log_line(run: SweepRun) -> str:
    """The last line that the run has printed: its error, if it failed."""
    lines = [line.strip() for line in _tail(log_path(run)) if line.strip()]
    if not lines:
        return "it printed nothing"
    if lines[-1].startswith("hint: ") and len(lines) > 1:
        return f"{lines[-2].removeprefix('error: ')}: {lines[-1].removeprefix('hint: ')}"
    return lines[-1].removeprefix("error: ")


def _tail(path: Path) -> list[str]:
    """The last lines of a file, the first of them perhaps incomplete; an empty list if there is no file."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
