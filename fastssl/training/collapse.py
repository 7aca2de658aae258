"""Warn when training runs but learns nothing: the embeddings of all images became one, or the loss stands still."""

from collections.abc import Mapping
from typing import NamedTuple, TypeGuard


class Streak(NamedTuple):
    """Log steps in a row with the same problem."""

    first_step: int
    last_step: int
    readings: int
    value: float | None  # RankMe of the last one, None if it was not computed; or the loss of the first one


class CollapseWarning:
    """Watches the metrics of the log steps. Warns once during training if they stay bad, and once more at the end.

    RankMe and the standard deviation of z are those of one batch. RankMe is not in all metrics (`log.rank_every`), but
    in those of every log step while `is_suspicious`. The limits rest on records/collapse.md: in healthy runs RankMe was
    never below 5.9, and it was 1.01 in a collapsed one.
    """

    RANK = 2.0  # RankMe below which the embeddings of all images have nearly one direction; of few dimensions less
    STD = 1e-3  # standard deviation of z over the images, mean of the dimensions, below which it is constant
    LOSS = 1e-5  # relative change of the loss over the readings, below which it stands still
    READINGS = 5  # log steps in a row
    STEPS = 100  # optimizer steps that they cover

    def __init__(self, images: int, dims: int) -> None:
        """images, dims: number of images in the batch whose RankMe is logged, and of dimensions of its z."""
        self.rank = min(self.RANK, min(images, dims) / 2)
        self.collapsed: Streak | None = None
        self.same_loss: Streak | None = None
        self.given = False

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Take the metrics of a log step. Return the warning if it is due now."""
        rank, loss = None, metrics["loss"]
        if "rankme_h" in metrics:
            rank = min(metrics["rankme_h"], metrics["rankme_z"])
        # Both are false for NaN, FiniteGuard's task.
        is_collapsed = (rank is not None and rank < self.rank) or metrics["std_z"] < self.STD
        self.collapsed = self._continue(self.collapsed, step, rank) if is_collapsed else None
        last = self.same_loss
        if last and last.value is not None and abs(loss - last.value) <= self.LOSS * abs(loss):
            self.same_loss = self._continue(last, step, last.value)
        else:
            self.same_loss = self._continue(None, step, loss)
        problem = self.problem()
        if self.given or problem is None:
            return None
        self.given = True
        return f"warning: {problem}"

    @property
    def is_suspicious(self) -> bool:
        """Whether the last metrics were those of collapsed embeddings."""
        return self.collapsed is not None

    def problem(self) -> str | None:
        """What has been wrong up to the last log step and how to fix it, one sentence; None if nothing is."""
        if self._lasts(self.collapsed):
            rank = "" if self.collapsed.value is None else f" (RankMe {self.collapsed.value:.3g})"
            return (
                f"the embeddings have collapsed: since step {self.collapsed.first_step} all images have nearly the "
                f"same one{rank}, so nothing useful is learned; lower optim.lr, or see Collapse in docs/objectives.md."
            )
        if self._lasts(self.same_loss):
            return (
                f"the loss has been {self.same_loss.value:.6g} since step {self.same_loss.first_step}, so nothing is "
                "learned; check optim.lr, the weights of the loss, and that the images differ (views.png)."
            )
        return None

    def _continue(self, streak: Streak | None, step: int, value: float | None) -> Streak:
        return Streak(streak.first_step if streak else step, step, streak.readings + 1 if streak else 1, value)

    def _lasts(self, streak: Streak | None) -> TypeGuard[Streak]:
        return (
            streak is not None
            and streak.readings >= self.READINGS
            and streak.last_step - streak.first_step >= self.STEPS
        )
