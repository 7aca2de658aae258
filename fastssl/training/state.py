"""The state of a training run: everything that a resume needs, to and from a checkpoint."""

import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from fastssl.common.distributed import is_main_process
from fastssl.common.errors import UserError, in_short, is_out_of_memory
from fastssl.loading import BetonLoader
from fastssl.models import Model, WeightAverage
from fastssl.models.checkpoint import Checkpoint, SavedOptimizer, SavedScaler, SavedState
from fastssl.recipe import Recipe
from fastssl.training.optim import load_optimizer

# A resumed run may change these keys; another value of any other key would make it another run. The data may have
# moved; the loader checks that the images are the same.
FREE_KEYS = (
    "run", "data.train", "data.val", "data.resident", "data.on_bad_sample", "data.workers", "views.eval",
    "views.kernel", "embedding.chunk", "optim.extend", "train.device", "train.compile", "train.cuda_graphs",
    "train.max_skipped_steps", "probe", "log", "checkpoint",
)  # fmt: skip


@dataclass
class TrainState:
    """What changes during training.

    Learning rate, momentum of the target, size of the views and all noise are functions of the step or epoch, of the
    recipe and of its seed, so they are not part of it.
    """

    recipe: Recipe
    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the gradients; disabled unless the precision is fp16
    loader: BetonLoader  # knows the epoch and the position in it
    precision: str  # train.precision without "auto"
    skipped: Tensor  # int64 () on the device: steps skipped because they were not finite
    average: WeightAverage[Model] | None = None
    step: int = 0  # optimizer steps, skipped ones included
    decay_epochs: int = 0  # until the learning rate has its final value; see epochs_of_decay
    epochs_probed: int = 0  # epochs that were done at the last probe
    best: dict[str, float] = field(default_factory=dict)  # the probe's best metric by name, and its "step"
    seconds: float = 0.0  # of training, over all resumes, at `started`
    started: float = field(default_factory=time.monotonic)

    def state_dict(self) -> SavedState:
        """Return what a checkpoint holds. Its tensors are the run's own, so training changes them."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "optimizer": cast(SavedOptimizer, self.optimizer.state_dict()),
            "scaler": cast(SavedScaler, self.scaler.state_dict()),
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "step": self.step,
            "decay_epochs": self.decay_epochs,
            "epochs_probed": self.epochs_probed,
            "best": self.best,
            "seconds": self.count_seconds(),
            "precision": self.precision,
            "torch_threads": torch.get_num_threads(),
            "rng": torch.get_rng_state(),  # for backbones with dropout
            "cuda_rng": torch.cuda.get_rng_state() if self.skipped.is_cuda else None,
        }

    def count_seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        now = time.monotonic()
        self.seconds, self.started = self.seconds + now - self.started, now
        return self.seconds

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Continue from a checkpoint. Returns warnings.

        Raises UserError if the checkpoint belongs to another recipe or does not fit its own.
        """
        changed = changed_keys(checkpoint.recipe.model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        before = checkpoint.saved.get("precision")
        if before is None and checkpoint.recipe.train.precision == "auto":  # written before there was this key
            before = "fp32" if checkpoint.saved.get("cuda_rng") is None else "bf16"
        if before == self.precision and "train.precision" in changed:  # auto, which meant this, or the other way round
            changed.remove("train.precision")
        changed = [key for key in changed if key != "train.epochs"]  # see epochs_of_decay
        if changed:
            raise UserError(
                f"{checkpoint.path} is of a run with other values of {', '.join(changed)}",
                hint=f"resume with that run's own recipe.yaml, or start a new run (model.init={checkpoint.path} starts "
                "it from these weights)",
            )
        try:
            self._fill_from(checkpoint.saved)
            threads = checkpoint.saved["torch_threads"]
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{checkpoint.path} does not fit its own recipe, so no run goes on from it ({in_short(error)})",
                hint="name an earlier checkpoint, or start a new run",
            ) from None
        warnings = [checkpoint.warning] if checkpoint.warning else []
        if threads != torch.get_num_threads():
            warnings.append(
                f"torch ran with {threads} threads before and has {torch.get_num_threads()} now, so results agree to "
                f"rounding only (OMP_NUM_THREADS={threads} restores them)."
            )
        if before not in (None, self.precision):
            warnings.append(
                f"The run was trained in {before} before and goes on in {self.precision}, which train.precision=auto "
                f"means on this machine: results agree to rounding only (train.precision={before} keeps {before})."
            )
        return warnings

    def _fill_from(self, saved: SavedState) -> None:
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.model.load_state_dict(saved["ema"] or {})
        load_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(dict(saved["scaler"]))
        self.loader.load_state_dict(saved["loader"])
        self._check_progress(saved)
        self.skipped.copy_(saved["skipped"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.epochs_probed, self.best = saved["epochs_probed"], saved["best"]
        if is_main_process():
            torch.set_rng_state(saved["rng"])
            if self.skipped.is_cuda and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"])

    def _check_progress(self, saved: SavedState) -> None:
        """Raise ValueError unless step, epoch and position are one point of the run, and not after its end."""
        step, epoch, position = saved["step"], saved["loader"]["epoch"], saved["loader"]["position"]
        steps_per_epoch = len(self.loader) // self.recipe.train.accumulate
        steps, rest = divmod(position, self.recipe.train.batch_size)
        if rest or steps > steps_per_epoch or step != epoch * steps_per_epoch + steps:
            raise ValueError(f"step {step} is not at image {position} of epoch {epoch}")
        if step > self.recipe.train.epochs * steps_per_epoch:
            raise ValueError(f"step {step} is after the end of {self.recipe.train.epochs} epochs")
        if saved["epochs_probed"] > epoch:
            raise ValueError(f"a probe after {saved['epochs_probed']} epochs, but {epoch} are done")
        skipped = saved["skipped"]
        if skipped.dtype != torch.int64 or skipped.ndim or not 0 <= int(skipped) <= step:
            raise ValueError(f"skipped steps that are no number from 0 to {step}")


def epochs_of_decay(recipe: Recipe, checkpoint: Checkpoint | None) -> int:
    """The epochs until the learning rate has its final value: all, unless a resume has extended the run.

    A resume may raise train.epochs. With optim.extend=stretch the rate then follows the schedule of a run of that
    length, from the next step on; with "constant" it keeps its final value in the new epochs.

    Raises:
        UserError: if train.epochs is lower than before, or BYOL's target would not move in the new epochs.
    """
    epochs = recipe.train.epochs
    if checkpoint is None:
        return epochs
    before = checkpoint.recipe.train.epochs
    if epochs < before:
        raise UserError(
            f"train.epochs={epochs}, but the run in {checkpoint.path} has {before}, and a resume can only add epochs",
            hint=f"set train.epochs={before} or more, or start a new run with another run.dir",
        )
    if epochs > before and recipe.optim.extend == "stretch":
        return epochs
    if epochs > before and recipe.objective.name == "byol":
        raise UserError(
            "optim.extend=constant leaves BYOL's target where it is, with momentum 1", hint="leave out optim.extend"
        )
    decay_epochs = checkpoint.saved.get("decay_epochs", before)  # checkpoints of before this key have none
    if decay_epochs > before:
        raise UserError(
            f"{checkpoint.path} is a damaged checkpoint (decay_epochs: {decay_epochs})",
            hint="name an earlier checkpoint",
        )
    return decay_epochs


def changed_keys(
    before: dict[str, Any], after: dict[str, Any], prefix: str = "", free: Container[str] = FREE_KEYS
) -> list[str]:
    """The dotted keys whose values differ between two dumped recipes, without free ones: those a resume may change."""
    changed: list[str] = []
    for key in {**before, **after}:
        dotted, old, new = prefix + key, before.get(key), after.get(key)
        if old == new or dotted in free:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed += changed_keys(old, new, dotted + ".", free)
        else:
            changed.append(dotted)
    return changed
