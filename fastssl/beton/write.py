"""Write one .beton file: images into pages as they come, the tables at the end, the header last.

    header | field descriptors | metadata, one row a sample | ... page | page | page | allocations

Until the header is written the version reads 0, so a file cut off at any moment is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .format import (
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
from .images import Encoded


class BetonWriter:
    """Appends samples to an empty file open for binary writing; `finish` makes it a .beton.

    `capacity` is the largest number of samples that may come: room for their metadata is kept
    in front of the pages, since how many images turn out bad is known only at the end.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        self._file = file
        self._metadata = np.zeros(capacity, metadata_type(OUR_FIELDS))
        self._allocations = np.zeros(capacity, ALLOCATION)
        self._metadata_start = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
        self._position = align(self._metadata_start + self._metadata.nbytes)
        self.samples = 0

    def add(self, image: Encoded, label: int, index: int) -> None:
        """Append one sample. `index` is its position in the builder's source order."""
        size = len(image.payload)
        end_of_page = align(self._position + 1)
        if self._position + size > end_of_page:
            self._position = end_of_page
        self._file.seek(self._position)  # skipped bytes read as zeros
        self._file.write(image.payload)

        stored = (image.mode, image.width, image.height, self._position)
        row = (stored, label, index, image.source_height, image.source_width)
        self._metadata[self.samples] = row
        self._allocations[self.samples] = (self.samples, self._position, size)
        self._position += size
        self.samples += 1

    def finish(self) -> None:
        """Write the tables and the header, and wait until everything is on the disk."""
        alloc_table_ptr = self._position
        self._file.seek(alloc_table_ptr)
        self._file.write(self._allocations[: self.samples].tobytes())
        self._file.seek(HEADER.itemsize)
        self._file.write(_field_descriptors().tobytes())
        self._file.write(self._metadata[: self.samples].tobytes())
        self._file.seek(0)
        header = (VERSION, len(OUR_FIELDS), PAGE_SIZE, self.samples, alloc_table_ptr)
        self._file.write(np.array(header, HEADER).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())


def _field_descriptors() -> np.ndarray:
    descriptors = np.zeros(len(OUR_FIELDS), FIELD)
    for descriptor, (name, type_id) in zip(descriptors, OUR_FIELDS.items(), strict=True):
        assert type_id in FIELD_TYPES and len(name) <= 16
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return descriptors


def replace_durably(part: Path, final: Path) -> None:
    """Give a finished file its final name, and make that survive a power cut."""
    os.replace(part, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
