"""A batch's stored bytes to its pixels, by threads on the CPU."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.beton.format import RAW
from fastssl.loading import kernels
from fastssl.loading.samples import Samples
from fastssl.loading.spans import span
from fastssl.recipe import ViewsConfig

Crop = Literal["gpu", "cpu", "eval"]

SMALL = 1 << 20  # bytes; copying that many stored pixels takes as long as handing the work to threads


class Decoded(NamedTuple):
    image: Tensor  # uint8 (B, H, W, 3) or (B, V, size, size, 3); a failed sample's pixels are undefined
    status_B: np.ndarray  # kernels.DECODED, WARNED or FAILED


class DecodeTask(NamedTuple):
    """A batch to be decoded, by any number of threads that call kernel(*arguments)."""

    image: Tensor
    status_B: np.ndarray
    counter: np.ndarray  # int64 (1,): the next sample that no thread has taken
    kernel: Callable
    arguments: tuple
    is_small: bool  # done before a thread is awake


class PendingBatch(NamedTuple):
    """A batch that the threads are decoding."""

    work: DecodeTask
    threads: list[Future]


class ThreadDecoder:
    """Decodes batches of one size; two of them may be under way, so that no thread waits for the slowest."""

    def __init__(
        self,
        samples: Samples,
        crop: Crop,
        views: ViewsConfig | None,
        seed: int,
        workers: int,
        buffers: "Buffers",
        crops: Literal[1, 2] = 2,
    ) -> None:
        self.samples, self.crop, self.views, self.seed = samples, crop, views, seed
        self.workers, self.crops = workers, crops
        self._buffers = buffers
        self._pool = ThreadPoolExecutor(workers, "fastssl-decode")
        self._scratch = threading.local()

    def start(self, rows: np.ndarray, epoch: int) -> PendingBatch:
        return self.begin(self.prepare(rows, epoch))

    def prepare(self, rows: np.ndarray, epoch: int) -> DecodeTask:
        """All that is to be known before decoding: where bytes lie, which boxes to cut, where pixels go."""
        samples = self.samples
        source = samples.file, samples.start_N[rows], samples.size_N[rows], samples.mode_N[rows]
        status_B, counter = np.full(len(rows), kernels.FAILED, np.int8), np.zeros(1, np.int64)
        if self.crop == "gpu":
            height, width = samples.shape_N2[rows[0]]
            image = self._buffers.take((len(rows), int(height), int(width), 3))
            kernel, arguments = kernels.decode_squares, (*source, image.numpy(), status_B, counter)
        else:
            box_BV4 = (
                samples.eval_boxes(rows, self.views)
                if self.crop == "eval"
                else samples.crop_boxes(rows, self.seed, epoch, self.views, self.crops)
            )
            size = self.views.size
            image = self._buffers.take((len(rows), box_BV4.shape[1], size, size, 3))
            shape_B2 = samples.shape_N2[rows]
            kernel = self._decode_crops
            arguments = *source, shape_B2, box_BV4, image.numpy(), status_B, counter
        return DecodeTask(image, status_B, counter, kernel, arguments, is_small(image.nbytes, samples.mode_N[rows]))

    def begin(self, work: DecodeTask) -> PendingBatch:
        if work.is_small:
            _decode(work)
            return PendingBatch(work, [])
        threads = min(self.workers, len(work.status_B))
        return PendingBatch(work, [self._pool.submit(_decode, work) for _ in range(threads)])

    def finish(self, pending: PendingBatch) -> Decoded:
        for thread in pending.threads:
            thread.result()
        return Decoded(pending.work.image, pending.work.status_B)

    def cancel(self, pending: PendingBatch) -> None:
        """Let the threads stop at their next sample."""
        pending.work.counter[0] = kernels.ALL_TAKEN

    def close(self) -> None:
        self._pool.shutdown()

    def _decode_crops(self, *arguments) -> None:
        kernels.decode_crops(*arguments, *self._own_scratch())

    def _own_scratch(self) -> tuple[np.ndarray, np.ndarray]:
        """This thread's room for the file's largest image, and for a line of its widest."""
        if not hasattr(self._scratch, "arrays"):
            shape_N2 = self.samples.shape_N2
            largest, widest = int(shape_N2.prod(axis=1).max()) * 3, int(shape_N2[:, 1].max()) * 3
            self._scratch.arrays = np.empty(largest, np.uint8), np.empty(widest, np.float32)
        return self._scratch.arrays


def is_small(image_bytes: int, mode_B: np.ndarray) -> bool:
    """Whether stored pixels are copied before a thread is awake."""
    return image_bytes <= SMALL and bool((mode_B == RAW).all())


def _decode(work: DecodeTask) -> None:
    with span("decode"):
        work.kernel(*work.arguments)


class Buffers:
    """Batch-sized tensors in host memory, used again as soon as nobody holds the last batch in them.

    Getting 50 MB from the system and giving them back costs 12,000 page faults a batch.
    """

    KEPT = 8  # more than the loader ever has under way; a caller may keep any number of batches

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        if self.pinned:  # torch keeps pinned memory, and knows which copies still read it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        for array in self._arrays:
            # A tensor made from an array holds a reference to it, and so do views of that tensor.
            if sys.getrefcount(array) == _UNUSED and array.shape == shape:
                return torch.from_numpy(array)
        self._arrays = [*self._arrays, np.empty(shape, np.uint8)][-self.KEPT :]
        return torch.from_numpy(self._arrays[-1])


def _references_to_an_unused_array() -> int:
    arrays = [np.empty(1)]
    for array in arrays:
        return sys.getrefcount(array)


_UNUSED = _references_to_an_unused_array()
