"""The layout of a .beton file (FFCV's version 2): the types of its tables, and how a file is laid out and completed.

    header | field descriptors | metadata, one row per sample | ... page | page | page | allocation table

The dtypes repeat `ffcv.types` and `ffcv.fields`, because importing ffcv imports torch and numba, which takes seconds in
every worker process. A test compares them with ffcv's own.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
BC4 = 2  # the same for a canvas in blocks (bc4.py); in memory only, as it is in an ARRAY_FIELD on the disk
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
INT_FIELD, IMAGE_FIELD, ARRAY_FIELD = 1, 2, 4

RGB = 3  # channels of the images of an IMAGE_FIELD
MOST_CHANNELS = 64  # of other images, which are in an ARRAY_FIELD; also the most of model.in_chans
# The arguments of an ARRAY_FIELD: the shape of every sample, (H, W, C) and zeros, and the length of its type, which
# follows in JSON.
ARRAY = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
UINT8 = b'[["", "|u1"]]'
BC4_MARK = b"bc4"  # follows the type in the arguments of an ARRAY_FIELD whose arrays are canvases in BC4, (bytes,)
BC4_SIDE = 8  # px; sides of such canvases are multiples of it
LARGEST_BC4_SIDE = 3344  # px; more bytes do not fit into a page of PAGE_SIZE

# The fields of every .beton of RGB images that fastssl writes, in this order.
OUR_FIELDS = {"image": IMAGE_FIELD, "label": INT_FIELD, "index": INT_FIELD, "height": INT_FIELD, "width": INT_FIELD}

# Those of images with another number of channels, each a uint8 array (H, W, C), and of canvases in BC4.
OUR_ARRAY_FIELDS = {**OUR_FIELDS, "image": ARRAY_FIELD}

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


def indexed_names_path(path: Path) -> Path:
    """X.beton.names.tsv of a shard: index, a tab, and the name of each image that was listed for it."""
    return path.with_name(path.name + ".names.tsv")


def metadata_type(fields: dict[str, int]) -> np.dtype[np.void]:
    """Return the dtype of one sample's metadata, aligned as in FFCV; `fields` maps names to type ids."""
    return np.dtype([(name, FIELD_TYPES[type_id][1]) for name, type_id in fields.items()], align=True)


def bc4_bytes(side: int) -> int:
    """Return the bytes of a canvas in BC4: half a byte for each pixel of Y, an eighth each for Cb and Cr."""
    return side * side * 3 // 4


def is_bc4_side(side: int) -> bool:
    """Whether a canvas of `side` px can be in BC4."""
    return 0 < side <= LARGEST_BC4_SIDE and side % BC4_SIDE == 0


class ArrayImages(NamedTuple):
    """The images of an ARRAY_FIELD."""

    height: int  # px
    width: int
    channels: int
    mode: int  # RAW or BC4

    def arguments(self) -> bytes:
        """Return the arguments of the field, as `ffcv.fields.NDArrayField.to_binary`."""
        header = np.zeros(1, ARRAY)
        shape = (bc4_bytes(self.height),) if self.mode == BC4 else self[:3]
        header["shape"][0, : len(shape)] = shape
        header["type_length"] = len(UINT8)
        return header.tobytes() + UINT8 + (BC4_MARK if self.mode == BC4 else b"")


def read_array_images(arguments: np.ndarray) -> ArrayImages:
    """Return what the arguments of an ARRAY_FIELD, uint8 (1024,), state.

    Raises ValueError unless they are those of uint8 images or of canvases in BC4.
    """
    content = arguments.tobytes()
    header = np.frombuffer(content, ARRAY, 1)[0]
    length, sides = int(header["type_length"]), header["shape"].tolist()
    described = content[ARRAY.itemsize : ARRAY.itemsize + min(length, len(content))]
    if described != UINT8:
        raise ValueError("its images are arrays of another type than uint8")
    if content[ARRAY.itemsize + length :].startswith(BC4_MARK):
        side = math.isqrt(min(sides[0], LARGEST_PAGE) * 4 // 3)
        if any(sides[1:]) or not is_bc4_side(side) or bc4_bytes(side) != sides[0]:
            raise ValueError(f"its images are said to be in BC4, but {sides[0]:,} bytes are not a square in BC4")
        return ArrayImages(side, side, RGB, BC4)
    height, width, channels = sides[:3]
    if any(sides[3:]) or not (0 < height < 1 << 16 and 0 < width < 1 << 16 and 0 < channels <= MOST_CHANNELS):
        shape = [side for side in sides if side]
        raise ValueError(f"its images are arrays of shape {shape}, not (height, width, 1 to {MOST_CHANNELS} channels)")
    return ArrayImages(height, width, channels, RAW)


def align(offset: int, page_size: int = PAGE_SIZE) -> int:
    """Return the first page boundary at or after `offset`, in bytes."""
    return -(-offset // page_size) * page_size


def data_start(capacity: int) -> int:
    """Return the position of the first sample, in bytes: the first page after the metadata of `capacity` samples.

    The number of bad images is known only at the end of a build, so there is room for the metadata of all images. That
    of images in an array field is smaller.
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


def write_tables(file: BinaryIO, rows: np.ndarray, position: int, channels: int = RGB) -> np.ndarray:
    """Complete a file that holds only samples: write all tables, wait until they are on the disk, return the metadata.

    `rows` has one ROW per sample, in the order of the file; the last sample ends at byte `position`. If `channels` is
    not RGB, all samples are pixels of one size. If the first one is in BC4, all are, of one size.
    """
    first = rows[0]
    in_arrays = channels != RGB or first["mode"] == BC4
    fields = OUR_ARRAY_FIELDS if in_arrays else OUR_FIELDS
    metadata = np.zeros(len(rows), metadata_type(fields))
    if not in_arrays:
        for name in IMAGE.names or ():
            metadata["image"][name] = rows[name]
    else:
        metadata["image"] = rows["data_ptr"]
    for name, column in (
        ("label", "label"),
        ("index", "index"),
        ("height", "source_height"),
        ("width", "source_width"),
    ):
        metadata[name] = rows[column]
    descriptors = np.zeros(len(fields), FIELD)
    for descriptor, (name, type_id) in zip(descriptors, fields.items()):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        if type_id == ARRAY_FIELD:
            images = ArrayImages(int(first["height"]), int(first["width"]), channels, int(first["mode"]))
            arguments = images.arguments()
            descriptor["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
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
    file.write(np.array((VERSION, len(fields), PAGE_SIZE, len(rows), position), HEADER).tobytes())
    file.flush()
    os.fsync(file.fileno())
    return metadata
