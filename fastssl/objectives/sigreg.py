"""LeJEPA (arXiv 2511.08544): views agree, and the embeddings' random projections are standard normal (SIGReg)."""

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, sum_over_ranks
from fastssl.models import ViewOutput
from fastssl.objectives.batch import distance_from_mean_view, random_directions, require_two, stack_views
from fastssl.recipe import SIGRegConfig


def sigreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    slices: int = 1024,
    lambd: float = 0.05,
    knots: int = 17,
    t_max: float = 3.0,
    seed: int = 0,
    step: int | Tensor = 0,
    gather: bool | None = None,
) -> Tensor:
    """(1 - lambd) * invariance + lambd * SIGReg, a scalar >= 0.

    Invariance is the mean squared distance of the views from their mean. SIGReg is the mean over views and random
    directions a of the Epps-Pulley statistic of the projections a'z, which compares their characteristic function with
    that of N(0, 1):

        n * integral over t from -t_max to t_max of |mean_n exp(i t a'z_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2)

    Means over dimensions and the integration from 0 to 3 (doubled, as the integrand is even) are those of the authors'
    code; the paper's listing integrates from -5 to 5. Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws; the loss is then the mean of the draws' losses, all with
            the same directions.
        slices: the number of directions, uniform on the unit sphere.
        lambd: the weight of SIGReg, from 0 to 1.
        knots: values of t from 0 to t_max for the trapezoidal rule.
        seed, step: the directions are a function of both: pass the number of the training step.
        gather: None for statistics over all processes wherever torch.distributed runs, False for this process alone.

    Raises:
        ValueError: if the shapes differ, or the batch over all processes has fewer than 2 samples.

    Example::

        z1, z2 = projector(encoder(v1)), projector(encoder(v2))
        sigreg_loss(z1, z2, seed=seed, step=step).backward()
    """
    directions_KD = random_directions(seed, step, slices, z1)
    invariance, sigreg = unweighted_terms(z1, z2, directions_KD, knots, t_max, gather)
    return (1 - lambd) * invariance + lambd * sigreg


def sigreg_terms(views: tuple[ViewOutput, ...], config: SIGRegConfig, directions_KD: Tensor) -> dict[str, Tensor]:
    """The loss's weighted terms for training."""
    first, second = views
    invariance, sigreg = unweighted_terms(first.z, second.z, directions_KD, config.knots, config.t_max, config.gather)
    return {"invariance": (1 - config.lambd) * invariance, "sigreg": config.lambd * sigreg}


def unweighted_terms(
    z1: Tensor, z2: Tensor, directions_KD: Tensor, knots: int, t_max: float, gather: bool | None
) -> tuple[Tensor, Tensor]:
    """Invariance and SIGReg term, each a mean over S draws."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n = require_two(count_rows(z, gather))
    with torch.autocast(z.device.type, enabled=False):
        invariance = distance_from_mean_view(z, n, gather)

        x = z @ directions_KD.to(z.dtype).mT  # (V, S, B, K): the projections
        t_T = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
        angle = x.unsqueeze(-1) * t_T
        sums = torch.stack((angle.cos().sum(-3), angle.sin().sum(-3)))  # (2, V, S, K, T)
        real, imaginary = sum_over_ranks(sums, gather) / n
        normal_T = (-t_T.square() / 2).exp()  # the characteristic function of N(0, 1), which is also the weight
        distance = (real - normal_T).square() + imaginary.square()
        # The integrand is even: twice the integral from 0.
        statistic = 2 * n * torch.trapezoid(distance * normal_T, dx=t_max / (knots - 1))
        return invariance, statistic.mean()
