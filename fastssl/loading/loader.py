"""BetonLoader: batches of a .beton in a reproducible order, decoded ahead."""

import hashlib
import queue
import warnings
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from threading import Event, Thread
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastssl.beton import read_header, read_index_list
from fastssl.common.distributed import rank, world_size
from fastssl.common.errors import UserError
from fastssl.common.randomness import permutation
from fastssl.common.system import available_cores, free_memory
from fastssl.loading import kernels
from fastssl.loading.decoding import Buffers, Crop, Decoded, ThreadDecoder, is_small
from fastssl.loading.order import Order, epoch_order
from fastssl.loading.samples import Samples
from fastssl.loading.spans import span
from fastssl.recipe import ViewsConfig

UNDER_WAY = 2  # batches being decoded: while one waits for its last sample the next one has begun
READY = 1  # decoded batches that wait for the caller
SUBSET_SEED = 0  # data.limit picks the same images whatever the run's seed


class Batch(NamedTuple):
    """One batch, on the device. The caller may keep it: it is never written again."""

    image: Tensor  # uint8 (B, H, W, 3); (B, crops, size, size, 3) for crop="cpu", flip not yet applied; 1 for "eval"
    label: Tensor  # int64 (B,); -1 where the file has no labels
    index: Tensor  # int64 (B,): stable sample ids
    height: Tensor  # int64 (B,): the source images' sizes in pixels
    width: Tensor
    valid: Tensor  # bool (B,): False for the rows that fill up a last batch


