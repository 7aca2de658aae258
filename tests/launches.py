"""Counts the kernels that a GPU would launch for the same calls, on tensors of the CPU or without memory (meta).

By arithmetic, from torch's sources: a call launches one kernel; views and allocations none; a foreach or fused call as
many as its lists of tensors and chunks fill (`MultiTensorApply.cuh`; torch for CUDA 13 takes seven times as many per
launch as these limits), or one per tensor where its lists differ in shape or data type; `cat` and `stack` one for 128
tensors.
"""

import math
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of a launch, by the number of lists
BLOCKS, CHUNK = 320, 65536  # chunks in a launch, elements in a chunk
NO_KERNEL = (
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "set_", "alias",
    "_record_function_enter_new", "_record_function_exit",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts launches by the name of the call, in `by_call`."""

    def __init__(self) -> None:
        super().__init__()
        self.by_call: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_call.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        lists = [part for part in args if isinstance(part, list | tuple) and part and isinstance(part[0], Tensor)]
        if name.startswith("_fused"):  # the counts of steps are no list of the launches
            lists = [part for part in lists if len({x.shape for x in part} | {torch.Size()}) > 1]
        if name.startswith(("_foreach", "_fused", "_amp_foreach")):
            launches = of_lists(lists)
            self.by_call[name] += 1 + 2 * launches if name == "_foreach_norm" else launches  # zeros, sums, sums of sums
        elif name in ("cat", "stack"):
            self.by_call[name] += math.ceil(len(lists[0]) / 128)
        elif not func.is_view and name not in NO_KERNEL:
            self.by_call[name] += 1
        return func(*args, **(kwargs or {}))


def of_lists(lists: list[list[Tensor]]) -> int:
    """Launches of one call on these lists of tensors, of one length."""
    tensors = len(lists[0])
    dtypes = {part.dtype for of_kind in lists for part in of_kind if part.ndim or part.is_floating_point()}
    if len(dtypes) > 1 or any(len({part.shape for part in parts}) > 1 for parts in zip(*lists, strict=True)):
        return tensors
    chunks = sum(math.ceil(part.numel() / CHUNK) for part in lists[0])
    return max(math.ceil(tensors / TENSORS[len(lists)]), math.ceil(chunks / BLOCKS))


def launches_of(call) -> Launches:
    with Launches() as counted:
        call()
    return counted
