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

from fastssl.recipe import UserError

from .signals import Stopped

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


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` returns in the first process, a plain Python value, on all of them; its UserError too."""
    if not dist.is_initialized():
        return make()
    value = mistake = None
    if is_first():
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


def any_process(flag: bool) -> bool:
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


def of_all_processes(values_N: torch.Tensor) -> torch.Tensor:
    """(world, N): every process's figures, on all of them."""
    if not dist.is_initialized():
        return values_N[None]
    rows = [torch.empty_like(values_N) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values_N, group=None if values_N.is_cuda else _control)
    return torch.stack(rows)
