"""Supervised learning: cross-entropy on labels, from one view."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.distributed import count_rows, mean_over_ranks
from fastssl.models import ViewOutput
from fastssl.models.gaussian import at_least_fp32
from fastssl.recipe import SupervisedConfig


def cross_entropy_loss(
    logits: Tensor, label: Tensor, *, label_smoothing: float = 0.0, gather: bool | None = None
) -> Tensor:
    """The mean over images of -log softmax(logits)[label], a scalar.

    Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        logits: (B, C), or (S, B, C) for S Monte Carlo draws, which are averaged first.
        label: (B,), 0 to C - 1.
        gather: None for the mean over all processes wherever torch.distributed runs, False for this process alone.
            The samples do not interact, so only the value depends on it.
    """
    count_rows(logits, gather)  # refuses batches of unequal size, whose means would weigh samples unequally
    with torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(mean_logits(logits), label, label_smoothing=label_smoothing)
        return mean_over_ranks(loss, gather)


def supervised_terms(views: tuple[ViewOutput, ...], config: SupervisedConfig) -> dict[str, Tensor]:
    """The loss's only term for training."""
    (view,) = views
    assert view.target is not None  # a Classifier's is the label
    loss = cross_entropy_loss(view.z, view.target, label_smoothing=config.label_smoothing, gather=config.gather)
    return {"cross_entropy": loss}


def mean_logits(logits: Tensor) -> Tensor:
    """(B, C), or S draws of it (S, B, C) -> (B, C) in fp32 (fp64 stays)."""
    logits = at_least_fp32(logits)
    return logits.mean(0) if logits.ndim == 3 else logits
