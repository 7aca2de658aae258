"""One process or many: torchrun's processes, and what they have to agree on. The first one (rank 0) writes.

A value on the CPU travels by gloo and never waits for a device.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.common.errors import Stopped, UserError

Value = TypeVar("Value")


_control: dist.ProcessGroup | None = None  # of the CPUs; it waits for hours, as a probe in the first process may take


@contextmanager
def joined_processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started beside this one, and leave them at the end. Gives this one's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"This host has {torch.cuda.device_count()} GPUs, fewer than the processes that torchrun started here: "
                "lower --nproc-per-node."
            )
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not RANK: start several processes with torchrun.")
    store, rank, world = fresh_store()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    global _control
    _control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield device
    except Stopped:  # all processes end here together; behind another error, leaving might wait for the others for ever
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def fresh_store() -> tuple[dist.Store, int, int]:
    """torchrun's store under a prefix that no earlier start of its processes has used, this one's rank, and how many.

    torchrun keeps its store over a restart (torch 2.15), and in it the addresses of processes that are gone: whoever
    reads one before it is replaced fails to connect. Its restart count would be no prefix, as every host counts for
    itself. So the first process makes up a name, and answers with it whoever asks by a number of its own.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if rank > 0:
        question = uuid4().hex
        store.set(f"fastssl/question/{rank}", question)
        name = store.get(f"fastssl/answer/{question}").decode()  # waits for it
        store.add(f"{name}/joined", 1)
        return dist.PrefixStore(name, store), rank, world
    name, deadline = uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    while store.add(f"{name}/joined", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"fastssl/question/{other}"]):  # perhaps that of a process that is gone: no matter
                store.set(f"fastssl/answer/{store.get(f'fastssl/question/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not all of {world} processes have come within {store.timeout}.")
        time.sleep(0.02)
    return dist.PrefixStore(name, store), rank, world


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def broadcast_from_main(make: Callable[[], Value]) -> Value:
    """What `make` returns in the first process, a plain Python value, on all of them; its UserError too."""
    if not dist.is_initialized():
        return make()
    value = mistake = None
    if is_main_process():
        try:
            value = make()
        except UserError as error:
            mistake = str(error)
    box = [value, mistake]
    dist.broadcast_object_list(box, group=_control)
    value, mistake = box
    if mistake:
        raise UserError(mistake)
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is up in one process at least; all of them wait for each other here, but not for their GPUs."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=_control)
    return bool(raised)


def combine(names: list[str], values_KN: torch.Tensor) -> torch.Tensor:
    """K copies of N figures as one (N,): of sigma_min and sigma_max the least and the largest, of others the mean."""
    if len(values_KN) == 1:  # the usual case, at every step
        return values_KN[0]
    kinds = {"min": torch.amin, "max": torch.amax}
    kind_N = [next((kinds[part] for part in name.split("_") if part in kinds), torch.mean) for name in names]
    return torch.stack([kind(values_KN[:, n], 0) for n, kind in enumerate(kind_N)])


def all_gather_values(values_N: torch.Tensor) -> torch.Tensor:
    """(world, N): every process's figures, on all of them."""
    if not dist.is_initialized():
        return values_N[None]
    rows = [torch.empty_like(values_N) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values_N, group=None if values_N.is_cuda else _control)
    return torch.stack(rows)


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
