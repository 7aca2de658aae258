"""Compress a canvas to blocks that need no entropy decoding, and decode them (build-beton --codec bc4).

An image becomes three planes: Y at full resolution, Cb and Cr at half of it (JFIF's full-range BT.601; chroma is the
mean of 2x2 pixels). Every plane is stored as 4x4 blocks of 8 bytes in BC4, the format of GPUs for one channel (also
called RGTC1; Khronos Data Format Specification 1.3, section 14): two endpoints and an index of 3 bits for each pixel,
which selects one of eight levels between the endpoints. So a canvas takes 6 bits a pixel, and each pixel of it can be
read by itself. docs/files.md has the layout of the bytes.

Importing this imports numba (0.4 s), so only what encodes or decodes does.
"""

import numpy as np

from fastssl.beton.format import bc4_bytes
from fastssl.common.compiled import compiled

BLOCK = 4  # px; the side of a block
BLOCK_BYTES = 8
LANES = 64  # blocks that are encoded at the same time, so that the compiler uses vector instructions

# YCbCr to RGB in units of 1/65536.
RED_OF_CR, GREEN_OF_CB, GREEN_OF_CR, BLUE_OF_CB = 91881, -22554, -46802, 116130


@compiled()
def encode(pixels_HWC: np.ndarray) -> np.ndarray:
    """Compress uint8 RGB pixels (side, side, 3), with a side that is a multiple of 8, to uint8 (bytes,)."""
    side = pixels_HWC.shape[0]
    half = side // 2
    y = np.empty((side, side), np.uint8)
    cb = np.empty((half, half), np.uint8)
    cr = np.empty((half, half), np.uint8)
    _to_planes(pixels_HWC, y, cb, cr)
    out = np.empty(side * side * 3 // 4, np.uint8)
    luma_bytes = side * side // 2
    _encode_plane(y, out[:luma_bytes])
    _encode_plane(cb, out[luma_bytes : luma_bytes + luma_bytes // 4])
    _encode_plane(cr, out[luma_bytes + luma_bytes // 4 :])
    return out


def decode(blocks: np.ndarray, side: int) -> np.ndarray:
    """Decompress uint8 (bytes,) to RGB pixels (side, side, 3). Any bytes of the right number decode to something."""
    if blocks.shape != (bc4_bytes(side),):
        raise ValueError(f"{len(blocks):,} bytes are not a canvas of {side} px in BC4")
    pixels_HWC = np.empty((side, side, 3), np.uint8)
    decode_into(np.array(blocks), pixels_HWC)
    return pixels_HWC


@compiled()
def decode_into(blocks: np.ndarray, out_HWC: np.ndarray) -> None:
    """Decompress a canvas to RGB pixels; chroma is interpolated between the centers of its pixels.

    Integer arithmetic throughout, so that fastssl.loading.blocks gives the same pixels on every device.
    """
    side = out_HWC.shape[0]
    half = side // 2
    y = np.empty((side, side), np.uint8)
    cb = np.empty((half, half), np.uint8)
    cr = np.empty((half, half), np.uint8)
    luma_bytes = side * side // 2
    decode_plane(blocks[:luma_bytes], 0, 0, y)
    decode_plane(blocks[luma_bytes : luma_bytes + luma_bytes // 4], 0, 0, cb)
    decode_plane(blocks[luma_bytes + luma_bytes // 4 :], 0, 0, cr)
    blue_line = np.empty(half, np.int32)  # of chroma between two rows, times 4
    red_line = np.empty(half, np.int32)
    for row in range(side):
        near = row // 2
        far = min(max(near + (1 if row % 2 else -1), 0), half - 1)
        for x in range(half):
            blue_line[x] = 3 * np.int32(cb[near, x]) + np.int32(cb[far, x])
            red_line[x] = 3 * np.int32(cr[near, x]) + np.int32(cr[far, x])
        for x in range(side):
            near_x = x // 2
            far_x = min(max(near_x + (1 if x % 2 else -1), 0), half - 1)
            blue = 3 * blue_line[near_x] + blue_line[far_x] - np.int32(2048)  # times 16, around 0
            red = 3 * red_line[near_x] + red_line[far_x] - np.int32(2048)
            luma = (np.int32(y[row, x]) << np.int32(20)) + np.int32(1 << 19)
            out_HWC[row, x, 0] = _to_byte(luma + np.int32(RED_OF_CR) * red)
            out_HWC[row, x, 1] = _to_byte(luma + np.int32(GREEN_OF_CB) * blue + np.int32(GREEN_OF_CR) * red)
            out_HWC[row, x, 2] = _to_byte(luma + np.int32(BLUE_OF_CB) * blue)


@compiled()
def decode_plane(blocks: np.ndarray, first_row: int, first_column: int, out_YX: np.ndarray) -> None:
    """Decompress a window of a plane.

    Args:
        blocks: uint8, those of the whole plane, row by row. The plane is a square.
        first_row, first_column: of the window's blocks, counted in blocks.
        out_YX: uint8, filled with the window; its sides are multiples of 4.
    """
    across = int(np.sqrt(len(blocks) // BLOCK_BYTES))
    levels = np.empty(8, np.uint8)
    for row in range(out_YX.shape[0] // BLOCK):
        for column in range(out_YX.shape[1] // BLOCK):
            indices = _read_block(blocks, (first_row + row) * across + first_column + column, levels)
            for y in range(BLOCK):
                for x in range(BLOCK):
                    out_YX[BLOCK * row + y, BLOCK * column + x] = levels[np.int64(indices & np.uint64(7))]
                    indices >>= np.uint64(3)


@compiled()
def decode_transposed(blocks: np.ndarray, first_row: int, first_column: int, out_XY: np.ndarray) -> None:
    """`decode_plane`, with the columns of the window as the rows of `out_XY`."""
    across = int(np.sqrt(len(blocks) // BLOCK_BYTES))
    levels = np.empty(8, np.uint8)
    for column in range(out_XY.shape[0] // BLOCK):
        for row in range(out_XY.shape[1] // BLOCK):
            indices = _read_block(blocks, (first_row + row) * across + first_column + column, levels)
            for y in range(BLOCK):
                for x in range(BLOCK):
                    out_XY[BLOCK * column + x, BLOCK * row + y] = levels[np.int64(indices & np.uint64(7))]
                    indices >>= np.uint64(3)


@compiled(inline="always")
def _read_block(blocks: np.ndarray, number: int, levels: np.ndarray) -> np.uint64:
    """Fill in the eight levels of a block. Returns the indices of its pixels, 3 bits each, the first one lowest."""
    block = blocks[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
    high = np.int32(block[0])
    low = np.int32(block[1])
    levels[0] = high
    levels[1] = low
    if high > low:
        for i in range(2, 8):
            levels[i] = ((8 - i) * high + (i - 1) * low) // 7
    else:
        for i in range(2, 6):
            levels[i] = ((6 - i) * high + (i - 1) * low) // 5
        levels[6] = 0
        levels[7] = 255
    indices = np.uint64(0)
    for i in range(6):
        indices |= np.uint64(block[2 + i]) << np.uint64(8 * i)
    return indices


@compiled(inline="always")
def _to_byte(value: int) -> int:
    """Round a value in units of 2**-20, to which half a unit of the result has been added."""
    return min(max(value >> 20, 0), 255)


@compiled()
def _to_planes(pixels_HWC: np.ndarray, y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> None:
    """Convert RGB to Y, Cb, Cr (ITU-T T.871), rounded to 8 bits; chroma is the mean of 2x2 pixels."""
    half = len(cb)
    for row in range(half):
        for column in range(half):
            red = np.int32(0)
            green = np.int32(0)
            blue = np.int32(0)
            for i in range(2):
                for j in range(2):
                    r = np.int32(pixels_HWC[2 * row + i, 2 * column + j, 0])
                    g = np.int32(pixels_HWC[2 * row + i, 2 * column + j, 1])
                    b = np.int32(pixels_HWC[2 * row + i, 2 * column + j, 2])
                    # The weights in units of 1/65536; they add up to 1.
                    y[2 * row + i, 2 * column + j] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
                    red += r
                    green += g
                    blue += b
            # Sums of four: in units of 1/262144. The largest value would round to 256.
            cb[row, column] = min((-11059 * red - 21709 * green + 32768 * blue + (128 << 18) + (1 << 17)) >> 18, 255)
            cr[row, column] = min((32768 * red - 27439 * green - 5329 * blue + (128 << 18) + (1 << 17)) >> 18, 255)


@compiled()
def _encode_plane(plane: np.ndarray, out: np.ndarray) -> None:
    """Compress the blocks of a plane, LANES at a time."""
    across = plane.shape[1] // BLOCK
    count = len(out) // BLOCK_BYTES
    values = np.empty((BLOCK * BLOCK, LANES), np.float32)
    for first in range(0, count, LANES):
        for lane in range(LANES):
            block = min(first + lane, count - 1)  # the last one again, where fewer are left
            top = block // across * BLOCK
            left = block % across * BLOCK
            for p in range(BLOCK * BLOCK):
                values[p, lane] = np.float32(plane[top + p // BLOCK, left + p % BLOCK])
        high, low = _find_endpoints(values)
        for lane in range(min(LANES, count - first)):
            start = (first + lane) * BLOCK_BYTES
            _write_block(values[:, lane], int(high[lane]), int(low[lane]), out[start : start + BLOCK_BYTES])


@compiled()
def _find_endpoints(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the endpoints of LANES blocks, the values of which are float32 (16, LANES)."""
    lanes = values.shape[1]
    high = np.empty(lanes, np.float32)
    low = np.empty(lanes, np.float32)
    for lane in range(lanes):
        smallest = values[0, lane]
        largest = values[0, lane]
        for p in range(1, 16):
            smallest = min(smallest, values[p, lane])
            largest = max(largest, values[p, lane])
        low[lane] = min(smallest, np.float32(248))
        high[lane] = max(largest, low[lane] + np.float32(7))
    return high, low


@compiled()
def _write_block(values: np.ndarray, high: int, low: int, out: np.ndarray) -> None:
    """Write a block with these endpoints, high > low, and the nearest level for each of its 16 values."""
    bits = np.uint64(0)
    for p in range(16):
        best = np.int32(1 << 20)
        chosen = 0
        for i in range(8):
            sevenths = 7 if i == 0 else (0 if i == 1 else 8 - i)  # the weight of the upper endpoint
            distance = abs((sevenths * high + (7 - sevenths) * low) // 7 - np.int32(values[p]))
            if distance < best:
                best = distance
                chosen = i
        bits |= np.uint64(chosen) << np.uint64(3 * p)
    out[0] = high
    out[1] = low
    for i in range(6):
        out[2 + i] = np.uint8((bits >> np.uint64(8 * i)) & np.uint64(255))
