"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if `log.to` names them."""

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from fastssl.common.errors import UserError
from fastssl.common.files import make_folder, open_regular, read_lines, read_text, write_atomically
from fastssl.common.schema import Count
from fastssl.recipe import Recipe

OBJECT = TypeAdapter(dict[str, Any])
COUNT = TypeAdapter(Count)
WANDB_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
LARGEST = 1e300  # of a number in a line: a sum of some is still finite


class MetricsFile:
    """metrics.jsonl: one JSON object per line, and each step once, also after a resume.

    While the disk is full, lines are held in memory, and one warning is given.
    """

    def __init__(self, path: Path, resumed_at: int, epochs_probed: int, warn: Callable[[str], None]):
        """resumed_at, epochs_probed: of the checkpoint. Lines after it are removed, because they will come again."""
        self.path = path
        self.warn = warn

        def write_earlier(part: Path) -> None:
            with open(part, "w", encoding="utf-8") as file:
                for line in read_lines(path) if path.exists() else ():
                    if _is_earlier(line, resumed_at, epochs_probed):
                        file.write(line + "\n")

        write_atomically(path, write_earlier)
        # Unbuffered, so that it is known how much of a failed write has reached the file.
        self._file = open_regular(path, "ab", buffering=0)
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity: they become null.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._waiting.append(json.dumps({"step": step, **finite}).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines in memory if there is room for all of them."""
        data = b"".join(self._waiting)
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(end)  # leave no half line
            if not self._warned:
                self.warn(f"warning: {self.path} cannot be written ({error.strerror}): its lines wait in memory.")
                self._warned = True
            return
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._file.close()


def parse_metrics(lines: Iterable[str]) -> Iterator[dict[str, float | None]]:
    """Yield the finite numbers and nulls of each line of a metrics.jsonl. Incomplete and other lines are skipped."""
    for line in lines:
        try:
            entry = OBJECT.validate_json(line)
            step = COUNT.validate_python(entry.get("step"))
        except ValidationError:
            continue
        yield {name: value for name, value in entry.items() if value is None or _is_number(value)} | {"step": step}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]  # false for NaN


def _is_earlier(line: str, resumed_at: int, epochs_probed: int) -> bool:
    """Return whether a line was written before the checkpoint; False for an incomplete line."""
    for entry in parse_metrics([line]):
        step, epoch = entry["step"], entry.get("epoch")
        if "loss" in entry:
            return step is not None and step <= resumed_at
        return epoch is not None and epoch < epochs_probed
    return False


class TensorBoard:
    """Writes every metric as a scalar over steps to RUN/tensorboard."""

    def __init__(self, run_dir: Path, recipe: Recipe, resumed_at: int):
        from torch.utils.tensorboard import SummaryWriter

        make_folder(run_dir / "tensorboard")
        # purge_step hides the steps after the checkpoint, which come again.
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=resumed_at + 1)
        self._writer.add_text("recipe", f"```yaml\n{recipe.to_yaml()}\n```")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run with the recipe's name, which a resume continues. WANDB_PROJECT and WANDB_MODE work as usual."""

    def __init__(self, run_dir: Path, recipe: Recipe, resumed_at: int):
        import wandb

        id_file = run_dir / "wandb_id.txt"
        make_folder(run_dir / "wandb")
        if not (resumed_at and id_file.exists()):
            write_atomically(id_file, uuid4().hex[:12])
        run_id = read_text(id_file, errors="replace").strip()
        if not WANDB_ID.fullmatch(run_id):
            raise UserError(f"{id_file} holds no id of a W&B run", hint="remove it, and the run gets a new one")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastssl"),
                name=recipe.name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=recipe.model_dump(mode="json"),
            )
        except Exception as error:  # wandb raises several types of its own: no key, no network
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"log.to=[wandb]: {reason}", hint="set WANDB_MODE=offline, which needs neither key nor network"
            ) from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard | WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require_trackers(recipe: Recipe) -> None:
    """Raise UserError if the package of a tracker in `log.to` is missing."""
    for name in recipe.log.to:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"log.to=[{name}] needs a package that is not installed", hint=f"run `pip install {name}`"
            ) from None


def start_trackers(run_dir: Path, recipe: Recipe, resumed_at: int) -> dict[str, TensorBoard | WeightsAndBiases]:
    """Return the trackers that `log.to` names."""
    return {name: TRACKERS[name](run_dir, recipe, resumed_at) for name in recipe.log.to}
