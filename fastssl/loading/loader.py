"""BetonLoader: batches of a .beton in a reproducible order, read and decoded ahead of the loop that takes them."""

import copy
import hashlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastssl.beton import BetonInfo, mapped, read_header
from fastssl.beton.format import RGB
from fastssl.common.distributed import main_progress, rank, world_size
from fastssl.common.errors import UserError
from fastssl.common.schema import Count, Text
from fastssl.common.system import available_cores, free_memory, total_memory
from fastssl.loading import kernels
from fastssl.loading.blocks import BlockImages
from fastssl.loading.crops import scratch_bytes
from fastssl.loading.decoding import Buffers, PendingBatch, ThreadDecoder, is_small
from fastssl.loading.order import Drawn, Order, SampleSelection, epoch_order
from fastssl.loading.prefetch import run_ahead
from fastssl.loading.resident import pieces_bytes, read_pieces
from fastssl.loading.samples import MODES, CropMode, Cropping, Indices, SampleRows, Samples, as_array
from fastssl.loading.spans import span
from fastssl.recipe import ViewsConfig

PENDING_BATCHES = 2  # being decoded: while one waits for its last sample, threads work on the next one
READY_BATCHES = 1  # decoded, waiting for the caller
BATCHES = PENDING_BATCHES + READY_BATCHES + 2  # in memory: the caller holds two while it replaces one by the next
LONG_LOADING = 1 << 30  # bytes of a resident set, from which on its loading shows progress


class ImageRows(NamedTuple):
    """Images of a batch, where they are: rows of all images of a resident set."""

    images: Tensor | BlockImages  # uint8 (images, H, W, C), or in blocks
    row_B: Tensor  # int64

    def gather(self) -> Tensor | BlockImages:
        """A copy of the images of the batch: (B, H, W, C), or in blocks."""
        return self.images[self.row_B]


class Batch(NamedTuple):
    """A batch on the device. The caller may keep it: it is never overwritten."""

    # uint8 (B, H, W, C), or BlockImages where the file holds blocks; crop="cpu": (B, crops, size, size, 3), mirrored
    # where drawn; crop="eval": 1 crop. An ImageRows of a resident set with gather=False only.
    image: Tensor | BlockImages | ImageRows
    label: Tensor  # int64 (B,); -1 for an image without a label
    index: Tensor  # type: ignore[assignment]  # int64 (B,): stable sample ids
    height: Tensor  # int64 (B,): of the source images, in pixels
    width: Tensor
    valid: Tensor  # bool (B,): False for the rows that fill up a last batch

    def gathered(self) -> Tensor | BlockImages:
        """The images of the batch alone, as they are stored."""
        return self.image.gather() if isinstance(self.image, ImageRows) else self.image

    def pixels(self) -> Tensor:
        """The images as one uint8 tensor of pixels; blocks are decoded."""
        images = self.gathered()
        return images.pixels() if isinstance(images, BlockImages) else images

    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, with the images as one tensor: of pixels, or uint8 (B, bytes) of blocks."""
        images = self.gathered()
        return images.blocks if isinstance(images, BlockImages) else images, *self[1:]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `change` of each of its `tensors`."""
        images = self.gathered()
        image, *columns = [change(tensor) for tensor in self.tensors()]
        return Batch(BlockImages(image, images.side) if isinstance(images, BlockImages) else image, *columns)


class ReadyBatch(NamedTuple):
    """What the reader thread hands over to the loop."""

    batch: Batch
    copied: torch.cuda.Event | None  # on a GPU: recorded after the copies to it


class StartedBatch(NamedTuple):
    """A batch of this process within the reader thread."""

    row_B: np.ndarray  # int64: rows of the file
    valid_B: np.ndarray  # bool: False for the rows that fill up a last batch
    decoding: PendingBatch


