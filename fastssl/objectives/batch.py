"""What several objectives share: the two views as one tensor, unit vectors, directions, and products over the batch."""

import torch
from torch import Tensor

from fastssl.common.distributed import gather_rows, sum_over_ranks
from fastssl.common.randomness import DIRECTIONS, normals
from fastssl.models.gaussian import at_least_fp32


def stack_views(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, D) or (S, B, D) twice -> z_VBD or z_VSBD, in fp32 (fp64 stays). Raises ValueError for other shapes."""
    if z1.shape != z2.shape or z1.ndim not in (2, 3):
        raise ValueError(
            "Both views' embeddings must have one shape, (B, D) or (S, B, D), "
            f"not {tuple(z1.shape)} and {tuple(z2.shape)}."
        )
    return at_least_fp32(torch.stack((z1, z2)))


def require_two(rows: int) -> int:
    """`rows`, the number of samples of a statistic. Raises ValueError for fewer than 2."""
    if rows < 2:
        raise ValueError(f"Batch statistics need a batch of at least 2 samples, not {rows}.")
    return rows


def unit(z: Tensor) -> Tensor:
    """z (..., D) divided by its length. The length's floor of 1e-6 keeps the gradient of a zero vector finite."""
    return z * (z.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def distance_from_mean_view(z: Tensor, n: int, gather: bool | None) -> Tensor:
    """The mean squared distance of views z (V, ..., B, D) from their mean; of two views, a quarter of theirs.

    It is the invariance term of LeJEPA (arXiv 2511.08544) and VISReg (arXiv 2606.02572). n: B over all processes.
    """
    return (sum_over_ranks((z - z.mean(0)).square().sum(-2), gather) / n).mean()


def random_directions(seed: int, step: int | Tensor, count: int, z: Tensor) -> Tensor:
    """(K, D) in fp32: K = count unit vectors, uniform on the sphere, for embeddings z (..., D) and on their device.

    They are a function of (seed, step): equal on all processes, and again after a resume. Direction k does not depend
    on the count.
    """
    number_K = torch.arange(count, device=z.device)
    return unit(normals(seed, step, number_K, 0, 1, z.shape[-1], DIRECTIONS)[0])


def sum_of_squared_products(x: Tensor, y: Tensor, n: int, gather: bool | None) -> Tensor:
    """The squared Frobenius norm of x'y over the n rows of all processes: x, y (..., B, D) -> (...).

    ||x'y||^2 is also the sum of (xx') * (yy'), elementwise: two matrices of n x n (one if y is x) and none of D x D.
    That form is taken where it needs fewer multiplications: at n = 128 and D = 1024 a quarter of them, or an eighth.
    """
    products = 1 if y is x else 2
    if products * n >= x.shape[-1]:
        return sum_over_ranks(x.mT @ y, gather).square().sum((-2, -1))
    rows_x = x @ gather_rows(x, gather).mT
    rows_y = rows_x if y is x else y @ gather_rows(y, gather).mT
    return sum_over_ranks((rows_x * rows_y).sum((-2, -1)), gather)
