"""Resized crops of images in planes (Y, Cb, Cr), as JPEGs and canvases in blocks store them, to RGB pixels.

Each plane is resized at its own resolution, and only the crop becomes RGB. That leaves out upsampling the color of the
whole image, and a plane needs a third of the arithmetic of RGB pixels. A crop is made LANES rows at a time: each plane
is resized to that many rows, transposed so that the width is resized by adding whole lines too, and transposed back.
All of that stays in the cache, in 16-bit numbers: gray levels in units of 1/256. The result is within one gray level of
the exact one, and within two if the image is dozens of times larger than the crop.
"""

import math
from typing import NamedTuple

import numpy as np

from fastssl.beton.resize import resize_weights
from fastssl.common.compiled import compiled
from fastssl.loading.vectors import LANES, TILE, fill, load, load_bytes, multiply_add, store, store_rgb, transpose

UNIT = 65535  # the sum of the weights of a position
# How many times smaller than the image a crop may be. A position then has 129 weights, whose roundings add up to half a
# gray level at most.
LARGEST_SHRINK = 64


class Planes(NamedTuple):
    """A decoded image: uint8 planes, whose rows may be longer than the image. LANES bytes after each are readable."""

    y: np.ndarray
    cb: np.ndarray
    cr: np.ndarray
    height: int  # of the image, in px
    width: int
    rows: int  # pixels of luma that one of chroma spans, vertically and horizontally
    columns: int


class CropScratch(NamedTuple):
    """A thread's own memory."""

    image: np.ndarray  # uint8: a decoded image, as pixels or as planes
    row: np.ndarray  # float32: a row of pixels
    lines: np.ndarray  # uint16 (LANES, longest row): a plane, resized to LANES rows of the crop
    columns: np.ndarray  # uint16 (longest row, LANES): the same, transposed
    resized: np.ndarray  # uint16 (width, LANES): columns of the crop
    y: np.ndarray  # uint16 (LANES, width): rows of the crop
    cb: np.ndarray
    cr: np.ndarray
    rgb_row: np.ndarray  # uint8 (3 width,): a row of the crop


