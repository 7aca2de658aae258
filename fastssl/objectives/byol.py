"""BYOL (arXiv 2006.07733): predict a slowly moving target network's embedding of the other view."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, mean_over_ranks
from fastssl.models import ViewOutput
from fastssl.objectives.batch import stack_views, unit
from fastssl.recipe import BYOLConfig


def byol_loss(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor, *, gather: bool | None = None) -> Tensor:
    """Sum over both directions of the mean of 2 - 2 cos(prediction, target), a scalar in [0, 8] (equation 2).

    Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        p1, p2: the predictions from views 1 and 2, (B, D), or (S, B, D) for S Monte Carlo draws; the loss is then the
            mean of the draws' losses.
        t1, t2: the target network's embeddings (B, D) of the same views, without gradient; p1 predicts t2.
        gather: None for the mean over all processes wherever torch.distributed runs, False for this process alone.
            The samples do not interact, so only the value depends on it.
    """
    predictions, targets = stack_views(p1, p2), stack_views(t2, t1)
    count_rows(predictions, gather)  # refuses batches of unequal size, whose means would weigh samples unequally
    with torch.autocast(p1.device.type, enabled=False):
        if predictions.ndim == 4:
            targets = targets.unsqueeze(1)  # the same target for every draw
        cosines = (unit(predictions) * unit(targets)).sum(-1)  # (V, S, B)
        return mean_over_ranks(2 * (2 - 2 * cosines.mean()), gather)


def byol_terms(views: tuple[ViewOutput, ...], config: BYOLConfig) -> dict[str, Tensor]:
    """The loss's only term for training."""
    first, second = views
    assert first.target is not None and second.target is not None  # the model of a BYOLConfig has a target network
    return {"prediction": byol_loss(first.z, second.z, first.target, second.target, gather=config.gather)}
