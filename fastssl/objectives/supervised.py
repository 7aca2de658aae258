"""Supervised learning: cross-entropy on labels, from one view."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.distributed import count_rows, mean_over_ranks
from fastssl.models.priors import at_least_fp32


def cross_entropy_loss(
    logits: Tensor, label: Tensor, *, label_smoothing: float = 0.0, gather: bool | None = None
) -> Tensor:
    """The mean over images of -log softmax(logits)[label], a scalar.

    logits: (B, C), or (S, B, C) for S Monte Carlo draws, which are averaged first. label (B,): 0 to C - 1. Computed in
    fp32 under any autocast; fp64 stays fp64. gather: None for the mean over all processes wherever torch.distributed
    runs (the samples do not interact, so only the value depends on it).
    """
    count_rows(logits, gather)  # refuses batches of unequal size, whose means would weigh samples unequally
    with torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(mean_logits(logits), label, label_smoothing=label_smoothing)
        return mean_over_ranks(loss, gather)


@torch.no_grad()
def accuracy(logits: Tensor, label: Tensor, *, gather: bool | None = None) -> Tensor:
    """The share of images whose largest logit is the label's, a scalar. Arguments as in `cross_entropy_loss`."""
    logits = mean_logits(logits)
    return mean_over_ranks((logits.argmax(-1) == label).to(logits.dtype).mean(), gather)


def mean_logits(logits: Tensor) -> Tensor:
    """(B, C), or S draws of it (S, B, C) -> (B, C)."""
    logits = at_least_fp32(logits)
    return logits.mean(0) if logits.ndim == 3 else logits
