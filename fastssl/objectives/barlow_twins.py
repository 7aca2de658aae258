"""Barlow Twins (arXiv 2103.03230): make the two views' cross-correlation matrix the identity."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, sum_over_ranks
from fastssl.models import ViewOutput
from fastssl.objectives.batch import require_two, stack_views, sum_of_squared_products
from fastssl.recipe import BarlowTwinsConfig


def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    lambd: float = 5e-3,
    unbiased: bool = False,
    eps: float = 1e-5,
    gather: bool | None = None,
) -> Tensor:
    """sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2 (equation 1), a scalar >= 0.

    Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws; the loss is then the mean of the draws' losses
            (arXiv 2310.18080, section 3).
        unbiased: divide the variance by B - 1, not by B.
        eps: added to the variance. With 0, a feature that is constant over the batch gives NaN.
        gather: None for statistics over all processes wherever torch.distributed runs, False for this process alone.

    Raises:
        ValueError: if the shapes differ, or the batch over all processes has fewer than 2 samples.

    Example::

        z1, z2 = projector(encoder(v1)), projector(encoder(v2))
        barlow_twins_loss(z1, z2).backward()
    """
    on_diagonal, off_diagonal = correlation_errors(z1, z2, unbiased, eps, gather)
    return on_diagonal + lambd * off_diagonal


def barlow_twins_terms(views: tuple[ViewOutput, ...], config: BarlowTwinsConfig) -> dict[str, Tensor]:
    """The loss's weighted terms for training."""
    first, second = views
    on_diagonal, off_diagonal = correlation_errors(first.z, second.z, config.unbiased, config.eps, config.gather)
    return {"on_diagonal": on_diagonal, "off_diagonal": config.lambd * off_diagonal}


def correlation_errors(
    z1: Tensor, z2: Tensor, unbiased: bool, eps: float, gather: bool | None
) -> tuple[Tensor, Tensor]:
    """sum_i (C_ii - 1)^2 and sum_{i != j} C_ij^2, C the cross-correlation matrix (D, D); means over S draws."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n = require_two(count_rows(z, gather))
    with torch.autocast(z.device.type, enabled=False):
        mean = sum_over_ranks(z.sum(-2, keepdim=True), gather) / n
        z = z - mean
        var = sum_over_ranks(z.square().sum(-2, keepdim=True), gather) / (n - int(unbiased))
        zn1, zn2 = z / (var + eps).sqrt()

        diagonal_SD = sum_over_ranks((zn1 * zn2).sum(-2), gather) / n  # of C = zn1' zn2 / n
        on_diagonal = (diagonal_SD - 1).square().sum(-1)
        # All squares minus the diagonal's need no mask of D x D. The rounding error is 1e-7 of the diagonal's D, and
        # the off-diagonal sum is about D^2 / B from sampling noise alone.
        off_diagonal = sum_of_squared_products(zn1, zn2, n, gather) / n**2 - diagonal_SD.square().sum(-1)
        return on_diagonal.mean(), off_diagonal.mean()
