"""The samples of a .beton or a set of shards, and the crop boxes that are cut out of them on the CPU."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from fastssl.beton import BetonInfo, read_header, read_names
from fastssl.beton.format import ALLOCATION, BC4, INT_FIELD, JPG, RAW, bc4_bytes
from fastssl.beton.mapped import MappedTables
from fastssl.beton.parts import FilePart, file_parts, map_file, part_at, read_single_pages
from fastssl.common.errors import UserError
from fastssl.common.geometry import FLIP, crop_box, eval_box
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.common.system import most_mappings, used_mappings
from fastssl.loading.kernels import gather_rows
from fastssl.recipe import ViewsConfig

CropMode = Literal["gpu", "cpu", "eval"]


Storage = Literal["raw", "jpg", "bc4", "mixed"]
MODES = {"raw": (RAW,), "jpg": (JPG,), "bc4": (BC4,), "mixed": (RAW, JPG)}
PIECE = 1 << 20  # samples that are read at a time where all of a very large set are


class Indices(Protocol):
    """N integers by their position: an array (N,), or what computes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, position_B: np.ndarray, /) -> np.ndarray: ...


def as_array(of: Indices) -> np.ndarray:
    """(N,) int64: all of the integers, which takes 8 bytes each."""
    return of[np.arange(len(of))]


def in_pieces(of: Indices) -> Iterator[np.ndarray]:
    """Yield all of the integers, PIECE at a time."""
    for first in range(0, len(of), PIECE):
        yield of[np.arange(first, min(first + PIECE, len(of)))]


class SampleRows(NamedTuple):
    """B samples of a file or a set, or all of them; int64 where nothing else is said."""

    start_B: np.ndarray  # byte of the mapped file at which the image starts
    size_B: np.ndarray  # stored bytes of the image
    mode_B: np.ndarray  # uint8: RAW, JPG or BC4 of beton.format
    shape_B2: np.ndarray  # stored height and width in px
    label_B: np.ndarray  # -1: none
    index_B: np.ndarray  # stable sample ids
    height_B: np.ndarray  # of the source image, in px
    width_B: np.ndarray

    @classmethod
    def of(cls, metadata_B: np.ndarray, size_B: np.ndarray, row_B: np.ndarray, int_fields: set[str]) -> "SampleRows":
        """Make the columns of checked metadata.

        A file of stock FFCV may lack labels (then -1), ids (then the row) and source sizes (then the stored ones).
        """
        image_B = metadata_B["image"]
        shape_B2 = np.stack([image_B["height"], image_B["width"]], axis=1).astype(np.int64)

        def column(name: str, default_B: np.ndarray) -> np.ndarray:
            # Of other types, such as an array's position in the file, nothing is checked.
            return metadata_B[name].astype(np.int64) if name in int_fields else default_B

        return cls(
            start_B=image_B["data_ptr"].astype(np.int64),
            size_B=size_B.astype(np.int64),
            mode_B=np.ascontiguousarray(image_B["mode"]),
            shape_B2=shape_B2,
            label_B=column("label", np.full(len(metadata_B), -1)),
            index_B=column("index", row_B),
            height_B=column("height", shape_B2[:, 0]),
            width_B=column("width", shape_B2[:, 1]),
        )

    def at(self, row_B: np.ndarray) -> "SampleRows":
        return SampleRows(*(column[row_B] for column in self))


