"""All that a resume needs, and how it is saved: a checkpoint is there whole or not at all."""

import io
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastssl.common.distributed import is_main_process
from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.loading import BetonLoader
from fastssl.models import Model, WeightAverage
from fastssl.models.checkpoint import LAST, PREVIOUS, Checkpoint, recipe_in
from fastssl.recipe import Recipe

# A resumed run may change these; any other key would make it another run. The data may have moved: that they are the
# same images, the loader checks.
FREE_KEYS = (
    "run", "data.train", "data.val", "data.resident", "data.on_bad_sample", "data.workers", "views.eval",
    "embedding.chunk", "train.device", "train.compile", "train.cuda_graphs", "train.max_skipped_steps", "probe", "log",
    "checkpoint",
)  # fmt: skip


@dataclass
class TrainState:
    """What changes during training. `step` counts optimiser steps, skipped ones included.

    Learning rate, momentum of the target, size of the views and all noise are functions of the step or epoch, of the
    recipe and of its seed: they need no state.
    """

    recipe: Recipe
    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: BetonLoader
    skipped: Tensor  # int64 () on the device: steps left out because they were not finite
    average: WeightAverage | None = None
    step: int = 0
    epochs_probed: int = 0  # the epoch behind which the last probe ran
    best: dict[str, float] = field(default_factory=dict)  # the probe's best figure, and its step
    seconds: float = 0.0  # of training, over all resumes
    started: float = field(default_factory=time.monotonic)

    def save(self, run_dir: Path, name: str = LAST) -> None:
        """Write checkpoints/NAME, in the first process. The last checkpoint before it stays as previous.pt.

        Raises OSError where the disk does not take it; then the old files are still there.
        """
        if not is_main_process():
            return
        saved = {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "step": self.step,
            "epochs_probed": self.epochs_probed,
            "best": self.best,
            "seconds": self.count_seconds(),
            "torch_threads": torch.get_num_threads(),
            "rng": torch.get_rng_state(),  # for backbones with dropout
            "cuda_rng": torch.cuda.get_rng_state() if self.skipped.is_cuda else None,
        }
        # Into memory first: torch.save on a full disk raises whatever its archive happens to meet there.
        data = io.BytesIO()
        torch.save(saved, data)
        folder = run_dir / "checkpoints"
        keep = folder / PREVIOUS if name == LAST else None
        write_atomically(folder / name, lambda path: path.write_bytes(data.getbuffer()), keep=keep)

    def count_seconds(self) -> float:
        """Of training so far, over all resumes."""
        now = time.monotonic()
        self.seconds, self.started = self.seconds + now - self.started, now
        return self.seconds

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Go on from a checkpoint. Returns warnings. Raises UserError for another run's recipe or a file's damage."""
        path, saved, _, warning = checkpoint
        changed = changed_keys(recipe_in(path, saved).model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        if changed:
            raise UserError(
                f"{path} is of a run with other values of {', '.join(changed)}: resume with that run's own "
                f"recipe.yaml, or start a new run (model.init={path} starts it from these weights)."
            )
        try:
            self._fill_from(saved)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit its own recipe, so no run goes on from it: {reason}.") from None
        threads = saved["torch_threads"]
        warnings = [warning] if warning else []
        if threads != torch.get_num_threads():
            warnings.append(
                f"torch ran with {threads} threads before and has {torch.get_num_threads()} now, so results agree to "
                f"rounding only (OMP_NUM_THREADS={threads} restores them)."
            )
        return warnings

    def _fill_from(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.model.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.loader.load_state_dict(saved["loader"])
        self.skipped.copy_(saved["skipped"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.epochs_probed, self.best = saved["epochs_probed"], saved["best"]
        if is_main_process():
            torch.set_rng_state(saved["rng"])
            if self.skipped.is_cuda and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"])


def changed_keys(before: dict, after: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, the free ones left out."""
    changed = []
    for key in {**before, **after}:
        dotted, old, new = prefix + key, before.get(key), after.get(key)
        if old == new or dotted in FREE_KEYS:
            continue
        both = isinstance(old, dict) and isinstance(new, dict)
        changed += changed_keys(old, new, dotted + ".") if both else [dotted]
    return changed
