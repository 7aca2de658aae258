"""Check the tables of a file or of a set of shards before compiled code follows their pointers.

FFCV's compiled readers trust every pointer and size in the file. Everything that they follow is checked here first,
with numpy, in a fraction of a second per million samples: a truncated, damaged or malicious file raises a UserError.
Files of stock FFCV are read too. Images are not decoded here.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


def read_tables(path: Path) -> Tables:
    """Return the tables of a file, or those of all files of a set as one. Raises UserError if one is not sound."""
    files = files_of(path)
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
    )


def _read_file_tables(path: Path) -> Tables:
    """Return the tables of one file. Raises UserError if there is no such file, or if it is not sound."""
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
        return _check_tables(content)
    except ValueError as error:
        raise UserError(f"{path} is not a .beton file: {error}", hint="build it with fastssl build-beton") from error


def _check_tables(content: np.ndarray) -> Tables:
    """Check everything in the bytes of a file except for image data. Raises ValueError for what is wrong first."""
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
    stored = _read_table(content, position, metadata_type(field_types), num_samples, "the metadata")
    position += stored.nbytes
    images = _read_array_images(descriptors, field_types)
    metadata = np.array(stored) if images is None else _with_image_column(stored, field_types, images)
    channels = RGB if images is None else images.channels
    if images is None and (metadata["image"]["mode"] > RAW).any():
        raise ValueError("it holds images stored neither as pixels nor as JPEG")

    table_ptr = int(header["alloc_table_ptr"])
    count, rest = divmod(len(content) - table_ptr, ALLOCATION.itemsize)
    if table_ptr < position or count < 1 or rest:
        raise ValueError("its allocation table is missing or cut off")
    table = _read_table(content, table_ptr, ALLOCATION, count, "the allocation table")
    _check_allocations(table, position, table_ptr, page_size, num_samples)
    image_bytes = _check_images(metadata["image"], table, channels)
    _check_numbers(metadata, field_types)
    samples = (len(metadata),)
    return Tables(page_size, field_types, metadata, stored.nbytes, image_bytes, channels, len(content), samples)


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


def _with_image_column(stored: np.ndarray, field_types: dict[str, int], images: ArrayImages) -> np.ndarray:
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


def _check_allocations(table: np.ndarray, start: int, end: int, page_size: int, num_samples: int) -> None:
    """Check that every allocation is between metadata and table, within one page, and belongs to a sample."""
    ptr, size = table["ptr"], table["size"]
    # uint64 wraps around, so each value is bounded before two of them are added.
    is_bounded = (ptr >= start) & (ptr <= end) & (size <= page_size)
    if not is_bounded.all() or (ptr + size > end).any():
        raise ValueError("it points at data outside of the file")
    page = np.uint64(page_size)
    if ((ptr % page) + size > page).any():
        raise ValueError("some of its data crosses the end of a page")
    if (table["sample_id"] >= num_samples).any():
        raise ValueError("its allocation table names samples that it does not have")


def _check_images(image: np.ndarray, table: np.ndarray, channels: int) -> np.ndarray:
    """Check that every image has its own allocation, found as FFCV finds it, of a valid size. Return the sizes."""
    by_ptr = table[np.argsort(table["ptr"])]
    found = np.searchsorted(by_ptr["ptr"], image["data_ptr"])
    allocation = by_ptr[np.minimum(found, len(by_ptr) - 1)]
    is_own = allocation["sample_id"] == np.arange(len(image), dtype=np.uint64)
    if not (is_own & (allocation["ptr"] == image["data_ptr"])).all():
        raise ValueError("its images point at data that is not theirs")
    pixels = image["height"].astype(np.uint64) * image["width"]
    if (pixels == 0).any() or (allocation["size"] == 0).any():
        raise ValueError("it holds images without pixels")
    expected = np.where(image["mode"] == BC4, pixels * 3 // 4, channels * pixels)
    if ((image["mode"] != JPG) & (allocation["size"] != expected)).any():
        raise ValueError("the size of its images does not fit their height and width")
    return allocation["size"].astype(np.int64)


def _check_numbers(metadata: np.ndarray, field_types: dict[str, int]) -> None:
    """Check the sizes of the source images, from which crop boxes are computed, and the indices, which are ids."""
    for side in ("height", "width"):
        if field_types.get(side) == INT_FIELD:
            is_wrong_N = (metadata[side] < 1) | (metadata[side] > LARGEST_SOURCE_SIDE)
            if is_wrong_N.any():
                sample = int(np.argmax(is_wrong_N))
                raise ValueError(
                    f"the source of its sample {sample} cannot have a {side} of {metadata[side][sample]} px"
                )
    if field_types.get("index") == INT_FIELD:
        index_N = np.sort(metadata["index"])  # faster than argsort
        is_repeated_N = index_N[1:] == index_N[:-1]
        if index_N[0] < 0:
            sample = int(np.argmin(metadata["index"]))
            raise ValueError(f"its sample {sample} has the negative index {index_N[0]}")
        if is_repeated_N.any():
            order_N = np.argsort(metadata["index"], kind="stable")
            first = int(np.argmax(is_repeated_N))
            raise ValueError(
                f"its samples {order_N[first]} and {order_N[first + 1]} have the same index {index_N[first]}"
            )
