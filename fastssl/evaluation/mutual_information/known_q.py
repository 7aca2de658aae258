"""Bounds of I(X; Z) for a stochastic embedding q(z|x) = N(mu(x), diag sigma(x)^2), which is known: nothing is trained.

Poole et al., arXiv 1905.06922: of K images and one draw z_i for each, InfoNCE with the true conditional as its critic
(section 2.3, there equation 10) is below, the leave-one-out bound (equation 13) above:

    E 1/K sum_i log q(z_i|x_i) / [1/K sum_j q(z_i|x_j)]  <=  I(X; Z)  <=
    E 1/K sum_i log q(z_i|x_i) / [1/(K-1) sum_{j != i} q(z_i|x_j)]

The lower one cannot exceed log K. The upper one is finite always, and far above I where no q(.|x_j) covers the others'
draws. The rate E KL(q(z|x) || p) is I + KL(q(z) || p), so above I too, whatever the prior p.
"""

import math
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastssl.evaluation.arrays import as_tensor
from fastssl.models.gaussian import LOG_2PI, DiagonalGaussian, StandardNormal

BATCH = 10_000  # K by default: 10,000 x 1,024 dimensions take 0.4 TFLOP of float64
CHUNK_ROWS = 512  # draws that are compared at a time: 40 MB of float64 at K = 10,000


class Sandwich(NamedTuple):
    """Bounds of I(X; Z) in nats."""

    lower: float
    upper: float
    ceiling: float  # of the lower one, log K
    batch: int  # K
    saturated: bool  # the lower one is within 0.1 nats of its ceiling: I is as large, or larger


@torch.inference_mode()
def sandwich(
    mu: ArrayLike | Tensor,
    sigma: ArrayLike | Tensor,
    draw: ArrayLike | Tensor,
    *,
    batch: int = BATCH,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sandwich:
    """Lower and upper bound of I(X; Z) from mu, sigma and one draw of z for each image, all (N, D).

    Means over groups of K = min(batch, N) images, drawn at random; up to K - 1 images are left out. float64, the time
    grows with N K D, memory with N D.
    """
    mu_ND, sigma_ND, z_ND = (as_tensor(x).to(device).double() for x in (mu, sigma, draw))
    if not mu_ND.shape == sigma_ND.shape == z_ND.shape or mu_ND.ndim != 2:
        raise ValueError(f"mu, sigma and draws are (N, D), not {[tuple(x.shape) for x in (mu_ND, sigma_ND, z_ND)]}.")
    if not (mu_ND.isfinite().all() and z_ND.isfinite().all() and sigma_ND.isfinite().all() and (sigma_ND > 0).all()):
        raise ValueError("mu, sigma or draws are not finite, or a sigma is not positive.")
    count = min(batch, len(mu_ND))
    if count < 2:
        raise ValueError("Bounds of mutual information need two images at least.")
    order = torch.randperm(len(mu_ND), generator=torch.Generator().manual_seed(seed)).to(mu_ND.device)
    groups = [rows for rows in order.split(count) if len(rows) == count]
    lower, upper = [], []
    for rows in groups:
        z_KD, (precision_KD, scaled_KD, constant_K) = z_ND[rows], densities(mu_ND[rows], sigma_ND[rows])
        own, all_of_them, others = [], [], []
        for part in range(0, count, CHUNK_ROWS):
            z_RD = z_KD[part : part + CHUNK_ROWS]
            log_q_RK = -0.5 * (z_RD.square() @ precision_KD.T - 2 * z_RD @ scaled_KD.T + constant_K)
            place_R = torch.arange(len(log_q_RK), device=log_q_RK.device)
            own.append(log_q_RK[place_R, part + place_R].clone())
            all_of_them.append(log_q_RK.logsumexp(dim=1) - math.log(count))
            log_q_RK[place_R, part + place_R] = -math.inf
            others.append(log_q_RK.logsumexp(dim=1) - math.log(count - 1))
        own, all_of_them, others = (torch.cat(x) for x in (own, all_of_them, others))
        lower.append((own - all_of_them).mean().item())
        upper.append((own - others).mean().item())
    lower, upper, ceiling = sum(lower) / len(groups), sum(upper) / len(groups), math.log(count)
    return Sandwich(lower, upper, ceiling, count, lower > ceiling - 0.1)


def densities(mu_KD: Tensor, sigma_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What makes log N(z; mu_k, diag sigma_k^2) a sum of two products: -1/2 (z^2 . first - 2 z . second + third).

    The square is multiplied out: its parts reach D (mu / sigma)^2, 4e9 at the heads' limits, and in float64 the result
    is good to 1e-6 still.
    """
    precision_KD = sigma_KD.square().reciprocal()
    constant_K = (mu_KD.square() * precision_KD + 2 * sigma_KD.log() + LOG_2PI).sum(dim=1)
    return precision_KD, mu_KD * precision_KD, constant_K


@torch.inference_mode()
def rate(mu: ArrayLike | Tensor, sigma: ArrayLike | Tensor, prior: nn.Module, draw: ArrayLike | Tensor) -> float:
    """E KL(q(z|x) || p) in nats: closed for a standard normal prior, else by one draw for each image."""
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    method = "closed" if isinstance(prior, StandardNormal) else "mc"
    total, images = 0.0, len(mu)
    for first in range(0, images, CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        mu_BD, sigma_BD, z_BD = (as_tensor(x[part]).to(device).double() for x in (mu, sigma, draw))
        q = DiagonalGaussian(mu_BD, 2 * sigma_BD.log())
        total += q.kl_to(prior, method, samples=z_BD[None]).sum().item()
    return total / images
