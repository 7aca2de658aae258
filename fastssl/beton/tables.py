"""Check the tables of a file or of a set of shards before compiled code follows their pointers.

FFCV's compiled readers trust every pointer and size in the file. Everything that they follow is checked here first,
with numpy, in a fraction of a second per million samples: a truncated, damaged or malicious file raises a UserError.
Files of stock FFCV are read too. Images are not decoded here.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fastssl.beton.format import (
    ALLOCATION,
    ARRAY_FIELD,
    BC4,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPG,
    LARGEST_PAGE,
    RAW,
    RGB,
    SMALLEST_PAGE,
    VERSION,
    ArrayImages,
    align,
    metadata_type,
    read_array_images,
)
from fastssl.beton.parts import map_file
from fastssl.beton.shards import files_of, is_set, sets_in
from fastssl.beton.source import BUILT_SPLITS, how_to_make
from fastssl.common.errors import UserError, quote
from fastssl.common.files import UnsafeFile, open_regular

LARGEST_SOURCE_SIDE = 2**31 - 1  # px; areas then fit into 64 bits
MOST_FIELDS = 256  # far above any real file; limits what a damaged header can make us read

Checked = TypeVar("Checked")


class Tables(NamedTuple):
    """The tables of a file that is sound, or of all files of a set."""

    page_size: int
    field_types: dict[str, int]  # name -> FFCV's type id
    metadata: np.ndarray  # with a format.IMAGE as the column "image"; of a set, its pointers are those of `map_file`
    metadata_bytes: int  # in the file
    image_bytes: np.ndarray
    channels: int
    file_bytes: int
    samples_of_files: tuple[int, ...]
    crc32_of_files: tuple[int, ...]  # of the metadata as it is in each file


class Header(NamedTuple):
    """What stands before the metadata of a file."""

    page_size: int
    num_samples: int
    field_types: dict[str, int]  # name -> FFCV's type id
    images: ArrayImages | None  # what all images are if they are in an array field
    metadata_start: int  # byte of the file
    metadata_end: int
    table_start: int  # of the allocation table

    @property
    def channels(self) -> int:
        return RGB if self.images is None else self.images.channels


def read_tables(path: Path, files: Sequence[Path] | None = None) -> Tables:
    """Return the tables of a file, or those of all files of a set as one. Raises UserError if one is not sound.

    files: those of the set that are meant; None: all.
    """
    files = files_of(path) if files is None else files
    checked = [_read_file_tables(file) for file in files]
    return _join(path, files, checked) if is_set(path) else checked[0]


def _join(path: Path, files: Sequence[Path], checked: Sequence[Tables]) -> Tables:
    """Return the tables of a set. Raises UserError if its files do not belong together."""
    first = checked[0]
    start = 0
    for file, each in zip(files, checked):
        if (each.field_types, each.channels) != (first.field_types, first.channels):
            raise UserError(f"{file} has other fields or channels than {files[0]}", hint="name files of one build")
        each.metadata["image"]["data_ptr"] += np.uint64(start)
        start = align(start + each.file_bytes)
    metadata = np.concatenate([each.metadata for each in checked])
    if first.field_types.get("index") == INT_FIELD:
        index_N = np.sort(metadata["index"])
        is_repeated_N = index_N[1:] == index_N[:-1]
        if is_repeated_N.any():
            raise UserError(
                f"Two files of {path} hold an image with the index {index_N[int(np.argmax(is_repeated_N))]}",
                hint="name shards of one build only",
            )
    return Tables(
        page_size=max(each.page_size for each in checked),
        field_types=first.field_types,
        metadata=metadata,
        metadata_bytes=sum(each.metadata_bytes for each in checked),
        image_bytes=np.concatenate([each.image_bytes for each in checked]),
        channels=first.channels,
        file_bytes=sum(each.file_bytes for each in checked),
        samples_of_files=tuple(len(each.metadata) for each in checked),
        crc32_of_files=tuple(crc32 for each in checked for crc32 in each.crc32_of_files),
    )


def read_file_header(path: Path) -> Header:
    """Return the header of one file; where its tables are is checked, their rows are not. Raises as `read_tables`."""
    return _read_file(path, _check_header)


def _read_file_tables(path: Path) -> Tables:
    return _read_file(path, _check_tables)


def _read_file(path: Path, check: Callable[[np.ndarray], Checked]) -> Checked:
    """Return what `check` returns for the bytes of a file. Raises UserError if the file is not there or not sound."""
    try:
        with open_regular(path) as file:
            # numpy cannot map an empty file.
            content = map_file(path) if os.fstat(file.fileno()).st_size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise UserError(f"No file {path}", hint=how_to_make(path)) from None
    except IsADirectoryError:
        sets = sorted({str(each) for split in BUILT_SPLITS for each in sets_in(path, split)})
        hint = f"name the shards of a split in it, such as '{sets[0]}'" if sets else "name a file in it"
        raise UserError(f"{path} is a folder, not a .beton file", hint=hint) from None
    except UnsafeFile as error:
        raise UserError(f"{path} is {error.strerror}", hint="name a .beton file") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", hint="make it readable for your user, or name another file"
        ) from error
    try:
        return check(content)
    except ValueError as error:
        raise UserError(f"{path} is not a .beton file: {error}", hint="build it with fastssl build-beton") from error


def _check_header(content: np.ndarray) -> Header:
    """Check what stands before the metadata, and that the file has room for all tables. Raises ValueError."""
    header = _read_table(content, 0, HEADER, 1, "the header")[0]
    if header["version"] == 0:
        raise ValueError("its header was never written, because its build was interrupted")
    if header["version"] != VERSION:
        raise ValueError(f"its first bytes are not those of FFCV version {VERSION}")
    page_size = int(header["page_size"])
    num_samples = int(header["num_samples"])
    if page_size & (page_size - 1) or not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
        raise ValueError(f"a page size of {page_size:,} bytes is impossible")
    if not 1 <= header["num_fields"] <= MOST_FIELDS:
        raise ValueError(f"it cannot have {header['num_fields']} fields")
    if num_samples == 0:
        raise ValueError("it holds no samples")

    position = HEADER.itemsize
    descriptors = _read_table(content, position, FIELD, int(header["num_fields"]), "the fields")
    field_types = _read_field_types(descriptors)
    position += descriptors.nbytes
    end = position + num_samples * metadata_type(field_types).itemsize
    if end > len(content):
        raise ValueError(f"the metadata would end at byte {end:,} of {len(content):,}")
    images = _read_array_images(descriptors, field_types)
    table_start = int(header["alloc_table_ptr"])
    count, rest = divmod(len(content) - table_start, ALLOCATION.itemsize)
    if table_start < end or count < 1 or rest:
        raise ValueError("its allocation table is missing or cut off")
    return Header(page_size, num_samples, field_types, images, position, end, table_start)


def _check_tables(content: np.ndarray) -> Tables:
    """Check everything in the bytes of a file except for image data. Raises ValueError for what is wrong first."""
    header = _check_header(content)
    page_size, num_samples, field_types, images, position, end, table_start = header
    stored = content[position:end].view(metadata_type(field_types))
    metadata = np.array(stored) if images is None else with_image_column(stored, field_types, images)
    if images is None and (metadata["image"]["mode"] > RAW).any():
        raise ValueError("it holds images stored neither as pixels nor as JPEG")
    table = content[table_start:].view(ALLOCATION)
    check_allocations(table, end, table_start, page_size)
    if (table["sample_id"] >= num_samples).any():
        raise ValueError("its allocation table names samples that it does not have")
    image_bytes = _find_allocations(metadata["image"], table)
    check_images(metadata["image"], image_bytes, header.channels)
    if wrong := find_wrong_source(metadata, field_types):
        raise ValueError(f"the source of its sample {wrong[0]} {wrong[1]}")
    if field_types.get("index") == INT_FIELD:
        _check_indices(metadata["index"])
    return Tables(
        page_size=page_size,
        field_types=field_types,
        metadata=metadata,
        metadata_bytes=stored.nbytes,
        image_bytes=image_bytes,
        channels=header.channels,
        file_bytes=len(content),
        samples_of_files=(num_samples,),
        crc32_of_files=(zlib.crc32(content[position:end].data),),
    )


def _read_table(content: np.ndarray, start: int, dtype: np.dtype, count: int, name: str) -> np.ndarray:
    """Return `count` rows of the file from byte `start` on, if the file is that long."""
    end = start + count * dtype.itemsize
    if end > len(content):
        raise ValueError(f"{name} would end at byte {end:,} of {len(content):,}")
    return content[start:end].view(dtype)


def _read_field_types(descriptors: np.ndarray) -> dict[str, int]:
    field_types: dict[str, int] = {}
    for descriptor in descriptors:
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        type_id = int(descriptor["type_id"])
        if type_id not in FIELD_TYPES:
            raise ValueError(f"its field {quote(name)} has a type (number {type_id}) that is not one of FFCV's own")
        if not name.isprintable() or not name or name in field_types:
            raise ValueError(f"its field names are damaged ({quote(name)})")
        field_types[name] = type_id
    if field_types.get("image") not in (IMAGE_FIELD, ARRAY_FIELD):
        raise ValueError(f"it has no image field 'image'; its fields: {', '.join(field_types)}")
    return field_types


def _read_array_images(descriptors: np.ndarray, field_types: dict[str, int]) -> ArrayImages | None:
    """Return what all images are if they are in an array field; None for FFCV's own image field."""
    if field_types["image"] == IMAGE_FIELD:
        return None
    return read_array_images(descriptors["arguments"][list(field_types).index("image")])


