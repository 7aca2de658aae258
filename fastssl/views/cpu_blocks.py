"""Crops of images in blocks, for the CPU kernel: from the blocks of the crop's window to planes of RGB.

Each plane of the image is decoded within the window only, transposed. So both passes of the resize add whole lines,
several values per instruction: first the columns, then, transposed back, the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastssl.beton.bc4 import BLOCK, decode_transposed
from fastssl.beton.resize import resize_weights
from fastssl.common.compiled import compiled
from fastssl.views.operations import BLUE_OF_CB, GREEN_OF_CB, GREEN_OF_CR, RED_OF_CR

TILE = 8  # px; the side of the squares that are transposed in registers
_kernel = compiled(fastmath={"contract"})  # as in cpu.py
_inlined = compiled(inline="always")


class Scratch(NamedTuple):
    """A thread's own memory."""

    window: np.ndarray  # uint8: the decoded window of a plane
    lines: np.ndarray  # float32 (TILE, side): columns of a window, resized
    y: np.ndarray  # float32 (side, width): luma, resized to the width of the view
    cb: np.ndarray  # the same for chroma, (side / 2, width)
    cr: np.ndarray
    y_line: np.ndarray  # float32 (width,): a row of the view
    cb_line: np.ndarray
    cr_line: np.ndarray


