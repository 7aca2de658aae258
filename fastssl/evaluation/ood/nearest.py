"""The k-th nearest training image by some distance, every image compared with every one, as matrix products."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # distances held at a time: 128 MiB of float64
CANDIDATES = 32  # of kth_bhattacharyya, beyond the k asked for
TOLERANCE = 1e-6  # of the expansion in kth_bhattacharyya, relative
MOST_TERMS = 40  # sigma anywhere from 0.01 to 5 takes 28


def kth_smallest(query_MK: Tensor, bank_NK: Tensor, offset_N: Tensor, k: int) -> Tensor:
    """(M,): for each query, the k-th smallest over the bank of query . bank + offset."""
    rows = max(1, CHUNK_ELEMENTS // len(bank_NK))
    return _kth(lambda part: torch.addmm(offset_N, query_MK[part], bank_NK.T), len(query_MK), rows, len(bank_NK), k)


def _kth(distances: Callable[[slice], Tensor], queries: int, rows: int, bank: int, k: int) -> Tensor:
    """distances: of so many rows of the queries at a time, (B, N). A k above N is shortened to it."""
    parts = [slice(first, first + rows) for first in range(0, queries, rows)]
    return torch.cat([distances(part).kthvalue(min(k, bank), dim=1).values for part in parts])


def kth_kl(mu_ME: Tensor, sigma_ME: Tensor, mu_NE: Tensor, sigma_NE: Tensor, k: int) -> Tensor:
    """(M,): the k-th smallest KL(query || bank) of Gaussians with diagonal covariance.

    1/2 sum ((sigma^2 + (mu - mu')^2) / sigma'^2 + log(sigma'^2 / sigma^2) - 1): multiplied out, one product.
    """
    centre_E = mu_NE.mean(dim=0)  # the distance stays, and less cancels
    mu_ME, mu_NE = mu_ME - centre_E, mu_NE - centre_E
    precision_NE = sigma_NE**-2
    query_MK = torch.cat([sigma_ME**2 + mu_ME**2, mu_ME], dim=1)
    bank_NK = torch.cat([precision_NE, -2 * mu_NE * precision_NE], dim=1)
    offset_N = (mu_NE**2 * precision_NE).sum(dim=1) + 2 * sigma_NE.log().sum(dim=1)
    return 0.5 * (kth_smallest(query_MK, bank_NK, offset_N, k) - 2 * sigma_ME.log().sum(dim=1) - mu_ME.shape[1])


def kth_bhattacharyya(mu_ME: Tensor, sigma_ME: Tensor, mu_NE: Tensor, sigma_NE: Tensor, k: int) -> Tensor:
    """(M,): the k-th smallest Bhattacharyya distance between Gaussians with diagonal covariance.

    With s = sigma^2 + sigma'^2: sum of (mu - mu')^2 / (4 s) + 1/2 log(s / (2 sigma sigma')). Both sides meet in s, so
    it is no product as it stands. But 1/s and log(s) are smooth in the query's log variance (the nearest singularity is
    pi away from the real axis), so in each dimension a few Chebyshev polynomials of it give their values to 1e-6, with
    coefficients that depend on the bank alone: a product for each, in float32. Where sigma is small beside mu these
    products cancel to 1 %, so they only pick the k + 32 nearest, whose distances are then computed as written.
    """
    centre_E = mu_NE.mean(dim=0)
    mu_ME, mu_NE = mu_ME - centre_E, mu_NE - centre_E
    log_var_ME = 2 * sigma_ME.log()
    low_E, high_E = log_var_ME.amin(dim=0), log_var_ME.amax(dim=0)
    middle_E, half_E = (high_E + low_E) / 2, ((high_E - low_E) / 2).clamp(min=1e-6)
    terms = _terms(half_E.max().item())

    node_R = math.pi * (torch.arange(terms, dtype=mu_ME.dtype, device=mu_ME.device) + 0.5) / terms
    s_RNE = (middle_E + half_E * node_R.cos()[:, None, None]).exp() + sigma_NE**2
    angle_ME = ((log_var_ME - middle_E) / half_E).clamp(-1, 1).acos()
    log_M, log_N = log_var_ME.sum(dim=1), 2 * sigma_NE.log().sum(dim=1)

    banks = []
    for r in range(terms):
        weight_R = (1 if r == 0 else 2) / terms * (r * node_R).cos()
        quarter_NE = torch.einsum("r,rne->ne", weight_R, 0.25 / s_RNE)
        log_s_NE = torch.einsum("r,rne->ne", weight_R, 0.5 * (s_RNE / 2).log())
        bank_NK = torch.cat([quarter_NE, -2 * mu_NE * quarter_NE, mu_NE**2 * quarter_NE + log_s_NE], dim=1)
        banks.append(bank_NK.float())

    def distances(part: slice) -> Tensor:
        total_BN = -0.25 * (log_M[part, None] + log_N)
        mu_BE, angle_BE = mu_ME[part].float(), angle_ME[part].float()
        for r, bank_NK in enumerate(banks):
            polynomial_BE = (r * angle_BE).cos()
            query_BK = torch.cat([polynomial_BE * mu_BE**2, polynomial_BE * mu_BE, polynomial_BE], dim=1)
            total_BN += query_BK @ bank_NK.T
        near_BC = total_BN.topk(min(k + CANDIDATES, len(mu_NE)), dim=1, largest=False).indices
        difference_BCE = mu_ME[part, None] - mu_NE[near_BC]
        s_BCE = sigma_ME[part, None] ** 2 + sigma_NE[near_BC] ** 2
        exact_BC = (0.25 * difference_BCE.square() / s_BCE + 0.5 * (s_BCE / 2).log()).sum(dim=2)
        return exact_BC - 0.25 * (log_M[part, None] + log_N[near_BC])

    rows = max(1, CHUNK_ELEMENTS // max(len(mu_NE), (k + CANDIDATES) * mu_ME.shape[1]))
    return _kth(distances, len(mu_ME), rows, len(mu_NE), k)


def _terms(half: float) -> int:
    """Chebyshev polynomials that reach the tolerance on an interval of that half length, the singularity pi away."""
    rate = math.pi / half + math.hypot(1, math.pi / half)  # of the Bernstein ellipse
    return min(MOST_TERMS, max(2, math.ceil(-math.log(TOLERANCE) / math.log(rate))))