def with_image_column(stored: np.ndarray, field_types: dict[str, int], images: ArrayImages) -> np.ndarray:
    """Return the metadata of images in an array field, which is a pointer, as that of FFCV's own image field."""
    metadata = np.zeros(len(stored), metadata_type({**field_types, "image": IMAGE_FIELD}))
    for name in field_types:
        if name != "image":
            metadata[name] = stored[name]
    image = metadata["image"]
    image["mode"] = images.mode
    image["height"] = images.height
    image["width"] = images.width
    image["data_ptr"] = stored["image"]
    return metadata


def check_allocations(table: np.ndarray, start: int | np.ndarray, end: int | np.ndarray, page_size: int) -> None:
    """Check that every allocation is between metadata and table, and within one page. Raises ValueError.

    start, end: bytes of the file; of each row, if the rows are of several files.
    """
    ptr, size = table["ptr"], table["size"]
    # uint64 wraps around, so each value is bounded before two of them are added.
    is_bounded = (ptr >= start) & (ptr <= end) & (size <= page_size)
    if not is_bounded.all() or (ptr + size > end).any():
        raise ValueError("it points at data outside of the file")
    page = np.uint64(page_size)
    if ((ptr % page) + size > page).any():
        raise ValueError("some of its data crosses the end of a page")


