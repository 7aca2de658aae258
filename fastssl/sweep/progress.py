"""How far runs are, read from their directories: any process may ask, and a sweep that was killed has lost nothing."""

import fcntl
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastssl.common.errors import UserError
from fastssl.loading import count_images
from fastssl.recipe import Recipe, load_recipe
from fastssl.sweep.grid import Run
from fastssl.training.state import changed_keys
from fastssl.training.tracking import readable_lines

TAIL = 8192  # bytes, some ten lines of metrics.jsonl


@dataclass
class Progress:
    step: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    knn: float | None = None  # of the last probe


def log_of(run: Run) -> Path:
    """What the run printed, over all its attempts. The process that trains holds a lock on it."""
    return run.dir / "output.log"


def is_finished(run: Run) -> bool:
    """Whether the run's last file is there. Raises UserError where its directory holds a run of another recipe."""
    path = run.dir / "recipe.yaml"
    if not path.exists():
        return False
    changed = changed_keys(load_recipe(path).model_dump(mode="json"), run.recipe.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{run.dir} holds a run with other values of {', '.join(changed)}: give the sweep another `dir`, or move "
            "that run away."
        )
    return (run.dir / "encoder.safetensors").exists()


def is_locked(run: Run) -> bool:
    """Whether some process, of this sweep or another, trains in the run's directory now."""
    for path in (log_of(run), run.dir / ".lock"):  # the sweep's own lock, and that of any training
        try:
            with open(path, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue  # there is no such file, or its file system knows no locks
    return False


def images_per_epoch(recipe: Recipe) -> int:
    """Images that one epoch trains on: whole batches. Looks into data.train. Raises UserError for less than one."""
    images = images_in(recipe.data.train, recipe.data.subset)
    images, batch = min(images, recipe.data.limit or images), recipe.train.batch_size
    if images < batch:
        raise UserError(
            f"{recipe.run.dir} would train on {images} images of {recipe.data.train}, fewer than one batch of {batch}: "
            "lower train.batch_size or raise data.limit."
        )
    return images // batch * batch


@cache
def images_in(path: str, subset: str | None) -> int:
    return count_images(path, subset=subset)  # this checks all of the file's tables, so once for all runs


def read_progress(run: Run) -> Progress:
    """The figures of the run's latest lines of metrics.jsonl."""
    progress = Progress()
    for entry in readable_lines(tail(run.dir / "metrics.jsonl", TAIL)):
        for key in ("step", "loss", "images_per_second", "knn"):
            if entry.get(key) is not None:
                setattr(progress, key, entry[key])
    return progress


def last_knn(run: Run) -> float | None:
    """Accuracy of the last kNN probe, from 0 to 1; None where the run had no probe."""
    path = run.dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    probes = [entry["knn"] for entry in readable_lines(line for line in lines if '"knn"' in line) if "knn" in entry]
    return probes[-1] if probes else None


def last_words(run: Run) -> str:
    """The last line that the run printed, which is its error if it failed."""
    lines = [line.strip() for line in tail(log_of(run), TAIL) if line.strip()]
    return lines[-1].removeprefix("fastssl: ") if lines else "it printed nothing"


def tail(path: Path, size: int) -> list[str]:
    """The lines in a file's last bytes, the first of which may have lost its beginning; none where there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
