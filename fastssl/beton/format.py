"""The layout of a .beton file (FFCV's version 2): the types of its tables, and how a file is laid out and completed.

    header | field descriptors | metadata, one row per sample | ... page | page | page | allocation table

The dtypes repeat `ffcv.types` and `ffcv.fields`, because importing ffcv imports torch and numba, which takes seconds in
every worker process. A test compares them with ffcv's own.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

VERSION = 2
PAGE_SIZE = 1 << 23  # bytes; FFCV's default. No sample may cross the end of a page.
SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31  # bytes; powers of two, FFCV's own limits

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
JPG, RAW = 0, 1  # the values of IMAGE["mode"]
UNLABELLED = -1  # the label of an image without one
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])

# FFCV's type id -> (the name of its field class, the dtype of a sample's metadata)
FIELD_TYPES = {
    0: ("FloatField", np.dtype("<f8")),
    1: ("IntField", np.dtype("<i8")),
    2: ("RGBImageField", IMAGE),
    3: ("BytesField", BYTES),
    4: ("NDArrayField", np.dtype("<u8")),
    5: ("JSONField", BYTES),
    6: ("TorchTensorField", np.dtype("<u8")),
}
INT_FIELD, IMAGE_FIELD = 1, 2

# The fields of every .beton that fastssl writes, in this order.
OUR_FIELDS = {"image": IMAGE_FIELD, "label": INT_FIELD, "index": INT_FIELD, "height": INT_FIELD, "width": INT_FIELD}

# The contents of X.beton.json. PartialBuild.finish and build.py write it; a file from elsewhere may lack any key.
Manifest = dict[str, Any]

# A row describes one image that a build has processed. Rows have the order of the file.
# `case` is an images.Case; for a bad image only `case` and `index` are set.
ROW = np.dtype(
    [
        ("index", "<i8"),
        ("label", "<i8"),
        ("case", "u1"),
        ("mode", "u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("source_width", "<u4"),
        ("source_height", "<u4"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("data_ptr", "<u8"),
        ("source_format", "S8"),
        ("is_nearly_black", "?"),
    ]
)


def manifest_path(path: Path) -> Path:
    """X.beton.json: how X.beton was built, what happened to the images, class names and checksums."""
    return path.with_name(path.name + ".json")


def names_path(path: Path) -> Path:
    """X.beton.names.txt: line i + 1 is the name of the image whose `index` is i."""
    return path.with_name(path.name + ".names.txt")


def metadata_type(fields: dict[str, int]) -> np.dtype[np.void]:
    """Return the dtype of one sample's metadata, aligned as in FFCV; `fields` maps names to type ids."""
    return np.dtype([(name, FIELD_TYPES[type_id][1]) for name, type_id in fields.items()], align=True)


def align(offset: int, page_size: int = PAGE_SIZE) -> int:
    """Return the first page boundary at or after `offset`, in bytes."""
    return -(-offset // page_size) * page_size


def data_start(capacity: int) -> int:
    """Return the position of the first sample, in bytes: the first page after the metadata of `capacity` samples.

    The number of bad images is known only at the end of a build, so there is room for the metadata of all images.
    """
    tables = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
    return align(tables + capacity * metadata_type(OUR_FIELDS).itemsize)


def allocate(sizes: Sequence[int], position: int) -> tuple[list[int], int]:
    """Return the positions of samples with these sizes, starting at `position`, and the end of the last; all in bytes.

    A sample that would cross the end of a page begins on the next one; the gap is filled with zeros.
    """
    pointers = []
    for size in sizes:
        end_of_page = align(position + 1)
        if position + size > end_of_page:
            position = end_of_page
        pointers.append(position)
        position += size
    return pointers, position


def write_tables(file: BinaryIO, rows: np.ndarray, position: int) -> np.ndarray:
    """Complete a file that holds only samples: write all tables, wait until they are on the disk, return the metadata.

    `rows` has one ROW per sample, in the order of the file; the last sample ends at byte `position`.
    """
    metadata = np.zeros(len(rows), metadata_type(OUR_FIELDS))
    for name in IMAGE.names or ():
        metadata["image"][name] = rows[name]
    for name, column in (
        ("label", "label"),
        ("index", "index"),
        ("height", "source_height"),
        ("width", "source_width"),
    ):
        metadata[name] = rows[column]
    descriptors = np.zeros(len(OUR_FIELDS), FIELD)
    for descriptor, (name, type_id) in zip(descriptors, OUR_FIELDS.items()):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    allocations = np.zeros(len(rows), ALLOCATION)
    allocations["sample_id"] = np.arange(len(rows))
    allocations["ptr"] = rows["data_ptr"]
    allocations["size"] = rows["size"]

    file.seek(position)
    file.write(allocations.tobytes())
    file.truncate()
    file.seek(HEADER.itemsize)
    file.write(descriptors.tobytes())
    file.write(metadata.tobytes())
    file.flush()
    os.fsync(file.fileno())
    # The header comes last: until then the version is 0, so a file that is cut off at any moment is refused.
    file.seek(0)
    file.write(np.array((VERSION, len(OUR_FIELDS), PAGE_SIZE, len(rows), position), HEADER).tobytes())
    file.flush()
    os.fsync(file.fileno())
    return metadata
