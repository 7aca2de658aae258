"""Barlow Twins (arXiv 2103.03230): make the two views' cross-correlation matrix the identity."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, sum_over_ranks
from fastssl.objectives.batch import require_two, stack_views, sum_of_squared_products


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

    z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws, of which the mean loss is returned
    (arXiv 2310.18080, section 3). Computed in fp32 under any autocast; fp64 stays fp64.

    unbiased: divide the variance by B - 1. eps: added to the variance; with 0, a feature that is
    constant over the batch gives NaN. gather: None for statistics over all processes wherever
    torch.distributed runs, False for this process alone.
    """
    terms = barlow_twins_terms(z1, z2, lambd=lambd, unbiased=unbiased, eps=eps, gather=gather)
    return terms["on_diagonal"] + terms["off_diagonal"]


def barlow_twins_terms(
    z1: Tensor,
    z2: Tensor,
    *,
    lambd: float = 5e-3,
    unbiased: bool = False,
    eps: float = 1e-5,
    gather: bool | None = None,
) -> dict[str, Tensor]:
    """The loss's weighted terms, `on_diagonal` and `off_diagonal`, which sum to it."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n = require_two(count_rows(z, gather))
    with torch.autocast(z.device.type, enabled=False):
        mean = sum_over_ranks(z.sum(-2, keepdim=True), gather) / n
        z = z - mean
        var = sum_over_ranks(z.square().sum(-2, keepdim=True), gather) / (n - int(unbiased))
        zn1, zn2 = z / (var + eps).sqrt()

        diagonal_SD = sum_over_ranks((zn1 * zn2).sum(-2), gather) / n  # of C = zn1' zn2 / n
        on = (diagonal_SD - 1).square().sum(-1)
        # The whole minus the diagonal needs no D x D mask. Its rounding error is 1e-7 of the diagonal's D, against an
        # off-diagonal of about D^2 / B from sampling noise alone.
        off = sum_of_squared_products(zn1, zn2, n, gather) / n**2 - diagonal_SD.square().sum(-1)
        return {"on_diagonal": on.mean(), "off_diagonal": lambd * off.mean()}
