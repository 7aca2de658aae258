"""Ranks, process groups and collectives: the only file of the project that calls torch.distributed.

torchrun starts the processes of a run. Rank 0 is the main process, which writes all files. Without torchrun there is
one process, and every function below works without a process group.

There are two groups. The default group (NCCL on GPUs, gloo on CPUs) carries gradients and statistics. The control group
(always gloo) carries values of the host, so that no call waits for a device. Its timeout is one day, because the other
ranks wait in it while the main process evaluates a probe.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastssl.common.errors import Stopped, UserError
from fastssl.common.terminal import numbered_steps, progress

Value = TypeVar("Value")

_control: dist.ProcessGroup | None = None


# Ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def main_progress(title: str, total: int | None, unit: str = "images") -> AbstractContextManager[Callable[..., None]]:
    """Show progress in the main process only."""
    return progress(title, total, unit) if is_main_process() else nullcontext(lambda *_: None)


def main_steps(title: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
    """Show in the main process only which of several steps is being done."""
    return numbered_steps(title, total) if is_main_process() else nullcontext(lambda _: None)


def spans_hosts() -> bool:
    """Return whether the processes run on several hosts, as torchrun says."""
    return world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


class Node(NamedTuple):
    """The processes that one torchrun has started: usually those of one host."""

    number: int  # among the nodes; another start may number them otherwise
    process: int  # this process among those of the node
    processes: int  # of the node


def own_node() -> Node:
    """Return the node of this process, as torchrun says."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    number = int(os.environ.get("GROUP_RANK", rank() // processes))
    return Node(number, int(os.environ.get("LOCAL_RANK", rank() % processes)), processes)


# Process groups


@contextmanager
def joined_processes(device: torch.device) -> Iterator[torch.device]:
    """Join the process group of torchrun's processes, and leave it at the end. Yields the device of this process.

    Raises:
        UserError: if there are fewer GPUs than processes on this host, or WORLD_SIZE is set without RANK.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"This host has {torch.cuda.device_count()} GPUs, fewer than the processes that torchrun started here",
                hint="lower --nproc-per-node",
            )
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not RANK", hint="start several processes with torchrun")
    store, own_rank, world = next(dist.rendezvous("env://"))
    store = unused_store(store, own_rank, world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=world)
    global _control
    _control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    try:
        yield device
    except Stopped:  # raised on all ranks together; after any other error, destroying the group could block forever
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def unused_store(store: dist.Store, own_rank: int, world: int) -> dist.PrefixStore:
    """Return a view of torchrun's store with a key prefix that no earlier start of the processes has used.

    torchrun keeps its store when it restarts the processes (torch 2.15). The store then still holds the addresses of
    the old processes, and a rank that reads such an address before it is overwritten fails to connect. torchrun's
    restart count cannot be the prefix, because every host counts its own restarts. So rank 0 draws a random prefix at
    each start:

    1. Every other rank writes a random token to `fastssl/request/RANK` and waits for the key `fastssl/reply/TOKEN`.
    2. Rank 0 answers each request with the prefix. A request of an old process gets a reply that nobody reads.
    3. Every rank that has read the prefix increments `PREFIX/joined`. Rank 0 returns when all have.

    Raises:
        TimeoutError: on rank 0, if a rank has not joined within the store's timeout.
    """
    if own_rank > 0:
        token = uuid4().hex
        store.set(f"fastssl/request/{own_rank}", token)
        prefix = store.get(f"fastssl/reply/{token}").decode()  # blocks until rank 0 has set it
        store.add(f"{prefix}/joined", 1)
        return dist.PrefixStore(prefix, store)
    prefix = uuid4().hex
    timeout: timedelta = store.timeout  # type: ignore[attr-defined]  # missing from torch's stubs
    deadline = time.monotonic() + timeout.total_seconds()
    while store.add(f"{prefix}/joined", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"fastssl/request/{other}"]):
                token = store.get(f"fastssl/request/{other}").decode()
                store.set(f"fastssl/reply/{token}", prefix)
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not all of {world} processes have joined within {timeout}.")
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


# Values on the host, and tensors without gradient


def broadcast_from_main(make: Callable[[], Value]) -> Value:
    """Call `make` in the main process and return its result, a plain Python value, on every rank.

    Raises:
        UserError: on every rank, if `make` raises one.
    """
    if not dist.is_initialized():
        return make()
    box: list[object] = [None]
    if is_main_process():
        try:
            box[0] = make()
        except UserError as error:
            box[0] = error
    dist.broadcast_object_list(box, group=_control)
    if isinstance(box[0], UserError):
        raise box[0]
    return cast(Value, box[0])


def on_all_ranks(make: Callable[[], Value]) -> Value:
    """Call `make` on every rank, and return each rank's own result when all have one.

    Raises:
        UserError: on every rank, if `make` raises one on any of them: the one of the first such rank.
    """
    if not dist.is_initialized():
        return make()
    error: UserError | None = None
    try:
        value = make()
    except UserError as raised:
        error = raised
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=_control)
    if first := next((each for each in errors if each), None):
        raise error or first
    return value


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on at least one rank. Ranks wait for each other here, but not for their GPUs."""
    return any_rank_each([flag])[0]


