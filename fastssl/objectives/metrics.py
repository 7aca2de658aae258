"""Metrics that training logs next to the loss: accuracy, the spread of a stochastic embedding, and RankMe."""

import math

import torch
from torch import Tensor

from fastssl.common.distributed import mean_over_ranks
from fastssl.models import Draws
from fastssl.models.gaussian import SIGMA_MAX, SIGMA_MIN
from fastssl.objectives.supervised import mean_logits


@torch.no_grad()
def accuracy(logits: Tensor, label: Tensor, *, gather: bool | None = None) -> Tensor:
    """The share of images whose largest logit is the label's, a scalar. Arguments as for `cross_entropy_loss`."""
    logits = mean_logits(logits)
    return mean_over_ranks((logits.argmax(-1) == label).to(logits.dtype).mean(), gather)


@torch.no_grad()
def uncertainty_metrics(kl: Tensor, draws_of_views: list[Draws]) -> dict[str, Tensor]:
    """Scalars that show whether the uncertainty of a stochastic embedding collapses, explodes or differs by image.

    Args:
        kl: () the KL to the prior, summed over D, mean over images and views.
        draws_of_views: the embedding of each view.
    """
    sigma = torch.stack([draws.q.sigma for draws in draws_of_views])
    log_var = torch.stack([draws.q.log_var for draws in draws_of_views])
    clamped = (log_var <= 2 * math.log(SIGMA_MIN)) | (log_var >= 2 * math.log(SIGMA_MAX))
    return {
        "kl": kl,
        "kl_per_dim": kl / sigma.shape[-1],
        "sigma": sigma.mean(),
        "sigma_min": sigma.min(),
        "sigma_max": sigma.max(),
        "sigma_clamped": clamped.float().mean(),
    }


@torch.no_grad()
def rankme(z_BD: Tensor) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the effective rank of embeddings, from 1 to min(B, D).

    It is exp of the entropy of the singular values, divided by their sum. Collapsed embeddings have few large ones; all
    zeros have rank 1. B bounds it, so compare runs of one batch size; the paper takes 25,600 samples. NaN for
    embeddings that are not finite. Waits for the device.
    """
    z_BD = z_BD.detach().double()
    if not z_BD.isfinite().all():
        return float("nan")
    # The roots of the smaller Gram matrix's eigenvalues: at 1024 x 4048 a fifth of svdvals' time, equal to 1e-6.
    gram = z_BD @ z_BD.T if len(z_BD) < z_BD.shape[1] else z_BD.T @ z_BD
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-300) + 1e-7
    return max(1.0, (-shares * shares.log()).sum().exp().item())