class MappedRows:
    """All samples of a very large set: each is read from the mapped files, and checked, when it is asked for."""

    def __init__(self, file: np.ndarray, tables: MappedTables) -> None:
        self.file = file
        self.tables = tables
        self.int_fields = {name for name, type_id in tables.field_types.items() if type_id == INT_FIELD}
        # Each piece with another advice is a range of addresses of its own: up to four more of each file.
        if used_mappings() + 4 * len(tables.parts) <= most_mappings() // 4:
            ends_F = tables.metadata_end_F, tables.start_F + [part.size for part in tables.parts]
            for starts_F, end_F in zip((tables.metadata_F, tables.allocations_F), ends_F):
                for start, end in zip(starts_F.tolist(), end_F.tolist()):
                    read_single_pages(file, start, end)

    def at(self, row_B: np.ndarray) -> SampleRows:
        """Raises UserError if a row is not sound."""
        tables = self.tables
        file_B, row_in_file_B = tables.file_of(row_B)
        stored_B = self._read(tables.metadata_F[file_B], row_in_file_B, tables.metadata_type)
        allocation_B = self._read(tables.allocations_F[file_B], row_in_file_B, ALLOCATION)
        metadata_B = tables.check_rows(row_B, stored_B, allocation_B)
        rows = SampleRows.of(metadata_B, allocation_B["size"], row_B, self.int_fields)
        return rows._replace(start_B=rows.start_B + tables.start_F[file_B])

    def _read(self, table_B: np.ndarray, row_B: np.ndarray, dtype: np.dtype[np.void]) -> np.ndarray:
        """(B,) rows of tables that start at these bytes. All are within their tables, whose ends were checked."""
        out_BN = np.empty((len(row_B), dtype.itemsize), np.uint8)
        gather_rows(self.file, table_B + row_B * dtype.itemsize, out_BN)
        return out_BN.view(dtype)[:, 0]


