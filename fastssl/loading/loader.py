"""BetonLoader: batches of a .beton in a reproducible order, decoded ahead by a thread."""

import io
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.beton import read_header, read_samples
from fastssl.geometry import NUMBERS, crop_box
from fastssl.randomness import AUGMENTATION, permutation, uniforms
from fastssl.recipe import UserError, Views

from . import kernels

BATCHES_AHEAD = 3
SUBSET_SEED = 0  # data.limit picks the same images whatever the run's seed


class Batch(NamedTuple):
    """One batch, on the device. The caller may keep it: it is never written again."""

    image: Tensor  # uint8 (B, H, W, 3); (B, 2, size, size, 3) for crop="cpu", flip not yet applied
    label: Tensor  # int64 (B,); -1 where the file has no labels
    index: Tensor  # int64 (B,): stable sample ids
    height: Tensor  # int64 (B,): the source images' sizes in pixels
    width: Tensor
    valid: Tensor  # bool (B,): False for the rows that fill up a last batch


class BetonLoader:
    """Batches of `batch_size` samples (a process) from a .beton file, as `Batch` tuples.

    crop="gpu" gives whole stored images (all of one size); crop="cpu" decodes once and cuts both
    views' crops on the CPU, at the boxes that `fastssl.views` would draw; crop="whole" resizes whole
    images of any size to views.size. The last two need `views`, the recipe's section.

    Each epoch has its own order, a function of (seed, epoch). Over several processes, global batch b is
    order[b * G:(b + 1) * G] and rank r gets its r-th equal slice. With drop_last=False the last batch
    is filled up with repeated samples that `valid` marks False.

    Raises UserError for a file that cannot be used, and, while iterating, for a sample that cannot be
    decoded, with its index. Leaving a loop early ends the thread.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        seed: int = 0,
        crop: Literal["gpu", "cpu", "whole"] = "gpu",
        views: Views | None = None,
        workers: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        device: str | torch.device = "cpu",
        limit: int | None = None,
    ):
        self.path = Path(path)
        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.views = views
        self.workers = min(workers or available_cores(), kernels.numba.config.NUMBA_NUM_THREADS)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.rank, self.world = _rank_and_world()

        info = read_header(self.path)
        if crop == "gpu" and info.resolution is None:
            raise UserError(
                f"{self.path} holds images of different sizes, which data.crop=gpu cannot batch: "
                "set data.crop=cpu, or build it with --canvas."
            )
        if crop != "gpu" and views is None:
            raise ValueError(f'crop="{crop}" needs views, the recipe\'s section.')
        self._read_samples()
        self.rows = np.arange(info.num_samples)
        if limit is not None and limit < len(self.rows):
            self.rows = np.sort(permutation(SUBSET_SEED, 0, len(self.rows))[:limit].numpy())
        if len(self) == 0:
            raise UserError(
                f"{self.path} gives {len(self.rows)} images, fewer than one batch of "
                f"{batch_size * self.world}: lower train.batch_size or add images."
            )
        self.epoch = 0
        self.position = 0  # samples handed out this epoch, over all processes

    def _read_samples(self) -> None:
        """All that is known of each sample, as arrays over the file's rows."""
        metadata, self._size = read_samples(self.path)
        image, count = metadata["image"], len(metadata)
        self._mode = np.ascontiguousarray(image["mode"])
        self._start = image["data_ptr"].astype(np.int64)
        self._shape = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)

        # A file of stock FFCV may lack these fields.
        def column(name: str, default: np.ndarray) -> np.ndarray:
            found = name in metadata.dtype.names and np.issubdtype(metadata[name].dtype, np.integer)
            return metadata[name].astype(np.int64) if found else default

        self._label = column("label", np.full(count, -1))
        self._index = column("index", np.arange(count))
        self._height = column("height", self._shape[:, 0])
        self._width = column("width", self._shape[:, 1])
        self._file = np.memmap(self.path, np.uint8, mode="r")

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        global_batch = self.batch_size * self.world
        whole, rest = divmod(len(self.rows), global_batch)
        return whole if self.drop_last or rest == 0 else whole + 1

    def set_epoch(self, epoch: int) -> None:
        """Start the given epoch at its first sample."""
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int | bool]:
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Go on behind the last sample that was handed out; also with another number of processes."""
        if (state["seed"], state["shuffle"]) != (self.seed, self.shuffle):
            raise UserError(
                f"The saved place in {self.path} belongs to seed {state['seed']}, shuffle={state['shuffle']}; "
                f"this loader has seed {self.seed}, shuffle={self.shuffle}."
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch from `position` on; afterwards the loader stands at the next epoch."""
        ready: queue.Queue = queue.Queue(BATCHES_AHEAD)
        stop = Event()
        reader = Thread(target=self._read_ahead, args=(self.epoch, self.position, ready, stop), daemon=True)
        reader.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                self.position += self.batch_size * self.world
                yield self._received(item)
            self.epoch, self.position = self.epoch + 1, 0
        finally:
            stop.set()
            reader.join()

    def _read_ahead(self, epoch: int, position: int, ready: queue.Queue, stop: Event) -> None:
        """Thread: decode batch after batch into the queue; None ends it, an exception is handed over."""

        def put(item) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.05)
                except queue.Full:
                    pass

        try:
            copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            for rows, valid in self._batches(epoch, position):
                if stop.is_set():
                    return
                batch = self._decode(rows, valid, epoch)
                put(self._to_device(batch, copies) if copies else (batch, None))
            put(None)
        except Exception as error:
            put(error)

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, valid) of this process's share of each global batch that is left of the epoch."""
        order = self.rows
        if self.shuffle:
            order = order[permutation(self.seed, epoch, len(order)).numpy()]
        global_batch = self.batch_size * self.world
        end = len(order) - len(order) % global_batch if self.drop_last else len(order)
        for first in range(position, end, global_batch):
            place = first + self.rank * self.batch_size + np.arange(self.batch_size)
            yield order[place % len(order)], place < len(order)

    def _decode(self, rows: np.ndarray, valid: np.ndarray, epoch: int) -> Batch:
        where = self._file, self._start[rows], self._size[rows], self._mode[rows]
        pin = self.device.type == "cuda"
        if self.crop == "gpu":
            height, width = self._shape[rows[0]]
            image = torch.empty(len(rows), height, width, 3, dtype=torch.uint8, pin_memory=pin)
            decoded = kernels.decode_squares(*where, image.numpy(), self.workers)
        else:
            boxes = self._boxes(rows, epoch)
            count, size = boxes.shape[1], self.views.size
            image = torch.empty(len(rows), count, size, size, 3, dtype=torch.uint8, pin_memory=pin)
            decoded = kernels.decode_crops(*where, self._shape[rows], boxes, image.numpy(), self.workers)
        for b in np.flatnonzero(~decoded):
            pixels = self._decode_slowly(rows[b])
            if self.crop == "gpu":
                image[b] = torch.from_numpy(pixels)
            else:
                scratch = np.empty((len(pixels), self.views.size, 3), np.float32)
                for v in range(count):
                    kernels.crop_resize(pixels, boxes[b, v], image.numpy()[b, v], scratch)
        if self.crop == "whole":
            image = image[:, 0]
        columns = (self._label, self._index, self._height, self._width)
        return Batch(image, *(torch.from_numpy(c[rows]) for c in columns), torch.from_numpy(valid))

    def _boxes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """(B, views, 4) float64 boxes in stored pixels: the ones that the device would draw, or all."""
        shape = self._shape[rows]
        if self.crop == "whole":
            return np.concatenate([np.zeros_like(shape), shape], axis=1)[:, None].astype(np.float64)
        index = torch.from_numpy(self._index[rows])
        height, width = torch.from_numpy(self._height[rows]), torch.from_numpy(self._width[rows])
        drawn = []
        for view in (0, 1):
            u_BN = uniforms(self.seed, epoch, index, view, NUMBERS, AUGMENTATION)
            drawn.append(crop_box(u_BN, height, width, self.views.scale, self.views.ratio))
        stored_per_source = shape / np.stack([height, width], axis=1)
        return torch.stack(drawn, dim=1).numpy() * np.tile(stored_per_source, 2)[:, None]

    def _decode_slowly(self, row: int) -> np.ndarray:
        """Decode with Pillow what turbojpeg would not: it reports mere warnings as failures too."""
        data = self._file[self._start[row] : self._start[row] + self._size[row]].tobytes()
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                pixels = np.array(image.convert("RGB"))
            if pixels.shape[:2] != tuple(self._shape[row]):
                raise ValueError(f"it is {pixels.shape[:2]}, not {tuple(self._shape[row].tolist())} pixels")
        except Exception as error:
            raise UserError(
                f"{self.path}: the sample with index {self._index[row]} (row {row}) cannot be decoded "
                f"({error}): build the file again with fastssl build-beton."
            ) from None
        return pixels

    def _to_device(self, batch: Batch, copies: "torch.cuda.Stream"):
        """Start the copies on their own stream; the event tells when they are done."""
        with torch.cuda.stream(copies):
            moved = Batch(*(t.to(self.device, non_blocking=t.is_pinned()) for t in batch))
        # The caching host allocator keeps a pinned buffer until the copies recorded on it are done.
        return moved, copies.record_event()

    def _received(self, item) -> Batch:
        """Make the caller's stream wait for the copy, and tell the allocator who uses the memory."""
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(stream)
        return batch


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _rank_and_world() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
