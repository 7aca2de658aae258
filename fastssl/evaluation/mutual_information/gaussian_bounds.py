"""Bounds of I(X; Z) for a stochastic embedding, whose q(z|x) = N(mu(x), diag(sigma(x)^2)) is known: no training.

Poole et al., arXiv 1905.06922: for K images with one draw z_i each, InfoNCE with the true conditional as its critic
(section 2.3, equation 10) is a lower bound, and the leave-one-out bound (equation 13) an upper bound:

    E 1/K sum_i log q(z_i|x_i) / [1/K sum_j q(z_i|x_j)]  <=  I(X; Z)  <=
    E 1/K sum_i log q(z_i|x_i) / [1/(K-1) sum_{j != i} q(z_i|x_j)]

The lower bound cannot exceed log K. The upper bound is always finite, but far above I(X; Z) where no q(.|x_j) covers
the draws of other images. The rate E KL(q(z|x) || p) = I(X; Z) + KL(q(z) || p) is an upper bound for any prior p.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastssl.evaluation.arrays import Array, Device, as_tensor
from fastssl.models.gaussian import LOG_2PI, DiagonalGaussian, Prior, StandardNormal

BATCH = 10_000  # default K: 10,000 images with 1,024 dimensions take 0.4 TFLOP of float64
CHUNK_ROWS = 512  # draws whose densities are held at a time: 40 MB of float64 for K = 10,000


class PosteriorBounds(NamedTuple):
    """Bounds of I(X; Z) in nats."""

    lower: float
    upper: float
    ceiling: float  # largest possible lower bound, log K
    batch: int  # K
    saturated: bool  # the lower bound is within 0.1 nats of its ceiling: I(X; Z) may be larger


@torch.inference_mode()
def posterior_bounds(
    mu: Array, sigma: Array, draw: Array, *, batch: int = BATCH, seed: int = 0, device: Device = "cpu"
) -> PosteriorBounds:
    """Compute bounds of I(X; Z) from mu, sigma and one draw of z for each image, all (N, D).

    The bounds are means over random groups of K = min(batch, N) images; up to K - 1 images are ignored. They are
    computed in float64, in time proportional to N K D.

    Raises:
        ValueError: if shapes do not match, values are not finite, a sigma is not positive, or N is below 2.
    """
    mu_ND, sigma_ND, z_ND = (as_tensor(x).to(device).double() for x in (mu, sigma, draw))
    if not mu_ND.shape == sigma_ND.shape == z_ND.shape or mu_ND.ndim != 2:
        shapes = [tuple(x.shape) for x in (mu_ND, sigma_ND, z_ND)]
        raise ValueError(f"mu, sigma and draw must all have the same shape (N, D), not {shapes}.")
    if not (mu_ND.isfinite().all() and z_ND.isfinite().all() and sigma_ND.isfinite().all() and (sigma_ND > 0).all()):
        raise ValueError("mu, sigma and draw must be finite, and sigma positive.")
    count = min(batch, len(mu_ND))
    if count < 2:
        raise ValueError("Bounds of mutual information need at least two images.")
    order = torch.randperm(len(mu_ND), generator=torch.Generator().manual_seed(seed)).to(mu_ND.device)
    groups = [rows for rows in order.split(count) if len(rows) == count]
    lower_sum = upper_sum = 0.0
    for rows in groups:
        lower, upper = [], []
        for chunk, log_q_RK in enumerate(log_densities(z_ND[rows], mu_ND[rows], sigma_ND[rows])):
            own_R = log_q_RK.diagonal(chunk * CHUNK_ROWS).clone()
            lower.append(own_R - (log_q_RK.logsumexp(dim=1) - math.log(count)))
            log_q_RK.diagonal(chunk * CHUNK_ROWS).fill_(-math.inf)
            upper.append(own_R - (log_q_RK.logsumexp(dim=1) - math.log(count - 1)))
        lower_sum += torch.cat(lower).mean().item()
        upper_sum += torch.cat(upper).mean().item()
    mean = lower_sum / len(groups)
    ceiling = math.log(count)
    return PosteriorBounds(mean, upper_sum / len(groups), ceiling, count, mean > ceiling - 0.1)


def log_densities(z_KD: Tensor, mu_KD: Tensor, sigma_KD: Tensor) -> Iterator[Tensor]:
    """Yield the log densities (R, K) of each z under each Gaussian, in chunks of `CHUNK_ROWS`.

    The square is expanded, so that they are two matrix products: -1/2 (z^2 . precision - 2 z . scaled_mean + constant).
    The terms reach D (mu / sigma)^2, which is 4e9 at the limits of the heads; in float64 the result is exact to 1e-6.
    """
    precision_KD = sigma_KD.square().reciprocal()
    scaled_mean_KD = mu_KD * precision_KD
    constant_K = (mu_KD.square() * precision_KD + 2 * sigma_KD.log() + LOG_2PI).sum(dim=1)
    for z_RD in z_KD.split(CHUNK_ROWS):
        yield -0.5 * (z_RD.square() @ precision_KD.T - 2 * z_RD @ scaled_mean_KD.T + constant_K)


@torch.inference_mode()
def rate(mu: Array, sigma: Array, prior: Prior, draw: Array) -> float:
    """Return E KL(q(z|x) || p) in nats: in closed form for a standard normal prior, else from one draw per image."""
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    mu_ND, sigma_ND, z_ND = (as_tensor(x) for x in (mu, sigma, draw))
    total = 0.0
    for first in range(0, len(mu_ND), CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        mu_BD, sigma_BD, z_BD = (x[part].to(device).double() for x in (mu_ND, sigma_ND, z_ND))
        q = DiagonalGaussian(mu_BD, 2 * sigma_BD.log())
        method: Literal["closed", "mc"] = "closed" if isinstance(prior, StandardNormal) else "mc"
        total += q.kl_to(prior, method, samples=z_BD[None]).sum().item()
    return total / len(mu_ND)