@_kernel
def new_scratch(side: int, size: int) -> Scratch:
    """Memory for the crops of a thread, of `size` px from images of `side` px."""
    width = (size + TILE - 1) // TILE * TILE  # whole tiles
    half = (side // 2 + TILE - 1) // TILE * TILE
    return Scratch(
        np.empty(side * side, np.uint8),
        np.empty((TILE, side), np.float32),
        np.empty((side, width), np.float32),
        np.empty((half, width), np.float32),
        np.empty((half, width), np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
    )


@_kernel
def resize_blocks_to_planes(
    blocks: np.ndarray, side: int, box: np.ndarray, flip: bool, out_CSS: np.ndarray, scratch: Scratch
) -> None:
    """Resize a box of an image in blocks to planes of RGB, floats in [0, 1], mirrored where `flip`.

    Luma and chroma are resized at their own resolutions. box: top, left, height, width in pixels of luma.
    """
    size = out_CSS.shape[1]
    half = side // 2
    y_bytes = side * half
    c_bytes = y_bytes // 4
    first_Y, weight_YK = _resize_width(blocks[:y_bytes], side, box, size, flip, scratch, scratch.y)
    cb_blocks = blocks[y_bytes : y_bytes + c_bytes]
    cr_blocks = blocks[y_bytes + c_bytes :]
    _resize_width(cb_blocks, half, box / 2, size, flip, scratch, scratch.cb)
    c_first_Y, c_weight_YK = _resize_width(cr_blocks, half, box / 2, size, flip, scratch, scratch.cr)
    middle = np.float32(128 / 255)
    zero = np.float32(0)
    one = np.float32(1)
    for y in range(size):
        _add_rows(scratch.y, first_Y[y], weight_YK[y], scratch.y_line)
        _add_rows(scratch.cb, c_first_Y[y], c_weight_YK[y], scratch.cb_line)
        _add_rows(scratch.cr, c_first_Y[y], c_weight_YK[y], scratch.cr_line)
        red = out_CSS[0, y]
        green = out_CSS[1, y]
        blue = out_CSS[2, y]
        for x in range(size):
            luma = scratch.y_line[x]
            cb = scratch.cb_line[x] - middle
            cr = scratch.cr_line[x] - middle
            red[x] = min(max(luma + np.float32(RED_OF_CR) * cr, zero), one)
            green[x] = min(max(luma + np.float32(GREEN_OF_CB) * cb + np.float32(GREEN_OF_CR) * cr, zero), one)
            blue[x] = min(max(luma + np.float32(BLUE_OF_CB) * cb, zero), one)


@_kernel
def _resize_width(
    blocks: np.ndarray, side: int, box: np.ndarray, size: int, flip: bool, scratch: Scratch, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the window of a box and resize its width: to `out`, in [0, 1], a row for each row of the window.

    Returns the first of these rows and the weights for each row of the view, to resize the height (`resize_weights`).
    """
    top, left, height, width = box
    first_Y, weight_YK = resize_weights(top, height, size, side)
    first_X, weight_XK = resize_weights(left, width, size, side)
    # The window in blocks.
    first_row = first_Y[0] // BLOCK
    first_column = first_X[0] // BLOCK
    rows = (first_Y[-1] + weight_YK.shape[1] - 1) // BLOCK + 1 - first_row
    columns = (first_X[-1] + weight_XK.shape[1] - 1) // BLOCK + 1 - first_column
    rows *= BLOCK
    columns *= BLOCK
    window_XY = scratch.window[: columns * rows].reshape((columns, rows))
    decode_transposed(blocks, first_row, first_column, window_XY)
    first_Y -= BLOCK * first_row
    first_X -= BLOCK * first_column
    weight_XK /= np.float32(255)
    for column in range(0, size, TILE):
        for i in range(TILE):
            x = min(column + i, size - 1)
            x = size - 1 - x if flip else x
            _add_rows(window_XY, first_X[x], weight_XK[x], scratch.lines[i, :rows])
        for row in range(0, rows, TILE):  # the last rows of the last tile may be of no use
            _transpose_tile(scratch.lines, row, out, row, column)
    return first_Y, weight_YK


@_inlined
def _add_rows(rows: np.ndarray, first: int, weight_K: np.ndarray, out: np.ndarray) -> None:
    """Compute the weighted sum of rows from `first` on."""
    count = len(weight_K)
    # Most crops are enlarged, with two weights.
    row = rows[first]
    next_row = rows[first + 1] if count > 1 else row
    weight = weight_K[0]
    next_weight = weight_K[1] if count > 1 else np.float32(0)
    for i in range(len(out)):
        out[i] = weight * np.float32(row[i]) + next_weight * np.float32(next_row[i])
    for k in range(2, count):
        weight = weight_K[k]
        if weight > 0:
            row = rows[first + k]
            for i in range(len(out)):
                out[i] += weight * np.float32(row[i])


def _transpose(
    typing_context: Any, source: types.Array, left: types.Type, out: types.Array, top: types.Type, out_left: types.Type
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), TILE)
        pointer = vector.as_pointer()

        def address(array: Any, row: Any, column: Any) -> Any:
            width = builder.extract_value(array.shape, 1)
            return builder.bitcast(builder.gep(array.data, [builder.add(builder.mul(width, row), column)]), pointer)

        def number(value: int) -> Any:
            return context.get_constant(types.intp, value)

        arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2)]
        rows = [builder.load(address(arrays[0], number(i), arguments[1]), align=4) for i in range(TILE)]
        # Rows i and i + step exchange a quarter: for step 1, the odd elements of the first for the even ones of the
        # second; then the same with pairs of elements, and with groups of four.
        for step in (1, 2, 4):
            first = [k if k & step == 0 else TILE + k - step for k in range(TILE)]
            second = [k + step if k & step == 0 else TILE + k for k in range(TILE)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), TILE), mask) for mask in (first, second)]
            for i in range(TILE):
                if i & step == 0:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for i in range(TILE):
            builder.store(rows[i], address(arrays[1], builder.add(arguments[3], number(i)), arguments[4]), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, out, types.intp, types.intp), generate


# Within compiled code, _transpose_tile(source, left, out, top, out_left) sets
# out[top : top + TILE, out_left : out_left + TILE] = source[:TILE, left : left + TILE].T
# for contiguous arrays of float32, in 16 vector loads and stores. A loop would take six times as long.
_transpose_tile = cast("Callable[[np.ndarray, int, np.ndarray, int, int], None]", intrinsic(_transpose))
