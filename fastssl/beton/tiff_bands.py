"""Read a TIFF of many bands per pixel, such as a satellite image, of which Pillow shows three bands or none.

What it reads: the first page, integers or floats of 8 to 64 bits, in strips or tiles, bands next to each other or one
after the other, not compressed or compressed with deflate, with or without horizontal differences. All else is refused:
sizes and positions come from the file, and are checked against its bytes before memory is taken.
"""

import io
import zlib
from typing import NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Numbers of tags.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, BANDS, PLANAR = 256, 257, 258, 259, 262, 274, 277, 284
STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_SIZES = 273, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES = 322, 323, 324, 325
PREDICTOR, SAMPLE_FORMAT = 317, 339

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + : BigTIFF
NONE, DEFLATE = 1, (8, 32946)
MOST_PAGES = 10_000  # of a file; a limit on what a damaged one can make us read
KINDS = {1: "u", 2: "i", 3: "f"}  # SampleFormat -> numpy's kind
LIKELY = {5: "LZW", 7: "JPEG", 32773: "PackBits", 50000: "zstd"}  # other compressions, for messages


class Page(NamedTuple):
    """The first page of a TIFF."""

    tags: ImageFileDirectory_v2
    bands: int  # per pixel
    has_others: bool  # there are other pages
    has_twins: bool  # some of them are of its size; smaller ones are overviews


def first_page(content: bytes) -> Page | None:
    """Return the tags of the first page; None for a file that is no TIFF."""
    if not content.startswith(MAGIC):
        return None
    tags = _read_tags(content)
    size, has_twins = (tags.get(WIDTH), tags.get(HEIGHT)), False
    seen, position = {0}, tags.next
    while position not in seen:  # the pages of a damaged file may go in circles
        seen.add(position)
        if len(seen) > MOST_PAGES:
            raise ValueError(f"has more than {MOST_PAGES:,} pages")
        other = _read_tags(content, position)
        has_twins |= (other.get(WIDTH), other.get(HEIGHT)) == size
        position = other.next
    return Page(tags, int(tags.get(BANDS, 1)), len(seen) > 1, has_twins)


def _read_tags(content: bytes, position: int | None = None) -> ImageFileDirectory_v2:
    """Return the tags of the page at a position, of the first page by default."""
    tags = ImageFileDirectory_v2(content[:16] if b"+" in content[:4] else content[:8])
    file = io.BytesIO(content)
    file.seek(tags.next if position is None else position)
    tags.load(file)
    return tags


def read_bands(content: bytes, tags: ImageFileDirectory_v2, most_values: int) -> np.ndarray:
    """Return the pixels (H, W, bands) of a page, of the type that the file has. Raises ValueError if it is refused."""
    width, height, bands = (int(tags[tag]) for tag in (WIDTH, HEIGHT, BANDS))
    dtype = _dtype(tags, content[:2] == b"MM")
    compression, predictor = int(tags.get(COMPRESSION, NONE)), int(tags.get(PREDICTOR, 1))
    if compression != NONE and compression not in DEFLATE:
        name = LIKELY.get(compression, f"number {compression}")
        raise ValueError(f"has {bands} bands compressed with {name}: save it uncompressed, with deflate, or as pages")
    if predictor not in (1, 2) or (predictor == 2 and dtype.kind == "f"):
        raise ValueError(f"has bands with the predictor {predictor}: save it without one")
    if int(tags.get(PHOTOMETRIC, 1)) == 0:
        raise ValueError("stores white as 0: save it with black as 0")
    if int(tags.get(ORIENTATION, 1)) != 1:
        raise ValueError(f"is stored turned (orientation {tags[ORIENTATION]}): save it upright")
    is_tiled = TILE_OFFSETS in tags
    if is_tiled:
        block_width, block_height = int(tags[TILE_WIDTH]), int(tags[TILE_HEIGHT])
        starts, sizes = _numbers(tags[TILE_OFFSETS]), _numbers(tags[TILE_SIZES])
    else:
        block_width, block_height = width, min(height, int(tags.get(ROWS_PER_STRIP, height)))
        starts, sizes = _numbers(tags[STRIP_OFFSETS]), _numbers(tags[STRIP_SIZES])
    planes = bands if int(tags.get(PLANAR, 1)) == 2 else 1
    per_plane = bands // planes
    if min(width, height, block_width, block_height) < 1:
        raise ValueError("has no pixels")
    if max(width * height * bands, block_width * block_height * per_plane) > most_values:
        raise ValueError(f"has {width}x{height} pixels of {bands} bands: --max-megapixels sets the limit")
    across, down = -(-width // block_width), -(-height // block_height)
    if len(starts) != planes * across * down or len(sizes) != len(starts):
        raise ValueError(f"lacks some of its {planes * across * down} parts")

    pixels = np.empty((height, width, bands), dtype)
    for number, (start, size) in enumerate(zip(starts, sizes)):
        plane, rest = divmod(number, across * down)
        top, left = rest // across * block_height, rest % across * block_width
        rows = block_height if is_tiled else min(block_height, height - top)
        values = rows * block_width * per_plane
        block_bytes = content[start : start + size]
        if compression != NONE:
            block_bytes = zlib.decompressobj().decompress(block_bytes, values * dtype.itemsize)
        if len(block_bytes) < values * dtype.itemsize:
            raise ValueError("ends within its pixels")
        block = np.frombuffer(block_bytes, dtype, values).reshape(rows, block_width, per_plane)
        if predictor == 2:
            block = np.cumsum(block, axis=1, dtype=dtype)
        part = pixels[top : top + rows, left : left + block_width, plane * per_plane : (plane + 1) * per_plane]
        part[:] = block[: part.shape[0], : part.shape[1]]
    return pixels


def _dtype(tags: ImageFileDirectory_v2, is_big_endian: bool) -> np.dtype:
    """Return the type of the values, the same for all bands."""
    bits, kinds = set(_numbers(tags.get(BITS, 1))), set(_numbers(tags.get(SAMPLE_FORMAT, 1)))
    if len(bits) > 1 or len(kinds) > 1 or not bits <= {8, 16, 32, 64} or not kinds <= KINDS.keys():
        raise ValueError(f"has bands of {sorted(bits)} bits and sample format {sorted(kinds)}")
    kind, size = KINDS[kinds.pop()], bits.pop() // 8
    if kind == "f" and size == 1:
        raise ValueError("has bands of floats of 8 bits")
    return np.dtype(f"{'>' if is_big_endian else '<'}{kind}{size}")


def _numbers(value: object) -> list[int]:
    return [int(number) for number in value] if isinstance(value, tuple) else [int(value)]  # type: ignore[call-overload]
