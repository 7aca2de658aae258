"""VICReg (arXiv 2105.04906): views agree, every feature varies, no two features covary."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, sum_over_ranks
from fastssl.models import ViewOutput
from fastssl.objectives.batch import require_two, stack_views, sum_of_squared_products
from fastssl.recipe import VICRegConfig


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    inv: float = 25.0,
    var: float = 25.0,
    cov: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    center: bool = False,
    gather: bool | None = None,
) -> Tensor:
    """inv * invariance + var * variance + cov * covariance (equation 6), a scalar >= 0.

    Invariance is the mean squared difference over B and D, and variance the mean (not the sum) of the two views'
    hinges, both as in the official code. Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws; the loss is then the mean of the draws' losses
            (arXiv 2310.18080, section 3).
        gamma: the standard deviation that the hinge asks for.
        eps: added to the variance. With 0, a feature that is constant over the batch has no finite gradient.
        center: subtract each view's mean before the invariance term.
        gather: None for statistics over all processes wherever torch.distributed runs, False for this process alone.

    Raises:
        ValueError: if the shapes differ, or the batch over all processes has fewer than 2 samples.
    """
    invariance, variance, covariance = unweighted_terms(z1, z2, gamma, eps, center, gather)
    return inv * invariance + var * variance + cov * covariance


def vicreg_terms(views: tuple[ViewOutput, ...], config: VICRegConfig) -> dict[str, Tensor]:
    """The loss's weighted terms for training."""
    first, second = views
    invariance, variance, covariance = unweighted_terms(
        first.z, second.z, config.gamma, config.eps, config.center, config.gather
    )
    return {
        "invariance": config.inv * invariance,
        "variance": config.var * variance,
        "covariance": config.cov * covariance,
    }


def unweighted_terms(
    z1: Tensor, z2: Tensor, gamma: float, eps: float, center: bool, gather: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance term, each a mean over S draws."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n, D = require_two(count_rows(z, gather)), z.shape[-1]
    with torch.autocast(z.device.type, enabled=False):
        mean = sum_over_ranks(z.sum(-2, keepdim=True), gather) / n
        zc = z - mean

        first, second = zc if center else z
        squares = (first - second).square().sum((-2, -1))
        invariance = sum_over_ranks(squares, gather) / (n * D)

        variance = sum_over_ranks(zc.square().sum(-2), gather) / (n - 1)
        hinge = (gamma - (variance + eps).sqrt()).relu()  # (V, S, D): the mean over V is half the sum

        # All squares minus the diagonal's, as in Barlow Twins: no mask of D x D.
        off_diagonal = (sum_of_squared_products(zc, zc, n, gather) / (n - 1) ** 2 - variance.square().sum(-1)) / D
        return invariance.mean(), hinge.mean(), off_diagonal.sum(0).mean()