def _find_allocations(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Check that every image has its own allocation, found as FFCV finds it. Return their sizes."""
    by_ptr = table[np.argsort(table["ptr"])]
    found = np.searchsorted(by_ptr["ptr"], image["data_ptr"])
    allocation = by_ptr[np.minimum(found, len(by_ptr) - 1)]
    is_own = allocation["sample_id"] == np.arange(len(image), dtype=np.uint64)
    if not (is_own & (allocation["ptr"] == image["data_ptr"])).all():
        raise ValueError("its images point at data that is not theirs")
    return allocation["size"].astype(np.int64)


def check_images(image: np.ndarray, image_bytes: np.ndarray, channels: int) -> None:
    """Check that the stored bytes of images fit their height and width. Raises ValueError."""
    pixels = image["height"].astype(np.uint64) * image["width"]
    if (pixels == 0).any() or (image_bytes == 0).any():
        raise ValueError("it holds images without pixels")
    expected = np.where(image["mode"] == BC4, pixels * 3 // 4, channels * pixels)
    if ((image["mode"] != JPG) & (image_bytes.astype(np.uint64) != expected)).any():
        raise ValueError("the size of its images does not fit their height and width")


def find_wrong_source(metadata: np.ndarray, field_types: dict[str, int]) -> tuple[int, str] | None:
    """Check the sizes of the source images, from which crop boxes are computed.

    Returns the row of one that is impossible and what is wrong with it; None if all are possible.
    """
    for side in ("height", "width"):
        if field_types.get(side) == INT_FIELD:
            is_wrong_N = (metadata[side] < 1) | (metadata[side] > LARGEST_SOURCE_SIDE)
            if is_wrong_N.any():
                row = int(np.argmax(is_wrong_N))
                return row, f"cannot have a {side} of {metadata[side][row]} px"
    return None


def _check_indices(index_N: np.ndarray) -> None:
    """Check that the indices are ids: not negative, and none of them twice. Raises ValueError."""
    sorted_N = np.sort(index_N)  # faster than argsort
    is_repeated_N = sorted_N[1:] == sorted_N[:-1]
    if sorted_N[0] < 0:
        raise ValueError(f"its sample {int(np.argmin(index_N))} has the negative index {sorted_N[0]}")
    if is_repeated_N.any():
        order_N = np.argsort(index_N, kind="stable")
        first = int(np.argmax(is_repeated_N))
        raise ValueError(f"its samples {order_N[first]} and {order_N[first + 1]} have the same index {sorted_N[first]}")
