"""Distances of images to the training images: Mahalanobis distance to a Gaussian, and distance to the k-th neighbor."""

from typing import NamedTuple

import torch
from torch import Tensor

# Relative to the mean variance. With 1e-13, eigenvalues from 1 to 1e-11 gave relative Mahalanobis distances whose AUROC
# was off by 0.005; with 1e-14, by 0.0005. With less, the rounding of float32 features would count as variance.
RIDGE = 1e-14
SMALLEST_VARIANCE = 1e-24  # relative to the mean square; anything smaller is rounding
CHUNK_ELEMENTS = 1 << 24  # distances held at a time: 128 MiB of float64


class Gaussian(NamedTuple):
    """A normal distribution over D dimensions."""

    mean_D: Tensor
    factor_DD: Tensor  # lower Cholesky factor of the covariance

    def whiten(self, x_MD: Tensor) -> Tensor:
        """Return coordinates (M, D) in which the distribution is standard normal."""
        return torch.linalg.solve_triangular(self.factor_DD, (x_MD - self.mean_D).T, upper=False).T

    def distance(self, x_MD: Tensor) -> Tensor:
        """Return the squared Mahalanobis distances (M,)."""
        return self.whiten(x_MD).square().sum(dim=1)


def fit_gaussian(x_ND: Tensor, deviation_ND: Tensor | None = None) -> Gaussian:
    """Fit the mean of x and the covariance (divided by N) of `deviation_ND`, by default the deviations from that mean.

    A ridge of 1e-14 of the mean variance is added to the covariance, and made ten times larger until the covariance has
    a Cholesky factor. So directions without variance (dead features, fewer samples than dimensions) give large
    distances, not undefined ones, and a covariance with condition number 1e11 stays accurate, which float32 or an
    absolute ridge of 1e-6 would not preserve.

    Raises:
        ValueError: if the features are constant, or too large for float64.
    """
    mean_D = x_ND.mean(dim=0)
    if deviation_ND is None:
        deviation_ND = x_ND - mean_D
    covariance_DD = deviation_ND.T @ deviation_ND / len(x_ND)
    variance = covariance_DD.diagonal().mean()
    if not torch.isfinite(variance) or variance <= SMALLEST_VARIANCE * x_ND.square().mean():
        raise ValueError("The features are constant or too large: no covariance can be computed.")
    identity_DD = torch.eye(len(mean_D), dtype=x_ND.dtype, device=x_ND.device)
    ridge = RIDGE
    while ridge <= 1:
        factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD + ridge * variance * identity_DD)
        if not failed:
            return Gaussian(mean_D, factor_DD)
        ridge *= 10
    raise ValueError("The covariance of the features cannot be inverted.")


def kth_smallest(query_MK: Tensor, bank_NK: Tensor, offset_N: Tensor, k: int) -> Tensor:
    """Return (M,): for each query, the k-th smallest over the bank of `query . bank + offset`, or the largest if k > N.

    Euclidean, cosine and KL distances can all be written as such a product, up to a constant per query.
    """
    k = min(k, len(bank_NK))
    chunks = query_MK.split(max(1, CHUNK_ELEMENTS // len(bank_NK)))
    return torch.cat([torch.addmm(offset_N, chunk, bank_NK.T).kthvalue(k, dim=1).values for chunk in chunks])