class BetonLoader:
    """Batches of `batch_size` samples (a process) from a .beton file, as `Batch` tuples.

    crop="gpu" gives whole stored images (all of one size); crop="cpu" decodes once and cuts both
    views' crops on the CPU (crops=1: the first view's), at the boxes that `fastssl.views` would draw; crop="eval"
    cuts the clean view's part out of images of any size. The last two need `views`, the recipe's section.

    shuffle: True, False (the file's order), or "quasi_random" for a file larger than memory (see
    `order.py`). Each epoch has its own order, a function of (seed, epoch). Over several processes, global
    batch b is order[b * G:(b + 1) * G] and rank r gets its r-th equal slice. With drop_last=False the
    last batch is filled up with repeated samples that `valid` marks False.

    shard: False gives every sample to this process, whatever others there are.

    subset: a file that lists images (`fastssl.beton.read_index_list`); the loader gives these alone.

    limit: this many samples (of the subset), drawn at random, the same for every seed, behind the first `skip`
    of that draw.

    resident=True decodes the whole file once, keeps it on the device and gives the same batches from
    there: for a canvas that fits into the device's memory.

    on_bad_sample: "error" raises a UserError that names a sample that cannot be decoded. "skip" puts
    the next sample of the same batch in its place, with its label and index, and counts it in
    `bad_samples`. `decoder_warnings` counts samples that decode, but not without complaint.

    Raises UserError for a file that cannot be used. An exception ends the loop where it occurred, and
    leaving a loop early ends all threads. Iterate over a loader from one place at a time.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        seed: int = 0,
        crop: Crop = "gpu",
        views: ViewsConfig | None = None,
        crops: Literal[1, 2] = 2,
        workers: int | None = None,
        shuffle: bool | Literal["quasi_random"] = True,
        drop_last: bool = True,
        device: str | torch.device = "cpu",
        resident: bool = False,
        on_bad_sample: Literal["error", "skip"] = "error",
        subset: str | Path | None = None,
        limit: int | None = None,
        skip: int = 0,
        shard: bool = True,
    ):
        self.path = Path(path)
        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.views = views
        self.crops = crops
        self.workers = workers or available_cores()
        self.order = {True: "random", False: "sequential"}.get(shuffle, shuffle)
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.resident = resident
        self.on_bad_sample = on_bad_sample
        self.rank, self.world = (rank(), world_size()) if shard else (0, 1)

        info = read_header(self.path)
        if crop == "gpu" and info.resolution is None:
            raise UserError(
                f"{self.path} holds images of different sizes, which data.crop=gpu cannot batch: "
                "set data.crop=cpu, or build it with --canvas."
            )
        if self.order not in get_args(Order):
            raise ValueError(f'shuffle must be True, False or "quasi_random", not {shuffle!r}')
        if crop != "gpu" and views is None:
            raise ValueError(f'crop="{crop}" needs views, the recipe\'s section.')
        if crop == "cpu" and resident:
            raise UserError("data.resident needs data.crop=gpu: crops made on the CPU are new in every epoch.")
        self.samples = Samples.of(info)
        self.subset = subset
        self.rows = np.arange(info.num_samples)
        if subset is not None:
            self.rows = np.flatnonzero(np.isin(self.samples.index_N, read_index_list(self.path, subset)))
        if skip or (limit is not None and limit < len(self.rows)):
            drawn = permutation(SUBSET_SEED, 0, len(self.rows)).numpy()
            self.rows = self.rows[np.sort(drawn[skip:][:limit])]
        if len(self) == 0:
            raise UserError(
                f"{self.path} gives {len(self.rows)} images, fewer than one batch of "
                f"{batch_size * self.world}: lower train.batch_size or add images."
            )
        if self.order == "random" and not resident:
            _warn_if_larger_than_memory(self.path)
        self.epoch = 0
        self.position = 0  # samples handed out this epoch, over all processes
        self.bad_samples = 0
        self.decoder_warnings = 0
        self._buffers = Buffers(pinned=self.device.type == "cuda")
        self._on_device: Batch | None = None

    @property
    def decodes_in_reader(self) -> bool:
        """Whether batches are so small that no thread is woken for them."""
        return is_small(self.batch_size * self.image_bytes, self.samples.mode_N[self.rows])

    @property
    def image_bytes(self) -> int:
        """What one decoded image takes, with all of its crops."""
        if self.crop == "gpu":
            height, width = (int(side) for side in self.samples.shape_N2[0])
            return height * width * 3
        return (self.crops if self.crop == "cpu" else 1) * self.views.size**2 * 3

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        global_batch = self.batch_size * self.world
        whole, rest = divmod(len(self.rows), global_batch)
        return whole if self.drop_last or rest == 0 else whole + 1

    def set_epoch(self, epoch: int) -> None:
        """Start the given epoch at its first sample."""
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int | str]:
        place = {"epoch": self.epoch, "position": self.position, "seed": self.seed, "order": self.order}
        return {**place, "samples": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        of_file = self.samples.fingerprint()
        if self.subset is None:
            return of_file
        return hashlib.sha256(of_file.encode() + self.rows.tobytes()).hexdigest()

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on behind the last sample that was handed out; also with another number of processes."""
        if (state["seed"], state["order"]) != (self.seed, self.order):
            raise UserError(
                f"The saved place in {self.path} belongs to seed {state['seed']} and the {state['order']} order; "
                f"this loader has seed {self.seed} and the {self.order} order."
            )
        if state.get("samples", self._fingerprint) != self._fingerprint:
            raise UserError(
                f"{self.path} does not hold the images that were read before, in their order: name the file of then as "
                "data.train (and its list of then as data.subset), or start a new run."
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch from `position` on; afterwards the loader stands at the next epoch."""
        order = epoch_order(self.order, self.seed, self.epoch, self.samples.page_N[self.rows])
        batches = self._from_device(order) if self.resident else self._decoded(order)
        for batch in batches:
            self.position += self.batch_size * self.world
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def _first_places(self) -> range:
        """Where in the order each global batch begins that is left of the epoch."""
        global_batch = self.batch_size * self.world
        end = len(self.rows) - (global_batch - 1 if self.drop_last else 0)
        return range(self.position, end, global_batch)

    def _decoded(self, order: np.ndarray) -> Iterator[Batch]:
        """A thread decodes ahead; what it meets, an exception too, comes through the queue."""
        ready: queue.Queue = queue.Queue(READY)
        stop = Event()
        work = self.rows[order], self._first_places(), self.epoch, ready, stop
        reader = Thread(target=self._read_ahead, args=work, name="fastssl-reader", daemon=True)
        try:
            reader.start()  # inside: Ctrl-C may strike while this waits for the thread, which then has to be told
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._received(*item)
        finally:
            stop.set()
            if reader.is_alive():
                reader.join()

    def _read_ahead(self, rows_N: np.ndarray, firsts: range, epoch: int, ready: queue.Queue, stop: Event) -> None:
        """The reader thread: batch after batch into the queue; None ends it, so does an exception."""

        def put(item) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.05)
                except queue.Full:
                    pass

        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        pending: deque = deque()
        decoder = None

        def hand_over_oldest() -> None:
            rows_B, valid_B, decoding = pending.popleft()
            with span("wait for threads"):
                decoded = decoder.finish(decoding)
            with span("copy"):
                batch = self._batch(rows_B, valid_B, decoded)
                moved = self._to_device(batch, copies) if copies else (batch, None)
            with span("wait for room"):
                put(moved)

        try:
            with torch.cuda.stream(copies):  # None: does nothing
                decoder = self._decoder()
                for first in firsts:
                    # Places behind the order's end fill up the last batch.
                    place_B = first + self.rank * self.batch_size + np.arange(self.batch_size)
                    rows_B = rows_N.take(place_B, mode="wrap")
                    with span("start"):
                        decoding = decoder.start(rows_B, epoch)
                    pending.append((rows_B, place_B < len(rows_N), decoding))
                    if len(pending) == UNDER_WAY:
                        hand_over_oldest()
                    if stop.is_set():
                        return
                while pending:
                    hand_over_oldest()
            put(None)
        except BaseException as error:
            put(error)
        finally:
            for _, _, decoding in pending:
                decoder.cancel(decoding)
            if decoder:
                decoder.close()

    def _decoder(self) -> ThreadDecoder:
        return ThreadDecoder(self.samples, self.crop, self.views, self.seed, self.workers, self._buffers, self.crops)

    def _batch(self, rows_B: np.ndarray, valid_B: np.ndarray, decoded: Decoded) -> Batch:
        """Put image and columns together; samples that did not decode are answered for here."""
        image, status_B = decoded
        self.decoder_warnings += int((status_B == kernels.WARNED).sum())
        for b in np.flatnonzero(status_B == kernels.FAILED):
            good = np.flatnonzero(status_B != kernels.FAILED)
            if self.on_bad_sample == "error" or len(good) == 0:
                raise UserError(
                    f"{self.samples.describe(rows_B[b])} cannot be decoded: build the file again with "
                    "fastssl build-beton, or set data.on_bad_sample=skip."
                )
            instead = good[np.searchsorted(good, b) % len(good)]
            image[b], rows_B[b] = image[instead], rows_B[instead]
            self.bad_samples += 1
        samples = self.samples
        columns = samples.label_N, samples.index_N, samples.height_N, samples.width_N
        return Batch(image, *(torch.from_numpy(c[rows_B]) for c in columns), torch.from_numpy(valid_B))

    def _to_device(self, batch: Batch, copies: "torch.cuda.Stream"):
        """Start the copies on the reader's stream; the event tells when they are done."""
        pinned = (t if t.is_pinned() else t.pin_memory() for t in batch)  # from other memory, copies would wait
        moved = Batch(*(t.to(self.device, non_blocking=True) for t in pinned))
        return moved, copies.record_event()

    def _received(self, batch: Batch, copied: "torch.cuda.Event | None") -> Batch:
        """Make the caller's stream wait for the copy, and tell the allocator who uses the memory."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(stream)
        return batch

    def _from_device(self, order: np.ndarray) -> Iterator[Batch]:
        """The same batches, gathered on the device from the columns kept there."""
        if self._on_device is None:
            self._on_device = self._load_all()
        order_N = torch.from_numpy(order)
        if self.device.type == "cuda":
            order_N = order_N.pin_memory().to(self.device, non_blocking=True)
        for first in self._first_places():
            place_B = first + self.rank * self.batch_size + torch.arange(self.batch_size, device=self.device)
            row_B = order_N[place_B % len(order_N)]
            yield Batch(*(column[row_B] for column in self._on_device[:-1]), place_B < len(order_N))

    def _load_all(self) -> Batch:
        """All samples that the loader draws from, in the file's order, on the device; UserError if they do not fit."""
        reader = BetonLoader(
            self.path, min(self.batch_size, len(self.rows)), crop=self.crop, views=self.views, workers=self.workers,
            shuffle=False, drop_last=False, device=self.device, on_bad_sample=self.on_bad_sample,
            shard=False,
        )  # fmt: skip
        reader.rows = self.rows
        whole, filled = None, 0
        try:
            for batch in reader:
                if whole is None:
                    shapes = ((len(self.rows), *column.shape[1:]) for column in batch)
                    whole = Batch(*(column.new_empty(shape) for column, shape in zip(batch, shapes)))
                count = min(self.batch_size, len(self.rows) - filled)
                for kept, column in zip(whole, batch):
                    kept[filled : filled + count] = column[:count]
                filled += count
        except torch.OutOfMemoryError:
            raise UserError(f"{self.path} does not fit on the device: set data.resident=false.") from None
        self.bad_samples, self.decoder_warnings = reader.bad_samples, reader.decoder_warnings
        return whole


def count_images(path: str | Path, *, subset: str | Path | None = None, limit: int | None = None) -> int:
    """How many samples a BetonLoader with these arguments draws from; nothing is decoded."""
    count = read_header(path).num_samples if subset is None else len(read_index_list(path, subset))
    return count if limit is None else min(count, limit)


def _warn_if_larger_than_memory(path: Path) -> None:
    size, memory = path.stat().st_size, free_memory()
    if size > memory:
        warnings.warn(
            f"{path} has {size / 1e9:.3g} GB, but {memory / 1e9:.3g} GB of memory are free: a random order reads "
            "single images from the disk; data.order=quasi_random reads it in large pieces, a smaller --canvas or "
            "--max-side makes it fit.",
            stacklevel=3,
        )
