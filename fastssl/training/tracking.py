"""Where the figures of a run go: metrics.jsonl always, TensorBoard and Weights & Biases where the recipe names them."""

import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.recipe import Recipe


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each step once even after a resume.

    On a full disk lines wait in memory, with one warning, until there is room for them.
    """

    def __init__(self, path: Path, resumed_at: int, epochs_probed: int, warn: Callable[[str], None]):
        self.path, self.warn = path, warn
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _belongs_before(line, resumed_at, epochs_probed)]
        write_atomically(path, lambda beside: beside.write_text("".join(line + "\n" for line in kept)))
        self._file = open(path, "ab", buffering=0)  # no buffer of its own: what a failed write leaves is known
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, metrics: dict) -> None:
        # JSON has no word for what is not finite.
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._waiting.append(json.dumps(finite).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, if there is room."""
        data, end = b"".join(self._waiting), self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(end)  # no half line
            if not self._warned:
                self.warn(f"Warning: {self.path} cannot be written ({error.strerror}): its lines wait in memory.")
                self._warned = True
            return
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._file.close()


def readable_lines(lines: Iterable[str]) -> Iterator[dict[str, float | None]]:
    """The numbers (and nulls) of each line of a metrics.jsonl that is one; torn and foreign lines are passed over."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield {key: value for key, value in entry.items() if type(value) in (int, float, type(None))}


def _belongs_before(line: str, resumed_at: int, epochs_probed: int) -> bool:
    """Whether the run has written this line before the checkpoint that it resumes from; a torn line it has not."""
    for entry in readable_lines([line]):
        if "loss" in entry:
            return entry["step"] <= resumed_at
        epoch = entry.get("epoch")
        return epoch is not None and epoch < epochs_probed
    return False


class TensorBoard:
    """Every figure as a scalar over steps, in RUN/tensorboard."""

    def __init__(self, run_dir: Path, recipe: Recipe, resumed_at: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: hide what the run had shown behind its checkpoint.
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=resumed_at + 1)
        self._writer.add_text("recipe", f"```yaml\n{recipe.to_yaml()}\n```")

    def write(self, metrics: dict) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run of the recipe's name, continued by a resume. WANDB_PROJECT and WANDB_MODE work as usual."""

    def __init__(self, run_dir: Path, recipe: Recipe, resumed_at: int):
        import wandb

        identity = run_dir / "wandb_id.txt"
        if not (resumed_at and identity.exists()):
            identity.write_text(uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastssl"),
                name=recipe.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=recipe.model_dump(mode="json"),
            )
        except Exception as error:  # no key, no network: it has errors of its own for each
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"log.to=[wandb]: {reason}; WANDB_MODE=offline needs neither key nor network.") from None

    def write(self, metrics: dict) -> None:
        figures = {name: value for name, value in metrics.items() if name != "step"}
        self._run.log(figures, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def require_trackers(recipe: Recipe) -> None:
    """Raises UserError where the package of a name in `log.to` is missing."""
    for name in recipe.log.to:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"log.to=[{name}] needs a package that is not here: pip install {name}.") from None


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """metrics.jsonl, and the places that `log.to` names. One of those whose disk is full is left out from then on."""

    def __init__(self, run_dir: Path, recipe: Recipe, resumed_at: int, epochs_probed: int, warn: Callable[[str], None]):
        self.log = MetricsLog(run_dir / "metrics.jsonl", resumed_at, epochs_probed, warn)
        self.others = {name: TRACKERS[name](run_dir, recipe, resumed_at) for name in recipe.log.to}
        self.warn = warn

    def write(self, metrics: dict) -> None:
        self.log.write(metrics)
        for name, tracker in list(self.others.items()):
            try:
                tracker.write(metrics)
            except OSError as error:
                self.warn(f"Warning: {name} cannot be written ({error}): its figures end here, metrics.jsonl has them.")
                del self.others[name]

    def flush(self) -> None:
        self.log.flush()

    def close(self) -> None:
        self.log.close()
        for tracker in self.others.values():
            tracker.close()
