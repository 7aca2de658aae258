"""What the objectives share: the two views as one tensor in full precision."""

import torch
from torch import Tensor


def stack_views(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, D) or (S, B, D) twice -> z_VBD or z_VSBD, in fp32 (fp64 stays)."""
    if z1.shape != z2.shape or z1.ndim not in (2, 3):
        raise ValueError(
            "Both views' embeddings must have one shape, (B, D) or (S, B, D), "
            f"not {tuple(z1.shape)} and {tuple(z2.shape)}."
        )
    z = torch.stack((z1, z2))
    return z if z.dtype == torch.float64 else z.float()


def require_two(rows: int) -> int:
    """The number of samples that statistics are taken over, refused below 2."""
    if rows < 2:
        raise ValueError(f"Batch statistics need a batch of at least 2 samples, not {rows}.")
    return rows


def unit(z: Tensor) -> Tensor:
    """z (..., D) over its length. The length's floor of 1e-6 keeps the gradient of a zero vector finite."""
    return z * (z.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
