"""VICReg (arXiv 2105.04906): views agree, every feature varies, no two features covary."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, sum_over_ranks
from fastssl.objectives.batch import require_two, stack_views, sum_of_squared_products


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

    Invariance is the mean squared difference over B and D, and variance the mean (not the sum) of
    the two views' hinges, both as in the official code.

    z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws, of which the mean loss is returned
    (arXiv 2310.18080, section 3). Computed in fp32 under any autocast; fp64 stays fp64.

    gamma: the standard deviation that the hinge asks for. eps: added to the variance; with 0, a
    feature that is constant over the batch has no finite gradient. center: subtract each view's mean
    before the invariance term. gather: None for statistics over all processes wherever
    torch.distributed runs, False for this process alone.
    """
    terms = vicreg_terms(z1, z2, inv=inv, var=var, cov=cov, gamma=gamma, eps=eps, center=center, gather=gather)
    return terms["invariance"] + terms["variance"] + terms["covariance"]


def vicreg_terms(
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
) -> dict[str, Tensor]:
    """The loss's weighted terms, `invariance`, `variance` and `covariance`, which sum to it."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n, D = require_two(count_rows(z, gather)), z.shape[-1]
    with torch.autocast(z.device.type, enabled=False):
        mean = sum_over_ranks(z.sum(-2, keepdim=True), gather) / n
        zc = z - mean

        first, second = zc if center else z
        squares = (first - second).square().sum((-2, -1))
        invariance = sum_over_ranks(squares, gather) / (n * D)

        variance = sum_over_ranks(zc.square().sum(-2), gather) / (n - 1)
        hinge = (gamma - (variance + eps).sqrt()).relu()  # (V, S, D): the mean over V is 1/2 sum

        # The whole minus the diagonal, as in Barlow Twins: no D x D mask.
        off = (sum_of_squared_products(zc, zc, n, gather) / (n - 1) ** 2 - variance.square().sum(-1)) / D
        return {
            "invariance": inv * invariance.mean(),
            "variance": var * hinge.mean(),
            "covariance": cov * off.sum(0).mean(),
        }
