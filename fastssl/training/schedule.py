"""Everything that is a function of the step or the epoch: learning rate, warm-ups, momentum, size of the views."""

import math
from dataclasses import dataclass

from fastssl.recipe import Recipe, ViewsConfig

RESIZE_STEP = 32  # px between two sizes of views.progressive_resize


@dataclass(frozen=True)
class Schedule:
    """The length of a run, and the learning rate of each step."""

    total_steps: int
    decay_steps: int  # until the learning rate has its final value; fewer than all in a run that was extended
    warmup_steps: int  # of the learning rate
    beta_warmup_steps: int  # of the KL's weight
    peak_rate: float
    final_factor: float  # the last rate divided by the peak

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: linear up to `peak_rate`, then half a cosine down to the final rate.

        The first warm-up step has peak_rate / warmup_steps, the last step of the cosine nearly the final rate.
        """
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        factor = self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return self.peak_rate * factor


def plan(recipe: Recipe, steps_per_epoch: int, decay_epochs: int, step: int = 0) -> tuple[Schedule, list[str]]:
    """The schedule of a recipe, and warnings. The peak rate is optim.lr x global batch / 256.

    decay_epochs: until the learning rate has its final value, at most train.epochs.
    step: that the run goes on from: nothing is said about a warm-up that is over.
    """
    decay_steps = decay_epochs * steps_per_epoch
    warnings = []

    def count_warmup(key: str, epochs: float) -> int:
        steps = round(epochs * steps_per_epoch)
        if steps < decay_steps:
            return steps
        shortened = decay_steps // 10
        if step == 0 or step < shortened:
            warnings.append(f"{key}={epochs:g} is the whole run or more: shortened to 10% of its steps.")
        return shortened

    schedule = Schedule(
        total_steps=recipe.train.epochs * steps_per_epoch,
        decay_steps=decay_steps,
        warmup_steps=count_warmup("optim.warmup_epochs", recipe.optim.warmup_epochs),
        beta_warmup_steps=count_warmup("embedding.beta_warmup_epochs", recipe.embedding.beta_warmup_epochs),
        peak_rate=recipe.optim.lr * recipe.train.batch_size / 256,
        final_factor=recipe.optim.final_lr_factor,
    )
    return schedule, warnings


def target_momentum(step: int, total_steps: int, start: float) -> float:
    """The momentum of BYOL's target, from `start` along half a cosine to 1 (arXiv 2006.07733, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total_steps) + 1) / 2


def image_size(views: ViewsConfig, epoch: int) -> int:
    """The side of the training views in an epoch, in px: views.size, or smaller under views.progressive_resize."""
    resize = views.progressive_resize
    if resize is None:
        return views.size
    begin, end = resize.epochs
    if epoch >= end:
        return views.size
    share = max(0.0, (epoch - begin) / (end - begin))
    return resize.size + int(share * (views.size - resize.size)) // RESIZE_STEP * RESIZE_STEP


def image_sizes(views: ViewsConfig) -> list[int]:
    """All sides that `image_size` returns over the epochs, in px, the last one first."""
    resize = views.progressive_resize
    smaller = [] if resize is None else range(resize.size, views.size, RESIZE_STEP)
    return [views.size, *smaller]
