"""Turn the stored bytes of a batch into pixels or blocks, with threads on the CPU."""

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.beton.format import BC4, RAW
from fastssl.loading import kernels
from fastssl.loading.blocks import BlockImages
from fastssl.loading.crops import CropScratch, new_scratch
from fastssl.loading.kernels import DecodeArrays
from fastssl.loading.samples import Cropping, SampleRows, Samples
from fastssl.loading.spans import span

# Names of spans.
DECODE = "decode"
COPY_IMAGES = "copy images"  # of files whose images are stored as a batch holds them

SMALL_BATCH = 1 << 20  # bytes; copying that many takes as long as waking a thread


class DecodeTask(NamedTuple):
    """A batch to decode."""

    # uint8 (B, H, W, C) or (B, V, size, size, 3), or the images in blocks; the memory of arrays.out
    image: Tensor | BlockImages
    arrays: DecodeArrays
    rows: SampleRows


class PendingBatch(NamedTuple):
    """A batch that is being decoded."""

    task: DecodeTask
    threads: list[Future[None]]  # empty if the batch was decoded in the calling thread

    def wait(self) -> None:
        """Wait until the image and the statuses are filled. Raises what a thread raised."""
        for thread in self.threads:
            thread.result()

    def cancel(self) -> None:
        """Let the threads stop at their next sample."""
        self.task.arrays.counter[0] = kernels.ALL_TAKEN


class ThreadDecoder:
    """Decodes batches. Several of them may be pending, so that no thread waits for the slowest one of a batch."""

    def __init__(self, samples: Samples, cropping: Cropping, workers: int, buffers: "Buffers") -> None:
        self.samples = samples
        self.cropping = cropping
        self.workers = workers
        self.buffers = buffers
        self._pool = ThreadPoolExecutor(workers, "fastssl-decode")
        self._scratch = threading.local()
        self._only_copies = cropping.only_copies(samples)

    def prepare(self, row_B: np.ndarray, epoch: int) -> DecodeTask:
        """Collect what the threads need, and get memory for the pixels."""
        samples = self.samples
        rows = samples.at(row_B)
        crops = self.cropping.draw(rows, epoch)
        memory = self.buffers.take((len(row_B), *self.cropping.image_shape(samples)))
        arrays = DecodeArrays(
            file=samples.file,
            start_B=rows.start_B,
            size_B=rows.size_B,
            mode_B=rows.mode_B,
            shape_B2=rows.shape_B2,
            box_BV4=crops.box_BV4,
            flip_BV=crops.flip_BV,
            out=memory.numpy(),
            status_B=np.full(len(row_B), kernels.FAILED, np.int8),
            counter=np.zeros(1, np.int64),
        )
        if memory.ndim == 2:
            return DecodeTask(BlockImages(memory, int(samples.largest_K2[0, 0])), arrays, rows)
        return DecodeTask(memory, arrays, rows)

    def begin(self, task: DecodeTask) -> PendingBatch:
        """Start decoding. A batch so small that waking threads would take longer is decoded here."""
        if is_small(task.arrays.out.nbytes, task.arrays.mode_B, self.cropping):
            self._decode(task.arrays)
            return PendingBatch(task, [])
        threads = min(self.workers, len(task.image))
        return PendingBatch(task, [self._pool.submit(self._decode, task.arrays) for _ in range(threads)])

    def close(self) -> None:
        self._pool.shutdown()

    def _decode(self, arrays: DecodeArrays) -> None:
        with span(COPY_IMAGES if self._only_copies else DECODE):
            if self._only_copies:
                kernels.copy_images(arrays)
            elif self.cropping.mode == "gpu":
                kernels.decode_images(arrays)
            elif self.cropping.mode == "eval":
                kernels.decode_eval_crops(arrays, self._own_scratch())
            else:
                kernels.decode_crops(arrays, self._own_scratch())

    def _own_scratch(self) -> CropScratch:
        """This thread's memory, for the file's largest image."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = new_scratch(self.samples.largest_K2, self.cropping.views.size)
        memory: CropScratch = self._scratch.memory
        return memory


def is_small(batch_bytes: int, mode_B: np.ndarray, cropping: Cropping) -> bool:
    """Whether copying the stored pixels or blocks of a batch takes less time than waking a thread."""
    copied = (RAW, BC4) if cropping.mode == "gpu" else (RAW,)  # blocks are decoded before the CPU cuts crops
    return batch_bytes <= SMALL_BATCH and bool(np.isin(mode_B, copied).all())


class Buffers:
    """Batch-sized tensors in host memory, reused as soon as nobody holds the last batch in them.

    Allocating and freeing 50 MB costs 12,000 page faults per batch.
    """

    def __init__(self, pinned: bool, limit: int = 8) -> None:
        """limit: the tensors to remember: more than a loader ever has in use. A caller may keep any number of them."""
        self.pinned = pinned
        self.limit = limit
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor that nobody else uses, with undefined content."""
        if self.pinned:  # torch caches pinned memory, and knows which copies still read it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        # Shapes change when views.progressive_resize changes the size of the crops.
        for array in self._arrays:
            # A tensor made from an array holds a reference to it, and so do views of that tensor.
            if sys.getrefcount(array) == _REFERENCES_IF_UNUSED and array.shape == shape:
                return torch.from_numpy(array)
        self._arrays = [*self._arrays, np.empty(shape, np.uint8)][-self.limit :]
        return torch.from_numpy(self._arrays[-1])


# What getrefcount returns in the loop of `Buffers.take` for an array that only the list holds.
_REFERENCES_IF_UNUSED = next(sys.getrefcount(array) for array in [np.empty(1)])