def _shapes(shape_N2: np.ndarray, size: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Type and shape of each array of `CropScratch`, for images of these heights and widths."""
    # A plane of luma may be up to three pixels larger than the image, and LANES bytes after the last one are read.
    largest = 3 * int((shape_N2 + 3).prod(axis=1).max()) + LANES
    widest = int(shape_N2[:, 1].max())
    longest = _whole_vectors(widest) + LANES
    width = _whole_vectors(size)
    crop_rows = (np.uint16, (LANES, width))
    return {
        "image": (np.uint8, (largest,)),
        "row": (np.float32, (3 * widest,)),
        "lines": (np.uint16, (LANES, longest)),
        "columns": (np.uint16, (longest, LANES)),
        "resized": (np.uint16, (width, LANES)),
        "y": crop_rows,
        "cb": crop_rows,
        "cr": crop_rows,
        "rgb_row": (np.uint8, (3 * width,)),
    }


def new_scratch(shape_N2: np.ndarray, size: int) -> CropScratch:
    """Memory for crops of `size` px from images of these heights and widths."""
    return CropScratch(**{name: _aligned(*kind) for name, kind in _shapes(shape_N2, size).items()})


def scratch_bytes(shape_N2: np.ndarray, size: int) -> int:
    """Bytes that `new_scratch` takes."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in _shapes(shape_N2, size).values())


def _aligned(dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """An array that starts with a cache line, so that no vector lies in two of them."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _whole_vectors(count: int) -> int:
    return -(-count // LANES) * LANES


@compiled()
def crop_planes(planes: Planes, box: np.ndarray, flip: bool, out_YXC: np.ndarray, scratch: CropScratch) -> None:
    """Resize a box of an image to fill `out_YXC`, uint8 RGB (size, size, 3), mirrored where `flip`.

    The filter is that of `resize_box`. box: top, left, height, width in px, float.
    """
    size = out_YXC.shape[0]
    top, left, height, width = box
    c_height = (planes.height + planes.rows - 1) // planes.rows
    c_width = (planes.width + planes.columns - 1) // planes.columns
    first_Y, weight_YK = _fixed_weights(top, height, size, planes.height)
    first_X, weight_XK = _fixed_weights(left, width, size, planes.width)
    c_first_Y, c_weight_YK = _fixed_weights(top / planes.rows, height / planes.rows, size, c_height)
    c_first_X, c_weight_XK = _fixed_weights(left / planes.columns, width / planes.columns, size, c_width)
    row_length = scratch.y.shape[1]
    out = out_YXC.reshape(-1)
    for strip in range(0, size, LANES):
        _resize_rows(planes.y, strip, first_Y, weight_YK, first_X, weight_XK, flip, scratch, scratch.y)
        _resize_rows(planes.cb, strip, c_first_Y, c_weight_YK, c_first_X, c_weight_XK, flip, scratch, scratch.cb)
        _resize_rows(planes.cr, strip, c_first_Y, c_weight_YK, c_first_X, c_weight_XK, flip, scratch, scratch.cr)
        for y in range(strip, min(strip + LANES, size)):
            # A vector may end beyond its row, which the next row then overwrites, but not beyond the crop.
            start = 3 * size * y
            fits = start + 3 * row_length <= len(out)
            line = out if fits else scratch.rgb_row
            line_start = start if fits else 0
            for x in range(0, size, LANES):
                at = (y - strip) * row_length + x
                store_rgb(load(scratch.y, at), load(scratch.cb, at), load(scratch.cr, at), line, line_start + 3 * x)
            if not fits:
                for i in range(3 * size):
                    out[start + i] = line[i]


@compiled()
def _resize_rows(
    plane: np.ndarray,
    top: int,
    first_Y: np.ndarray,
    weight_YK: np.ndarray,
    first_X: np.ndarray,
    weight_XK: np.ndarray,
    flip: bool,
    scratch: CropScratch,
    out: np.ndarray,
) -> None:
    """Compute LANES rows of a crop from row `top` on, in units of 1/256; those after the last one repeat it.

    first_Y, weight_YK, first_X, weight_XK: see `_fixed_weights`.
    """
    size = len(first_Y)
    begin = first_X[0]
    width = first_X[-1] + weight_XK.shape[1] - begin
    length = scratch.lines.shape[1]
    count = weight_YK.shape[1]
    # Products are rounded down: half a unit for each.
    rounding = fill(np.uint16(count // 2))
    for i in range(LANES):
        y = min(top + i, size - 1)
        start = first_Y[y] * plane.shape[1] + begin
        if count == 2:  # most crops of canvases are enlarged
            weight = weight_YK[y, 0]
            next_weight = weight_YK[y, 1]
            next_start = start + plane.shape[1]
            for x in range(0, width, LANES):
                total = multiply_add(rounding, load_bytes(plane, start + x), weight)
                total = multiply_add(total, load_bytes(plane, next_start + x), next_weight)
                store(total, scratch.lines, i * length + x)
        else:
            for x in range(0, width, LANES):
                total = rounding
                for k in range(count):
                    total = multiply_add(total, load_bytes(plane, start + k * plane.shape[1] + x), weight_YK[y, k])
                store(total, scratch.lines, i * length + x)
    for i in range(0, LANES, TILE):
        for x in range(0, width, TILE):
            transpose(scratch.lines, i * length + x, length, scratch.columns, x * LANES + i, LANES)
    count = weight_XK.shape[1]
    rounding = fill(np.uint16(count // 2))
    for x in range(size):
        at = (first_X[x] - begin) * LANES
        if count == 2:
            total = multiply_add(rounding, load(scratch.columns, at), weight_XK[x, 0])
            total = multiply_add(total, load(scratch.columns, at + LANES), weight_XK[x, 1])
        else:
            total = rounding
            for k in range(count):
                total = multiply_add(total, load(scratch.columns, at + k * LANES), weight_XK[x, k])
        store(total, scratch.resized, (size - 1 - x if flip else x) * LANES)
    row_length = out.shape[1]
    for x in range(0, size, TILE):
        for i in range(0, LANES, TILE):
            transpose(scratch.resized, x * LANES + i, LANES, out, i * row_length + x, row_length)


@compiled()
def _fixed_weights(start: float, length: float, out_size: int, in_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The result of `resize_weights`, with weights in units of 1/65536: uint16, whose sum is UNIT at each position."""
    first_S, weight_SK = resize_weights(start, length, out_size, in_size)
    fixed_SK = np.empty(weight_SK.shape, np.uint16)
    for position in range(out_size):
        total = 0.0
        given = 0
        for k in range(weight_SK.shape[1]):
            total += UNIT * weight_SK[position, k]
            fixed_SK[position, k] = int(total + 0.5) - given
            given = int(total + 0.5)
    return first_S, fixed_SK
