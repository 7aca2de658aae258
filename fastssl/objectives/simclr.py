"""SimCLR (arXiv 2002.05709): the two views of an image are nearer to each other than to all other images."""

import math
from typing import Literal

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, gather_rows, mean_over_ranks, rank_of
from fastssl.models import ViewOutput
from fastssl.objectives.batch import require_two, stack_views, unit
from fastssl.recipe import SimCLRConfig


def simclr_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    over_draws: Literal["mean", "log_mean_exp"] = "mean",
    gather: bool | None = None,
) -> Tensor:
    """NT-Xent (equation 1), averaged over the 2 B anchors: a scalar >= 0.

    The loss of anchor a is -log p, p = exp(s(a, a') / temperature) / sum_{k != a} exp(s(a, k) / temperature), where s
    is the cosine, a' the anchor's other view, and k runs over both views of all images. Computed in fp32 under any
    autocast; fp64 stays fp64. Needs 4 S (B * world) B numbers of memory for the similarities.

    Args:
        z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws.
        over_draws: "mean" averages the loss over the draws; "log_mean_exp" averages p, before the logarithm, as
            MCInfoNCE does (arXiv 2302.02865, equation 3; there with von Mises-Fisher draws).
        gather: None for the images of all processes as negatives wherever torch.distributed runs, False for this
            process's images alone.

    Raises:
        ValueError: if the shapes differ, or the batch over all processes has fewer than 2 samples.
    """
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    B, total = z.shape[-2], require_two(count_rows(z, gather))
    with torch.autocast(z.device.type, enabled=False):
        z = unit(z)
        anchors = torch.cat(tuple(z), dim=-2)  # (S, 2B, D), view 1 before view 2
        others = torch.cat(tuple(gather_rows(z, gather)), dim=-2)  # (S, 2 total, D)
        logits = anchors @ others.mT / temperature

        row = torch.arange(B, device=z.device) + rank_of(gather) * B
        itself, other_view = torch.cat((row, row + total)), torch.cat((row + total, row))
        positive = logits.gather(-1, other_view.expand(*logits.shape[:-2], -1)[..., None]).squeeze(-1)
        one_hot = torch.arange(2 * total, device=z.device) == itself[:, None]
        log_p = positive - logits.masked_fill(one_hot, -torch.inf).logsumexp(-1)  # (S, 2B)
        if over_draws == "log_mean_exp" and log_p.ndim == 2:
            log_p = log_p.logsumexp(0) - math.log(len(log_p))
        return mean_over_ranks(-log_p.mean(), gather)


def simclr_terms(views: tuple[ViewOutput, ...], config: SimCLRConfig) -> dict[str, Tensor]:
    """The loss's only term for training."""
    first, second = views
    loss = simclr_loss(
        first.z, second.z, temperature=config.temperature, over_draws=config.over_draws, gather=config.gather
    )
    return {"nt_xent": loss}
