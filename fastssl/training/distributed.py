"""One process or many: torchrun's processes, and what they have to agree on. The first one (rank 0) writes.

A value on the CPU travels by gloo and never waits for a device.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from fastssl.recipe import UserError

Value = TypeVar("Value")


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # at a good end only: behind an error it might wait for the others for ever


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
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    value, mistake = box
    if mistake:
        raise UserError(mistake)
    return value


def any_process(flag: bool) -> bool:
    """Whether the flag is up in one process at least; all of them wait for each other here, but not for their GPUs."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
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
    dist.all_gather(rows, values_N)
    return torch.stack(rows)
