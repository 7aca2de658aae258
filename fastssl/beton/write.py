"""The layout of one .beton file: where samples go, and the tables around them.

    header | field descriptors | metadata, one row a sample | ... page | page | page | allocations

Samples are placed in order, each behind the last, so the file does not depend on who writes them.
Until the header is written the version reads 0, so a file cut off at any moment is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from fastssl.beton.format import (
    ALLOCATION,
    FIELD,
    FIELD_TYPES,
    HEADER,
    OUR_FIELDS,
    PAGE_SIZE,
    VERSION,
    align,
    metadata_type,
)

# What a build knows of each image it has handled, in the order of the file. `case` is an
# images.Case; of a bad image only `case` and `index` are set.
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
    ]
)


def data_start(capacity: int) -> int:
    """Where the first sample goes, in bytes: behind the metadata of `capacity` samples.

    How many images turn out bad is known only at the end, so room is kept for all.
    """
    tables = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
    return align(tables + capacity * metadata_type(OUR_FIELDS).itemsize)


def place(sizes: Sequence[int], position: int) -> tuple[list[int], int]:
    """Where samples of these sizes go from `position` on, in bytes, and the position behind them.

    A sample that would cross the end of a page begins on the next one; the gap reads as zeros.
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
    """Make a file whose samples are in place a .beton; returns the metadata as written.

    `rows` (ROW) describes its samples, `position` is the byte behind the last of them. Returns
    when everything is on the disk.
    """
    metadata = np.zeros(len(rows), metadata_type(OUR_FIELDS))
    for name in ("mode", "width", "height", "data_ptr"):
        metadata["image"][name] = rows[name]
    metadata["label"], metadata["index"] = rows["label"], rows["index"]
    metadata["height"], metadata["width"] = rows["source_height"], rows["source_width"]
    allocations = np.zeros(len(rows), ALLOCATION)
    allocations["sample_id"] = np.arange(len(rows))
    allocations["ptr"], allocations["size"] = rows["data_ptr"], rows["size"]

    file.seek(position)
    file.write(allocations.tobytes())
    file.truncate()
    file.seek(HEADER.itemsize)
    file.write(_field_descriptors().tobytes())
    file.write(metadata.tobytes())
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    header = (VERSION, len(OUR_FIELDS), PAGE_SIZE, len(rows), position)
    file.write(np.array(header, HEADER).tobytes())
    file.flush()
    os.fsync(file.fileno())
    return metadata


def _field_descriptors() -> np.ndarray:
    descriptors = np.zeros(len(OUR_FIELDS), FIELD)
    for descriptor, (name, type_id) in zip(descriptors, OUR_FIELDS.items(), strict=True):
        assert type_id in FIELD_TYPES and len(name) <= 16
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return descriptors
