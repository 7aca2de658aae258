"""What the objectives share: the two views as one tensor, and sums over every process's batch.

A statistic that is written as sums over the batch (first the mean, then centred second moments)
becomes that of the global batch when each sum is all-reduced. Every rank then computes the same
loss L. The backward pass all-reduces the gradients too, so a rank holds world x dL/dz for its rows,
and DDP's average over ranks is exactly the gradient of one process on the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks of the gradients.

    torch.distributed.nn.functional.all_reduce does the same but is deprecated and refuses
    torch.compile. Gradients may arrive non-contiguous or expanded, and gloo then silently permutes
    or overwrites them: both directions work on a contiguous copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


def is_global(gather: bool | None) -> bool:
    """Whether statistics span the processes: None and True say yes where there is more than one."""
    return gather is not False and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor, gather: bool | None) -> Tensor:
    """The sum of x over all processes, or x itself where statistics are local."""
    return _AllReduceSum.apply(x) if is_global(gather) else x


def rows(z: Tensor, gather: bool | None) -> int | Tensor:
    """Number of samples (dimension -2) that the statistics are taken over, at least 2.

    Counted, not assumed: processes with unequal batches still get the global batch's statistics.
    """
    batch = z.shape[-2]
    if is_global(gather):
        return sum_over_ranks(z.new_full((), batch), gather)
    if batch < 2:
        raise ValueError(f"Batch statistics need a batch of at least 2 samples, not {batch}.")
    return batch


def stack_views(z1: Tensor, z2: Tensor) -> Tensor:
    """(B, D) or (S, B, D) twice -> z_VBD or z_VSBD, in fp32 (fp64 stays)."""
    if z1.shape != z2.shape or z1.ndim not in (2, 3):
        raise ValueError(
            "Both views' embeddings must have one shape, (B, D) or (S, B, D), "
            f"not {tuple(z1.shape)} and {tuple(z2.shape)}."
        )
    z = torch.stack((z1, z2))
    return z if z.dtype == torch.float64 else z.float()
