"""The layout of a .beton file, FFCV's version 2, as numpy dtypes.

These repeat what `ffcv.types` and `ffcv.fields` declare, because importing ffcv imports torch and
numba: seconds for every worker process that only encodes images. tests/test_beton.py holds them
equal to ffcv's own.
"""

from __future__ import annotations

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
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])

# FFCV's type id -> (the name of its field class, what each sample's metadata holds for it)
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

# The fields of every .beton that this project writes, in this order.
OUR_FIELDS = {
    "image": IMAGE_FIELD,
    "label": INT_FIELD,
    "index": INT_FIELD,
    "height": INT_FIELD,
    "width": INT_FIELD,
}


def metadata_type(fields: dict[str, int]) -> np.dtype:
    """The dtype of one sample's metadata, aligned as FFCV aligns it; `fields`: name -> type id."""
    return np.dtype([(name, FIELD_TYPES[type_id][1]) for name, type_id in fields.items()], align=True)


def align(offset: int, page_size: int = PAGE_SIZE) -> int:
    """The first page boundary at or after `offset`, in bytes."""
    return -(-offset // page_size) * page_size