class LoaderState(TypedDict):
    """A position in the epochs of a loader."""

    epoch: Count
    position: Count  # samples handed out in this epoch, over all processes
    seed: Count
    order: Order
    samples: Text  # hash of the file's samples
    assignment: NotRequired[Text]  # with data.shards=local: hash of which node reads which shards in this epoch


class BetonLoader:
    """Iterable over the batches of a .beton file, or of a set of shards, as `Batch` tuples.

    Each epoch has its own order, a function of (seed, epoch). Over several processes, global batch b is
    order[b * G:(b + 1) * G] with G = batch_size * processes, and rank r gets its r-th equal slice. Iterating starts at
    `position` and ends with the epoch. An exception while decoding ends the loop where it occurred; leaving a loop
    early ends all threads. Iterate over a loader from one place at a time.

    Args:
        batch_size: samples per process.
        seed: of the order, and of the crops that are cut here.
        crop: "gpu": whole stored images, all of one size; the views cut their crops on the device. "cpu": the crops
            that `fastssl.views` would cut, mirrored where it would, from one decode of each image. "eval": the box of
            the evaluation transform, from images of any size.
        views: the recipe's section; "cpu" and "eval" need it. crops=1: the crop of the first view only.
        workers: decoding threads; None: all cores that this process may use.
        shuffle: True, False (the file's order), or "quasi_random" for a file larger than memory (see `epoch_order`).
        drop_last: False fills up the last batch with repeated samples, which `valid` marks.
        resident: True keeps all images on the device after one decode, and makes the same batches from there.
        gather: False leaves the images of resident batches where they are: `image` is an `ImageRows`, which the views
            take.
        on_bad_sample: "error" raises a UserError that names a sample that cannot be decoded. "skip" uses the next
            sample of its batch instead, with its label and index, and counts it in `bad_samples`.
        selection: the samples of the file that are used.
        shard: False gives every sample to this process, even if there are others.

    Raises:
        UserError: the file cannot be used, or has fewer samples than a batch.
    """

    decoder_type = ThreadDecoder  # the profiler replaces it to measure a loader without decoding

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        seed: int = 0,
        crop: CropMode = "gpu",
        views: ViewsConfig | None = None,
        crops: Literal[1, 2] = 2,
        workers: int | None = None,
        shuffle: bool | Literal["quasi_random"] = True,
        drop_last: bool = True,
        device: str | torch.device = "cpu",
        resident: bool = False,
        gather: bool = True,
        on_bad_sample: Literal["error", "skip"] = "error",
        selection: SampleSelection = SampleSelection(),  # noqa: B008 - it is frozen
        shard: bool = True,
    ) -> None:
        self.path = Path(path)
        info = read_header(self.path, self.own_files())
        if crop == "gpu" and info.resolution is None:
            raise UserError(
                f"{self.path} holds images of different sizes, which data.crop=gpu cannot batch",
                hint="set data.crop=cpu, or build it with --canvas",
            )
        if crop != "gpu" and info.channels != RGB:
            raise UserError(
                f"{self.path} holds images of {info.channels} channels, and data.crop={crop} cuts RGB images only",
                hint="set data.crop=gpu, or leave out data.crop",
            )
        orders: dict[bool | str, Order] = {True: "random", False: "sequential", "quasi_random": "quasi_random"}
        if shuffle not in orders:
            raise ValueError(f'shuffle must be True, False or "quasi_random", not {shuffle!r}')
        if crop != "gpu" and views is None:
            raise ValueError(f'crop="{crop}" needs views, the recipe\'s section.')
        if crop == "cpu" and resident:
            raise UserError(
                "data.resident=true needs data.crop=gpu, as crops made on the CPU are new in every epoch",
                hint="set data.crop=gpu, or leave out data.resident",
            )

        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.views = views or ViewsConfig()
        self.crops = crops
        self.workers = workers or available_cores()
        self.order = orders[shuffle]
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.resident = resident
        self.gather = gather
        self.on_bad_sample = on_bad_sample
        self.selection = selection
        self.rank = rank() if shard else 0
        self.world = world_size() if shard else 1
        self.samples = Samples.read(info)
        self.rows = selection.rows(self.samples)
        if isinstance(self.rows, Drawn) and self.order != "random":
            raise UserError(
                f"data.limit leaves {len(self.rows):,} images of {self.path}, and so many are drawn in no order of the "
                f"file, on which the {self.order} order depends",
                hint=f"leave out data.limit, lower it to at most {mapped.MOST_IN_MEMORY:,}, or set data.order=random",
            )
        self.epoch = 0
        self.position = 0  # samples handed out in this epoch, over all processes
        self.bad_samples = 0  # samples that were replaced
        self.decoder_warnings = 0  # samples that decoded, with a warning
        self._buffers = Buffers(pinned=self.on_gpu)
        # One for all epochs, as the allocator reuses the memory of a batch only in the stream that it was taken in.
        self._copies = torch.cuda.Stream(self.device) if self.on_gpu else None
        self._whole_file: Batch | None = None  # on the device, if resident

        if len(self) == 0:
            raise UserError(
                f"{self.path} gives {self.epoch_images} images, fewer than one batch of {batch_size * self.world}",
                hint="lower train.batch_size, or add images",
            )
        self._check_memory(info)

    def _check_memory(self, info: BetonInfo) -> None:
        """Raise UserError for batches that memory cannot hold, and warn of random reads from a disk."""
        needed = BATCHES * self.batch_bytes_on_host + self.scratch_bytes
        if needed > total_memory():
            height, width = info.max_resolution
            raise UserError(
                f"Batches of {self.batch_size} images of {self.path}, of up to {height} x {width} px, take "
                f"{needed / 1e9:,.0f} GB, and this machine has {total_memory() / 1e9:,.0f} GB of memory",
                hint="lower train.batch_size, or build the file again with a smaller --canvas or --max-side",
            )
        size = info.file_bytes
        memory = free_memory()
        if self.order == "random" and not self.resident and size > memory:
            warnings.warn(
                f"{self.path} has {size / 1e9:.3g} GB, but {memory / 1e9:.3g} GB of memory are free, and a random "
                "order reads single images from the disk: set data.order=quasi_random, which reads large pieces, or "
                "build a file that fits with a smaller --canvas or --max-side.",
                stacklevel=3,
            )

    def own_files(self) -> list[Path] | None:
        """The files of a set that this process reads; None: all. LocalShardsLoader overrides it and what follows."""
        return None

    @property
    def epoch_images(self) -> int:
        """Images of an epoch, over all processes."""
        return len(self.rows)

    def begin_epoch(self) -> list[str]:
        """Prepare the running epoch, in all processes together. Returns remarks for the user."""
        return []

    def epoch_order(self) -> Indices:
        """The order of the running epoch, as positions in `rows`."""
        return epoch_order(self.order, self.seed, self.epoch, self.samples, self.rows)

    def positions_in_order(self, first: int) -> np.ndarray:
        """(batch_size,): this process's part of the global batch that starts at position `first` of the epoch."""
        return first + self.rank * self.batch_size + np.arange(self.batch_size)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole, rest = divmod(self.epoch_images, self.batch_size * self.world)
        return whole if self.drop_last or rest == 0 else whole + 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def cropping(self) -> Cropping:
        return Cropping(self.crop, self.views, self.seed, self.crops)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in a batch: decoded, with all of its crops, or in blocks."""
        return math.prod(self._image_shape)

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return self.cropping.image_shape(self.samples)

    @property
    def batch_bytes_on_host(self) -> int:
        """Bytes that the images of a batch take in host memory."""
        size = self.batch_size * self.image_bytes
        return pinned_bytes(size) if self.on_gpu else size

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the decoding threads hold to cut crops: mostly the largest image."""
        if self.crop == "gpu":
            return 0
        return self.workers * scratch_bytes(self.samples.largest_K2, self.views.size)

    @property
    def decodes_in_reader(self) -> bool:
        """Whether batches are so small that the reader thread decodes them itself."""
        return is_small(self.batch_size * self.image_bytes, np.array(MODES[self.samples.storage]), self.cropping)

    @property
    def only_copies(self) -> bool:
        """Whether the file holds what a batch holds, pixels or blocks, so that nothing is decoded."""
        return self.cropping.only_copies(self.samples)

    def make_decoder(self, *, workers: int | None = None, crops: int | None = None) -> ThreadDecoder:
        """The decoder of this loader's batches; the profiler gives it other numbers of threads and crops."""
        cropping = self.cropping if crops is None else self.cropping._replace(crops=crops)
        return self.decoder_type(self.samples, cropping, workers or self.workers, self._buffers)

    def set_epoch(self, epoch: int) -> None:
        """Go to the first sample of an epoch."""
        self.epoch = epoch
        self.position = 0

    def state_dict(self) -> LoaderState:
        """The position after the last batch that was handed out."""
        return LoaderState(
            epoch=self.epoch, position=self.position, seed=self.seed, order=self.order, samples=self._samples_hash
        )

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue at a saved position; the number of processes may be another one."""
        if (state["seed"], state["order"]) != (self.seed, self.order):
            raise UserError(
                f"The saved position in {self.path} belongs to seed {state['seed']} and the {state['order']} order, "
                f"and this loader has seed {self.seed} and the {self.order} order",
                hint="resume with the recipe.yaml of the run, or start a new run",
            )
        if state["samples"] != self._samples_hash:
            many = f" and, above {mapped.MOST_IN_MEMORY:,} images, in the same shards with the manifest of their set"
            raise UserError(
                f"{self.path} does not hold the images that the run has read so far, in their order"
                f"{many if len(self.samples) > mapped.MOST_IN_MEMORY else ''}",
                hint="set data.train (and data.subset) to the file that was used before, or start a new run",
            )
        self.epoch = state["epoch"]
        self.position = state["position"]

    @cached_property
    def _samples_hash(self) -> str:
        # Pages matter for one order only: a file and its shards have other ones.
        samples = self.samples
        file_hash = samples.fingerprint_of_pages() if self.order == "quasi_random" else samples.fingerprint()
        if self.selection.subset is None:
            return file_hash
        return hashlib.sha256(file_hash.encode() + as_array(self.rows).tobytes()).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch from `position` on, then go to the start of the next epoch."""
        order = self.epoch_order()
        batches = self._resident_batches(order) if self.resident else self._streamed_batches(order)
        for batch in batches:
            self.position += self.batch_size * self.world
            yield batch
        self.set_epoch(self.epoch + 1)

    def _remaining_positions(self) -> range:
        """Positions in the order at which the remaining global batches of the epoch start."""
        global_batch = self.batch_size * self.world
        end = self.epoch_images - (global_batch - 1 if self.drop_last else 0)
        return range(self.position, end, global_batch)

    def _streamed_batches(self, order: Indices) -> Iterator[Batch]:
        """Take the batches from the reader thread."""
        reader = self._read(order, self._remaining_positions(), self.epoch)
        for batch, copied in run_ahead(reader, READY_BATCHES):
            if copied is not None:
                # The caller's stream waits for the copies. The allocator has to know that this stream uses the memory.
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                for tensor in batch.tensors():
                    tensor.record_stream(stream)
            yield batch

    def _read(
        self, order: Indices, positions: range, epoch: int, *, on_host: bool = False
    ) -> Generator[ReadyBatch, None, None]:
        """Runs in the reader thread: decode batches, and start their copies to the device.

        order: of the epoch, as positions in `rows`. positions: where in it the global batches start. on_host: leave the
        batches in (pinned) memory of the host.
        """
        if self._copies is not None:
            # A new thread has GPU 0, and pinned memory would make a context there.
            torch.cuda.set_device(self._copies.device)
        decoder = self.make_decoder()
        pending: deque[StartedBatch] = deque()
        try:
            with torch.cuda.stream(self._copies):  # None: no effect
                for first in positions:
                    # Positions after the end of the order wrap around, to fill up the last batch.
                    position_B = self.positions_in_order(first)
                    row_B = self.rows[order[position_B % len(order)]]
                    with span("start"):
                        decoding = decoder.begin(decoder.prepare(row_B, epoch))
                    pending.append(StartedBatch(row_B, position_B < len(order), decoding))
                    if len(pending) == PENDING_BATCHES:
                        yield self._finish(pending.popleft(), on_host)
                while pending:
                    yield self._finish(pending.popleft(), on_host)
        finally:
            for started in pending:
                started.decoding.cancel()
            decoder.close()

    def _finish(self, started: StartedBatch, on_host: bool) -> ReadyBatch:
        """Wait for a batch's images, and start its copies to the device."""
        with span("wait for threads"):
            started.decoding.wait()
        with span("copy"):
            batch = self._assemble(started)
            if self._copies is None or on_host:
                return ReadyBatch(batch, None)
            on_device = batch.map(lambda tensor: to_device(tensor, self.device))
            return ReadyBatch(on_device, self._copies.record_event())

    def _assemble(self, started: StartedBatch) -> Batch:
        """Add labels, ids and sizes to the decoded images. Undecodable samples are replaced, or raise a UserError."""
        image = started.decoding.task.image
        out = started.decoding.task.arrays.out  # the memory of the images
        status_B = started.decoding.task.arrays.status_B
        rows = started.decoding.task.rows
        columns = rows.label_B, rows.index_B, rows.height_B, rows.width_B
        self.decoder_warnings += int((status_B == kernels.WARNED).sum())
        # Replacements come from the same batch, so that a damaged sample does not change any other batch.
        good = np.flatnonzero(status_B != kernels.FAILED)
        for b in np.flatnonzero(status_B == kernels.FAILED):
            if self.on_bad_sample == "error" or len(good) == 0:
                raise UserError(
                    f"{self.samples.describe(started.row_B[b])} cannot be decoded",
                    hint="build the file again with fastssl build-beton, or set data.on_bad_sample=skip",
                )
            replacement = good[np.searchsorted(good, b) % len(good)]  # the next good one, or else the first
            out[b] = out[replacement]
            for column_B in columns:
                column_B[b] = column_B[replacement]
            self.bad_samples += 1
        return self._with_columns(image, rows, started.valid_B)

    def _with_columns(self, image: Tensor | BlockImages, rows: SampleRows, valid_B: np.ndarray) -> Batch:
        columns = rows.label_B, rows.index_B, rows.height_B, rows.width_B
        label_B, index_B, height_B, width_B = (torch.from_numpy(column_B) for column_B in columns)
        return Batch(image, label_B, index_B, height_B, width_B, torch.from_numpy(valid_B))

    def _resident_batches(self, order_of_epoch: Indices) -> Iterator[Batch]:
        """Make the same batches from the samples on the device."""
        whole = self.load_resident()
        # Also that of a very large set is an array here: it takes far less than the images.
        order = to_device(torch.from_numpy(as_array(order_of_epoch)), self.device)
        for first in self._remaining_positions():
            position_B = first + self.rank * self.batch_size + torch.arange(self.batch_size, device=self.device)
            row_B = order[position_B % len(order)]
            image = ImageRows(whole.gathered(), row_B)
            columns = [column[row_B] for column in whole[1:-1]]
            yield Batch._make([image.gather() if self.gather else image, *columns, position_B < len(order)])

    def load_resident(self) -> Batch:
        """Return the samples of a resident set, as one batch in the file's order. The first call loads them.

        Raises UserError if they do not fit on the device.
        """
        if self._whole_file is None:
            self._whole_file = self._load_whole_file()
        return self._whole_file

    def _load_whole_file(self) -> Batch:
        """All selected samples, in the file's order, on the device."""
        count = len(self.rows)
        try:
            memory = torch.empty((count, *self._image_shape), dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            raise UserError(f"{self.path} does not fit on the device", hint="set data.resident=false") from None
        columns: list[tuple[Tensor, ...]] = []  # of each piece, all fields but its images
        filled = 0
        copied: torch.cuda.Event | None = None
        shows = memory.nbytes >= LONG_LOADING
        with main_progress(f"Loading {self.path}", count) if shows else nullcontext(lambda *_: None) as advance:
            for piece in self._pieces_of_whole_file():
                # The last batch of decoded images is filled up.
                images, *rest = (column[: count - filled] for column in piece.tensors())
                memory[filled : filled + len(images)].copy_(images, non_blocking=True)
                if self.on_gpu:
                    # Two copies are under way at most: the pinned memory that a copy reads is not free for another.
                    if copied is not None:
                        copied.synchronize()
                    copied = torch.cuda.current_stream(self.device).record_event()
                columns.append(tuple(rest))
                filled += len(images)
                advance(len(images), images.nbytes)
        image = BlockImages(memory, int(self.samples.largest_K2[0, 0])) if memory.ndim == 2 else memory
        return Batch(image, *(to_device(torch.cat(parts), self.device) for parts in zip(*columns)))

    def _pieces_of_whole_file(self) -> Iterator[Batch]:
        """The selected samples in the file's order, in (pinned) memory of the host."""
        if self.only_copies:
            for row_B, image in read_pieces(self.samples, self.rows, self._image_shape, self.workers, self._buffers):
                yield self._with_columns(image, self.samples.at(row_B), np.ones(len(row_B), bool))
            return
        # Images that are decoded come in the usual batches: what replaces a damaged one comes from the same batch.
        reader = copy.copy(self)
        reader.batch_size = min(self.batch_size, len(self.rows))
        reader.drop_last = False
        reader.rank = 0
        reader.world = 1
        reader.position = 0
        in_order = epoch_order("sequential", self.seed, 0, self.samples, self.rows)
        batches = reader._read(in_order, reader._remaining_positions(), 0, on_host=True)
        for batch, _ in run_ahead(batches, READY_BATCHES):
            yield batch
        self.bad_samples = reader.bad_samples
        self.decoder_warnings = reader.decoder_warnings


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Start a copy to the device, for which the CPU does not wait. Returns a tensor that is there already itself."""
    if tensor.device.type == device.type:
        return tensor
    # A copy from memory that is not pinned would wait for the device.
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def pinned_bytes(size: int) -> int:
    """What torch's allocator of pinned memory takes for a tensor of `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def estimate_memory(loader: BetonLoader) -> dict[str, int]:
    """Estimate the memory of a loader in bytes, by use: on the host unless the name says device."""
    samples = loader.samples
    batch = loader.batch_size
    batch_bytes = batch * loader.image_bytes
    used = {
        f"{BATCHES} batches of {batch}{', pinned' if loader.on_gpu else ''}": BATCHES * loader.batch_bytes_on_host,
        "table of samples": samples.table_bytes,
    }
    if loader.crop != "gpu":
        used[f"scratch of {loader.workers} threads"] = loader.scratch_bytes
    if loader.on_gpu:
        used[f"{READY_BATCHES + 2} batches of {batch}, device"] = (READY_BATCHES + 2) * batch_bytes
    if loader.resident:
        used["all images, device"] = len(loader.rows) * loader.image_bytes
        if loader.only_copies:
            used["pieces, while all images are loaded"] = pieces_bytes(loader.workers, used["all images, device"])
    used["file, if all of it is to stay in the page cache"] = sum(part.size for part in samples.parts)
    return used
