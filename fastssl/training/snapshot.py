"""A copy of the training state in host memory, which a thread writes to a checkpoint while training goes on."""

from copy import copy
from typing import Any, cast

import torch
from torch import Tensor

from fastssl.models.checkpoint import SavedState


class Snapshot:
    """Copies the state of one step. The next copy takes the place of the one before.

    Tensors on a GPU are copied into pinned memory, which is reused. These copies are queued in the current stream: the
    CPU does not wait for them, and the next optimizer step comes after them. Tensors on the CPU are cloned.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}  # by the keys that lead to it in the state
        self._copied: dict[tuple[object, ...], Tensor] = {}  # of this snapshot, by the memory of the original
        self._queued: torch.cuda.Event | None = None  # after the last copy of a GPU's tensors

    def take(self, state: SavedState) -> SavedState:
        """Return a copy of the state. Its tensors of a GPU are to be read after `wait_for_device` only."""
        self._copied = {}
        snapshot = cast(SavedState, self._copy(state, ""))
        self._copied = {}  # clones end with the snapshot
        if self._pinned:
            self._queued = torch.cuda.Event(blocking=True)
            self._queued.record()
        return snapshot

    def wait_for_device(self) -> None:
        """Wait until the GPU has made the copies. For the thread that reads them."""
        if self._queued:
            torch.cuda.set_device(self._queued.device)  # a new thread has GPU 0, and would make a context there
            self._queued.synchronize()

    def _copy(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value, path)
        if isinstance(value, list):
            return [self._copy(item, f"{path}/{index}") for index, item in enumerate(value)]
        if isinstance(value, dict):
            copied = copy(value)  # of the same type: a module's state_dict holds the versions of its parts
            for key, item in value.items():
                copied[key] = self._copy(item, f"{path}/{key}")
            return copied
        return value

    def _copy_tensor(self, tensor: Tensor, path: str) -> Tensor:
        """Two names of one tensor become two names of one copy."""
        memory = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if memory not in self._copied:
            self._copied[memory] = self._to_pinned(tensor, path) if tensor.is_cuda else tensor.clone()
        return self._copied[memory]

    def _to_pinned(self, tensor: Tensor, path: str) -> Tensor:
        pinned = self._pinned.get(path)
        if pinned is None or (pinned.shape, pinned.dtype) != (tensor.shape, tensor.dtype):
            pinned = self._pinned[path] = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)
