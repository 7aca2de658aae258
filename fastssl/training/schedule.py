"""What changes with the step or the epoch, as functions of it: nothing here has to be saved."""

import math
from dataclasses import dataclass

from fastssl.recipe import Recipe, ViewsConfig


@dataclass(frozen=True)
class Schedule:
    """A run's length, and what is known of every step beforehand."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    beta_warmup_steps: int
    peak_rate: float
    final_factor: float

    def rate(self, step: int) -> float:
        return learning_rate(step, self.total_steps, self.warmup_steps, self.peak_rate, self.final_factor)


def plan(recipe: Recipe, steps_per_epoch: int) -> tuple[Schedule, list[str]]:
    """The schedule of a recipe, and warnings. The peak rate is optim.lr x global batch / 256."""
    total_steps, warnings = recipe.train.epochs * steps_per_epoch, []
    length = steps_per_epoch, total_steps, warnings
    schedule = Schedule(
        steps_per_epoch,
        total_steps,
        count_warmup("optim.warmup_epochs", recipe.optim.warmup_epochs, *length),
        count_warmup("embedding.beta_warmup_epochs", recipe.embedding.beta_warmup_epochs, *length),
        recipe.optim.lr * recipe.train.batch_size / 256,
        recipe.optim.final_lr_factor,
    )
    return schedule, warnings


def count_warmup(key: str, epochs: float, steps_per_epoch: int, total_steps: int, warnings: list[str]) -> int:
    """The steps of a warm-up; one that is not shorter than the run becomes a tenth of it, with a warning."""
    steps = round(epochs * steps_per_epoch)
    if steps < total_steps:
        return steps
    warnings.append(f"{key}={epochs:g} is the whole run or more: shortened to 10% of its steps.")
    return total_steps // 10


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final_factor: float) -> float:
    """The rate of step 0, 1, ...: linear from 0 to `peak`, then half a cosine down to peak * final_factor.

    The first warm-up step has peak / warmup_steps, the last step of all nearly the final rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2)


def image_size(views: ViewsConfig, epoch: int) -> int:
    """The side of the training views in an epoch, in px: views.size, or what views.progressive_resize makes of it."""
    if views.progressive_resize is None:
        return views.size
    (begin, end), start = views.progressive_resize.epochs, views.progressive_resize.size
    if epoch >= end:
        return views.size
    share = max(0.0, (epoch - begin) / (end - begin))
    return start + int(share * (views.size - start)) // 32 * 32
