"""Sums and rows over every process's batch, with gradients.

A statistic that is written as sums over the batch (first the mean, then centred second moments) becomes that of the
global batch when each sum is all-reduced. Every rank then computes the same loss L. The backward pass all-reduces the
gradients too, so a rank holds world x dL/dz for its rows, and DDP's average over ranks is exactly the gradient of one
process on the whole batch. All processes must have batches of one size: means of means would weigh samples unequally.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_global(gather: bool | None) -> bool:
    """Whether statistics span the processes: None and True say yes where there is more than one."""
    return gather is not False and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor, gather: bool | None) -> Tensor:
    """The sum of x over all processes, or x itself where statistics are local."""
    return _AllReduceSum.apply(x) if is_global(gather) else x


def mean_over_ranks(x: Tensor, gather: bool | None) -> Tensor:
    """The mean over all processes of what each computed from its own batch."""
    return _AllReduceSum.apply(x) / dist.get_world_size() if is_global(gather) else x


def gather_rows(x: Tensor, gather: bool | None) -> Tensor:
    """x (..., B, D) -> (..., world * B, D): every process's rows in the order of the ranks."""
    return _AllGatherRows.apply(x) if is_global(gather) else x


def rank_of(gather: bool | None) -> int:
    """Which slice of `gather_rows` is this process's own."""
    return dist.get_rank() if is_global(gather) else 0


def count_rows(x: Tensor, gather: bool | None) -> int:
    """Samples (dimension -2) of x over all processes.

    Raises ValueError on every rank where the processes' batches differ (under compile or on a GPU, where the host
    does not wait for the answer, the device stops with the same sentence).
    """
    batch = x.shape[-2]
    if not is_global(gather):
        return batch
    world = dist.get_world_size()
    # Equal if and only if the mean square is the squared mean: one sum tells every rank.
    moments = torch.stack([x.new_full((), batch, dtype=torch.float64), x.new_full((), batch**2, dtype=torch.float64)])
    total, squares = sum_over_ranks(moments, gather)
    equal, sentence = squares * world == total.square(), "All processes need batches of one size: drop the last batch."
    if x.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(equal, sentence)
    elif not equal:
        raise ValueError(sentence)
    return batch * world


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks of the gradients.

    torch.distributed.nn.functional.all_reduce does the same but is deprecated and refuses torch.compile. Gradients may
    arrive non-contiguous or expanded, and gloo then silently permutes or overwrites them: both directions work on a
    contiguous copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


class _AllGatherRows(torch.autograd.Function):
    """Concatenation over ranks along dimension -2; a row's gradient is the sum of all ranks' gradients for it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        ctx.batch = x.shape[-2]
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = _AllReduceSum.apply(grad)
        return total.narrow(-2, dist.get_rank() * ctx.batch, ctx.batch)
