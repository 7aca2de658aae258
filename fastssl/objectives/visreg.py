"""VISReg (arXiv 2606.02572): views agree, every feature varies, and random projections are distributed normally."""

import math

import torch
from torch import Tensor

from fastssl.common.distributed import count_rows, gather_rows, rank_of, sum_over_ranks
from fastssl.models import ViewOutput
from fastssl.objectives.batch import distance_from_mean_view, random_directions, require_two, stack_views
from fastssl.recipe import VISRegConfig

SMALLEST_STD = 1e-6  # of a feature; below it no gradient flows through the deviation, as in the authors' code


def visreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    slices: int = 4096,
    lambd: float = 0.9,
    scale: float = 1.0,
    shape: float = 1.0,
    center: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    gather: bool | None = None,
) -> Tensor:
    """(1 - lambd) * invariance + lambd * (scale + shape + center terms), a scalar >= 0.

    All terms are means over both views. Invariance is the mean squared distance of the views from their mean; center is
    the mean square of the features' means, and scale that of (standard deviation - 1). Shape is the squared
    2-Wasserstein distance from N(0, 1), averaged over random directions, of the projections of the centered embeddings
    divided by their deviation: the mean square of sorted projections minus normal quantiles at i / (n + 1). No gradient
    flows through that deviation. Computed in fp32 under any autocast; fp64 stays fp64.

    Args:
        z1, z2: (B, D), or (S, B, D) for S Monte Carlo draws; the loss is then the mean of the draws' losses, all with
            the same directions.
        slices: the number of directions, uniform on the unit sphere.
        lambd: the weight of the three terms of the distribution, from 0 to 1. The authors take 0.6 for small data sets.
        scale, shape, center: weights of these terms among each other.
        seed, step: the directions are a function of both: pass the number of the training step.
        gather: None for statistics over all processes wherever torch.distributed runs, False for this process alone.

    Raises:
        ValueError: if the shapes differ, or the batch over all processes has fewer than 2 samples.
    """
    directions_KD = random_directions(seed, step, slices, z1)
    invariance, deviation, distribution, mean = unweighted_terms(z1, z2, directions_KD, gather)
    return (1 - lambd) * invariance + lambd * (scale * deviation + shape * distribution + center * mean)


def visreg_terms(views: tuple[ViewOutput, ...], config: VISRegConfig, directions_KD: Tensor) -> dict[str, Tensor]:
    """The loss's weighted terms for training."""
    first, second = views
    invariance, scale, shape, center = unweighted_terms(first.z, second.z, directions_KD, config.gather)
    return {
        "invariance": (1 - config.lambd) * invariance,
        "scale": config.lambd * config.scale * scale,
        "shape": config.lambd * config.shape * shape,
        "center": config.lambd * config.center * center,
    }


def unweighted_terms(
    z1: Tensor, z2: Tensor, directions_KD: Tensor, gather: bool | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Invariance, scale, shape and center term, each a mean over S draws."""
    z = stack_views(z1, z2)  # z_VSBD, or z_VBD: every line below holds for both
    n = require_two(count_rows(z, gather))
    with torch.autocast(z.device.type, enabled=False):
        invariance = distance_from_mean_view(z, n, gather)

        mean = sum_over_ranks(z.sum(-2, keepdim=True), gather) / n
        zc = z - mean
        variance = sum_over_ranks(zc.square().sum(-2, keepdim=True), gather) / n
        std = variance.clamp_min(SMALLEST_STD**2).sqrt()

        zn = gather_rows(zc / std.detach(), gather)  # (V, S, n, D): sorting needs all samples
        # So each process takes its share of the directions. Sorted along the last dimension, which is contiguous.
        mine_KD = directions_KD.tensor_split(n // z.shape[-2])[rank_of(gather)].to(z.dtype)
        ordered = (mine_KD @ zn.mT).sort(dim=-1).values  # (V, S, K, n)
        probability_n = torch.arange(1, n + 1, dtype=torch.float64, device=z.device) / (n + 1)
        quantile_n = math.sqrt(2) * torch.erfinv(2 * probability_n - 1)
        squares = (ordered - quantile_n.to(z.dtype)).square().sum((-2, -1))  # (V, S)
        shape = sum_over_ranks(squares, gather) / (len(directions_KD) * n)
        return invariance, (std - 1).square().mean(), shape.mean(), mean.square().mean()