def any_rank_each(flags: list[bool]) -> list[bool]:
    """The same for each of several flags, in one message."""
    if not dist.is_initialized():
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=_control)
    return raised.bool().tolist()


def all_gather_values(values_N: Tensor) -> Tensor:
    """Return (world, N): the values of every rank, on every rank."""
    if not dist.is_initialized():
        return values_N[None]
    rows = [torch.empty_like(values_N) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values_N, group=None if values_N.is_cuda else _control)
    return torch.stack(rows)


def all_reduce_max(x: Tensor) -> Tensor:
    """Replace x by its elementwise maximum over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Replace x (contiguous) by its sum over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def combine(names: list[str], values_KN: Tensor) -> Tensor:
    """Reduce K copies of N metrics to (N,): sigma_min by the minimum, sigma_max by the maximum, others by the mean."""
    if len(values_KN) == 1:  # the usual case, at every step
        return values_KN[0]
    kinds = {"min": torch.amin, "max": torch.amax}
    kind_N = [next((kinds[part] for part in name.split("_") if part in kinds), torch.mean) for name in names]
    return torch.stack([kind(values_KN[:, n], 0) for n, kind in enumerate(kind_N)])


# Tensors with gradients, for the losses. `gather` is the recipe's objective.gather: None or True for statistics over
# the batches of all ranks, False for this rank's batch alone.


def is_global(gather: bool | None) -> bool:
    """Return whether statistics span several ranks."""
    return gather is not False and world_size() > 1


def rank_of(gather: bool | None) -> int:
    """Return which slice of the result of `gather_rows` is this rank's own."""
    return rank() if is_global(gather) else 0


def sum_over_ranks(x: Tensor, gather: bool | None) -> Tensor:
    """Return the sum of x over all ranks."""
    return _AllReduceSum.apply(x) if is_global(gather) else x


def mean_over_ranks(x: Tensor, gather: bool | None) -> Tensor:
    """Return the mean of x over all ranks."""
    return _AllReduceSum.apply(x) / world_size() if is_global(gather) else x


def gather_rows(x: Tensor, gather: bool | None) -> Tensor:
    """Concatenate the rows of all ranks in rank order: (..., B, D) -> (..., world * B, D)."""
    return _AllGatherRows.apply(x) if is_global(gather) else x


def count_rows(x: Tensor, gather: bool | None) -> int:
    """Return the number of samples (dimension -2) of x over all ranks.

    Raises:
        ValueError: on every rank, if the ranks' batches differ in size. Under torch.compile and on a GPU, where the
            host does not wait for the result, a device assertion with the same message fails instead.
    """
    batch = x.shape[-2]
    if not is_global(gather):
        return batch
    world = world_size()
    # The sizes are equal if and only if their mean square is the square of their mean: one sum tells every rank.
    moments = torch.stack([x.new_full((), batch, dtype=torch.float64), x.new_full((), batch**2, dtype=torch.float64)])
    total, squares = sum_over_ranks(moments, gather)
    equal = squares * world == total.square()
    message = "All processes need batches of one size: drop the last batch."
    if x.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(equal, message)
    elif not equal:
        raise ValueError(message)
    return batch * world


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. The gradient is the sum over ranks of the gradients.

    torch.distributed.nn.functional.all_reduce does the same, but is deprecated and cannot be compiled. Gradients may
    arrive non-contiguous or expanded, and gloo then permutes or overwrites them without an error: both directions work
    on a contiguous copy.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


class _AllGatherRows(torch.autograd.Function):
    """Concatenation over ranks along dimension -2. The gradient of a row is the sum of all ranks' gradients for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        batch = grad.shape[-2] // dist.get_world_size()
        return _AllReduceSum.apply(grad).narrow(-2, dist.get_rank() * batch, batch)