@dataclass(frozen=True)
class Samples:
    """The samples of a file, in its order. A set of shards is one file here: all of its files, one after the other."""

    path: Path
    file: np.ndarray  # the whole file, mapped, uint8
    rows: SampleRows | MappedRows  # of all samples
    count: int
    channels: int  # of every image; 3: RGB
    storage: Storage
    # Stored heights and widths of images of which one is the largest, and one the widest. If all have one size: that.
    largest_K2: np.ndarray
    page_size: int  # bytes
    parts: tuple[FilePart, ...] = ()  # the files that were mapped

    @classmethod
    def read(cls, info: BetonInfo) -> "Samples":
        """Take the table of a file, and map its images."""
        files = [part.path for part in info.parts]
        file = map_file(info.path, files)
        if file_parts(info.path, files) != info.parts:
            raise UserError(f"{info.path} has changed since it was opened", hint="start again")
        rows: SampleRows | MappedRows
        if isinstance(info.tables, MappedTables):
            rows = MappedRows(file, info.tables)
            largest_K2 = np.array([info.max_resolution], np.int64)
        else:
            int_fields = {name for name, kind in info.fields.items() if kind == "IntField"}
            row_N = np.arange(info.num_samples)
            rows = SampleRows.of(info.tables.metadata, info.tables.image_bytes, row_N, int_fields)
            largest_K2 = largest_shapes(rows.shape_B2)
        return cls(
            path=info.path,
            file=file,
            rows=rows,
            count=info.num_samples,
            channels=info.channels,
            storage=info.storage,
            largest_K2=largest_K2,
            page_size=info.page_size,
            parts=info.parts,
        )

    def __len__(self) -> int:
        return self.count

    def at(self, row_B: np.ndarray) -> SampleRows:
        """The samples in these rows of the file. Of a very large set, raises UserError if one of them is not sound."""
        return self.rows.at(row_B)

    def column(self, name: str, row_N: Indices) -> np.ndarray:
        """(N,): start, size, mode, label, index, height or width of these rows, in memory.

        All of a very large set may be more than there is: see `in_pieces`.
        """
        if isinstance(self.rows, SampleRows):
            whole_N: np.ndarray = getattr(self.rows, f"{name}_B")
            return whole_N[row_N if isinstance(row_N, np.ndarray) else as_array(row_N)]
        pieces = [getattr(self.at(row_B), f"{name}_B") for row_B in in_pieces(row_N)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def index_pieces(self) -> Iterator[np.ndarray]:
        """Yield the ids of all samples in the file's order, int64 (n,) each: those of a file of a very large set."""
        if isinstance(self.rows, SampleRows):
            yield self.rows.index_B
        else:
            yield from self.rows.tables.pieces_of("index")

    def page(self, row_N: Indices) -> np.ndarray:
        """(N,) int64: the page of the file that contains each image."""
        return self.column("start", row_N) // self.page_size

    @property
    def rows_of_a_page(self) -> int:
        """How many samples a page holds on average, at least 1."""
        return max(1, self.count * self.page_size // max(1, sum(part.size for part in self.parts)))

    @property
    def is_mapped(self) -> bool:
        """Whether the table stays in the files, see beton/mapped.py."""
        return isinstance(self.rows, MappedRows)

    @property
    def in_blocks(self) -> bool:
        """Whether the images are canvases in BC4. All of a file are, or none."""
        return self.storage == "bc4"

    @property
    def table_bytes(self) -> int:
        """Bytes of memory that the table of all samples takes."""
        if isinstance(self.rows, MappedRows):
            return 0
        return sum(column.nbytes for column in self.rows)

    def fingerprint(self) -> str:
        """A hash that differs for other labels, orders or sizes of images, but not for a copy of the file.

        It reads no image: other images of the same sizes are not noticed. That of a very large set is one of the
        checksums in its manifest, as reading its tables would take minutes.
        """
        if isinstance(self.rows, MappedRows):
            files = [(file["samples"], file["checksum"]) for file in self.rows.tables.manifest["files"]]
            return hashlib.sha256(json.dumps(files).encode()).hexdigest()
        rows = self.rows
        columns = [rows.size_B, rows.label_B, rows.index_B, rows.height_B, rows.width_B]
        if self.in_blocks:  # as many bytes may be pixels of another side
            columns.append(rows.shape_B2)
        return hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns)).hexdigest()

    def fingerprint_of_pages(self) -> str:
        """A hash that differs also for other pages, on which the order "quasi_random" depends."""
        pages = str(self.rows_of_a_page).encode()
        if isinstance(self.rows, SampleRows):
            pages = (self.rows.start_B // self.page_size).tobytes()
        return hashlib.sha256(self.fingerprint().encode() + pages).hexdigest()

    def describe(self, row: int) -> str:
        """Name a sample in an error message: its file, index, source image (if known) and position in the file."""
        sample = self.at(np.array([row]))
        index, start = int(sample.index_B[0]), int(sample.start_B[0])
        part = part_at(self.parts, start)
        name = read_names(part.path, [index]).get(index)
        source = f" ({name})" if name else ""
        return f"{part.path}: the sample with index {index}{source}, at byte {start - part.start:,},"


def largest_shapes(shape_N2: np.ndarray) -> np.ndarray:
    """(2, 2) int64: the height and width of the largest image, and of the widest one."""
    # As `crops.new_scratch` counts pixels.
    return shape_N2[[(shape_N2 + 3).prod(axis=1).argmax(), shape_N2[:, 1].argmax()]]


class LabelCounts(NamedTuple):
    """What is checked of the labels of images."""

    images: int
    without: int  # images that have no label
    label_C: np.ndarray  # the different labels, sorted


def count_labels(pieces: Iterable[np.ndarray]) -> LabelCounts:
    """Count labels that come in pieces, int64 (n,) each."""
    images = without = 0
    label_C = np.empty(0, np.int64)
    for label_N in pieces:
        images += len(label_N)
        without += int((label_N < 0).sum())
        label_C = np.union1d(label_C, label_N)
    return LabelCounts(images, without, label_C)


def require_labels(path: Path, counts: LabelCounts, use: str, fix: str, classes: int = 1) -> None:
    """Check the labels of images of `path` before they are used. Everything that needs labels calls this.

    Args:
        counts: of the labels that are used.
        use: what needs labels, and `fix`: what to do without; parts of the message.
        classes: the least number of classes that `use` needs.

    Raises:
        UserError: one of the images has no label (a negative one), or they have fewer classes.
    """
    if counts.without:
        verb = "has" if counts.without == 1 else "have"
        raise UserError(
            f"{counts.without:,} of the {counts.images:,} images of {path} {verb} no label, which {use} needs", hint=fix
        )
    if len(counts.label_C) < classes:
        raise UserError(f"{path} holds one class only, and {use} needs several", hint=fix)


def require_channels(path: str | Path, in_chans: int, encoder: str = "", fix: str = "") -> None:
    """Check that the images of `path` have the channels that an encoder takes. All that embeds images calls this.

    Args:
        in_chans: channels that the encoder takes.
        encoder: which one it is, and `fix`: what to do; parts of the message. "": that of a run that is to be trained.

    Raises:
        UserError: the images have another number of channels.
    """
    channels = read_header(path).channels
    if channels != in_chans:
        encoder = encoder or "the encoder (model.in_chans)"
        fix = fix or f"set model.in_chans={channels}, with views.mean and views.std for such images"
        raise UserError(
            f"{path} holds images of {channels} channel{'' if channels == 1 else 's'}, and {encoder} takes {in_chans}",
            hint=f"{fix}, or build it again with --channels {in_chans}",
        )


class Crops(NamedTuple):
    """What is cut out of the images of a batch."""

    box_BV4: np.ndarray  # float64, in stored px: top, left, height, width
    flip_BV: np.ndarray  # bool: mirrored left to right


class Cropping(NamedTuple):
    """What the CPU cuts out of every image."""

    mode: CropMode  # "gpu": nothing; "cpu": the crops of the views; "eval": the box of the evaluation transform
    views: ViewsConfig
    seed: int  # of the random boxes and flips
    crops: int  # per image, with mode "cpu"

    def image_shape(self, samples: Samples) -> tuple[int, ...]:
        """The shape of an image in a batch: (H, W, C), for blocks (bytes,), or (crops, size, size, 3)."""
        if self.mode == "gpu":  # all images of the file have this shape
            height, width = samples.largest_K2[0].tolist()
            return (bc4_bytes(height),) if samples.in_blocks else (height, width, samples.channels)
        return self.crops if self.mode == "cpu" else 1, self.views.size, self.views.size, 3

    def only_copies(self, samples: Samples) -> bool:
        """Whether a batch holds what is stored: pixels or blocks, whole."""
        return self.mode == "gpu" and JPG not in MODES[samples.storage]

    def draw(self, rows: SampleRows, epoch: int) -> Crops:
        """The crops of these samples, the same as in fastssl.views; none with mode "gpu"."""
        if self.mode == "gpu":
            count = len(rows.index_B)
            return Crops(np.empty((count, 0, 4)), np.empty((count, 0), bool))
        index_B, height_B, width_B = (
            torch.from_numpy(column_B) for column_B in (rows.index_B, rows.height_B, rows.width_B)
        )
        if self.mode == "eval":
            box_BV4 = eval_box(height_B, width_B, self.views.eval)[:, None]
            flip_BV = torch.zeros(len(index_B), 1, dtype=torch.bool)
        else:
            box_BV4 = torch.empty(len(index_B), self.crops, 4, dtype=torch.float64)
            flip_BV = torch.empty(len(index_B), self.crops, dtype=torch.bool)
            for view in range(self.crops):
                u_BN = uniforms(self.seed, epoch, index_B, view, FLIP + 1, AUGMENTATION)
                box_BV4[:, view] = crop_box(u_BN, height_B, width_B, self.views.scale, self.views.ratio)
                flip_BV[:, view] = u_BN[:, FLIP] < self.views.flip
        source_B2 = np.stack([rows.height_B, rows.width_B], axis=1)
        stored_per_source_B4 = np.tile(rows.shape_B2 / source_B2, 2)
        return Crops(box_BV4.numpy() * stored_per_source_B4[:, None], flip_BV.numpy())
