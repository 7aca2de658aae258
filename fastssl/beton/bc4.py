"""Compress a canvas to blocks that need no entropy decoding, and decode them (build-beton --codec bc4).

An image becomes three planes: Y at full resolution, Cb and Cr at half of it (JFIF's full-range BT.601; chroma is the
mean of 2x2 pixels). Every plane is stored as 4x4 blocks of 8 bytes in BC4, the format of GPUs for one channel (also
called RGTC1; Khronos Data Format Specification 1.3, section 14): two endpoints and an index of 3 bits for each pixel,
which selects one of eight levels between the endpoints. So a canvas takes 6 bits a pixel, and each pixel of it can be
read by itself. docs/files.md has the layout of the bytes.

Importing this imports numba (0.4 s), so only what encodes or decodes does.
"""

from typing import NamedTuple

import numpy as np

from fastssl.beton.format import bc4_bytes
from fastssl.common.compiled import compiled

BLOCK = 4  # px; the side of a block
BLOCK_BYTES = 8
LANES = 64  # blocks that are searched at the same time, so that the compiler uses vector instructions
EPSILON = np.float32(0.01)  # a level is a whole number of sevenths, which float32 may hold as a little less

# The search for endpoints (see _find_endpoints); records/codec.md compares it with an exhaustive search.
STARTS = np.array([(0.03, -0.03), (0.07, 0.0), (0.0, -0.07), (-0.12, -0.03), (0.0, 0.0), (0.03, 0.04)], np.float32)
# The sum of squared distances in a block up to which one start is enough: 1.5 a pixel, 46 dB. A value of chroma colors
# four pixels.
FINE_LUMA, FINE_CHROMA = 24, 2
NEIGHBORS = ((0, 1), (0, -1), (1, 0), (-1, 0))

# YCbCr to RGB in units of 1/65536.
RED_OF_CR_Q16, GREEN_OF_CB_Q16, GREEN_OF_CR_Q16, BLUE_OF_CB_Q16 = 91881, -22554, -46802, 116130


@compiled()
def encode(pixels_HWC: np.ndarray) -> np.ndarray:
    """Compress uint8 RGB pixels (side, side, 3), with a side that is a multiple of 8, to uint8 (bytes,)."""
    side = pixels_HWC.shape[0]
    half = side // 2
    y = np.empty((side, side), np.uint8)
    cb = np.empty((half, half), np.uint8)
    cr = np.empty((half, half), np.uint8)
    _to_planes(pixels_HWC, y, cb, cr)
    return encode_planes(y, cb, cr)


@compiled()
def encode_planes(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """Compress planes of a side of the image and, for chroma, of half of it."""
    luma_bytes = y.size // 2
    out = np.empty(y.size * 3 // 4, np.uint8)
    _encode_plane(y, FINE_LUMA, out[:luma_bytes])
    _encode_plane(cb, FINE_CHROMA, out[luma_bytes : luma_bytes + luma_bytes // 4])
    _encode_plane(cr, FINE_CHROMA, out[luma_bytes + luma_bytes // 4 :])
    return out


def decode(blocks: np.ndarray, side: int) -> np.ndarray:
    """Decompress uint8 (bytes,) to RGB pixels (side, side, 3). Any bytes of the right number decode to something."""
    if blocks.shape != (bc4_bytes(side),):
        raise ValueError(f"{len(blocks):,} bytes are not a canvas of {side} px in BC4")
    pixels_HWC = np.empty((side, side, 3), np.uint8)
    decode_into(read_only(blocks), pixels_HWC)
    return pixels_HWC


def read_only(blocks: np.ndarray) -> np.ndarray:
    """Return a read-only view of contiguous blocks, as decoders take them."""
    view = np.ascontiguousarray(blocks).view()
    view.flags.writeable = False
    return view


@compiled()
def decode_into(blocks: np.ndarray, out_HWC: np.ndarray) -> None:
    """Decompress a canvas to RGB pixels; chroma is interpolated between the centers of its pixels.

    blocks: read-only, because those of a mapped file are, and a compiled function takes one type of argument. Integer
    arithmetic throughout, so that fastssl.loading.blocks gives the same pixels on every device.
    """
    side = out_HWC.shape[0]
    half = side // 2
    y = np.empty((side, side), np.uint8)
    cb = np.empty((half, half), np.uint8)
    cr = np.empty((half, half), np.uint8)
    luma_bytes = side * side // 2
    decode_plane(blocks[:luma_bytes], y)
    decode_plane(blocks[luma_bytes : luma_bytes + luma_bytes // 4], cb)
    decode_plane(blocks[luma_bytes + luma_bytes // 4 :], cr)
    line = np.empty(half, np.int32)
    blue = np.empty(side, np.int32)  # Cb at full resolution, times 16, around 0
    red = np.empty(side, np.int32)
    for row in range(side):
        near = row // 2
        far = min(max(near + (1 if row % 2 else -1), 0), half - 1)
        _double(cb[near], cb[far], line, blue)
        _double(cr[near], cr[far], line, red)
        out = out_HWC[row].reshape(-1)
        for x in range(side):
            luma = (np.int32(y[row, x]) << np.int32(20)) + np.int32(1 << 19)
            out[3 * x] = _to_byte(luma + np.int32(RED_OF_CR_Q16) * red[x])
            out[3 * x + 1] = _to_byte(luma + np.int32(GREEN_OF_CB_Q16) * blue[x] + np.int32(GREEN_OF_CR_Q16) * red[x])
            out[3 * x + 2] = _to_byte(luma + np.int32(BLUE_OF_CB_Q16) * blue[x])


@compiled()
def _double(near: np.ndarray, far: np.ndarray, line: np.ndarray, out: np.ndarray) -> None:
    """A row of chroma at full resolution, times 16, around 0: between two rows, then between the pixels of a row.

    A new pixel is 3 parts of the pixel that it lies in and one part of its neighbor. line: scratch.
    """
    last = len(near) - 1
    for x in range(len(near)):
        line[x] = np.int32(3) * np.int32(near[x]) + np.int32(far[x]) - np.int32(512)
    out[0] = np.int32(4) * line[0]
    for x in range(last):
        out[2 * x + 1] = np.int32(3) * line[x] + line[x + 1]
        out[2 * x + 2] = np.int32(3) * line[x + 1] + line[x]
    out[2 * last + 1] = np.int32(4) * line[last]


@compiled()
def decode_plane(blocks: np.ndarray, out_YX: np.ndarray) -> None:
    """Decompress a square plane. blocks: read-only uint8, row by row."""
    side = out_YX.shape[1]
    decode_window(blocks, 0, 0, side, side, out_YX)


@compiled()
def decode_window(blocks: np.ndarray, top: int, left: int, bottom: int, right: int, out_YX: np.ndarray) -> None:
    """Decompress the blocks that a window of a square plane touches, to their place in the plane.

    Args:
        blocks: uint8, those of the whole plane, row by row.
        top, left, bottom, right: the first rows and columns of pixels in the window and after it.
        out_YX: uint8, the plane.
    """
    across = out_YX.shape[1] // BLOCK
    levels = np.empty(8, np.uint8)
    for row in range(top // BLOCK, (bottom + BLOCK - 1) // BLOCK):
        for column in range(left // BLOCK, (right + BLOCK - 1) // BLOCK):
            indices = _read_block(blocks, row * across + column, levels)
            for y in range(BLOCK):
                for x in range(BLOCK):
                    out_YX[BLOCK * row + y, BLOCK * column + x] = levels[np.int64(indices & np.uint64(7))]
                    indices >>= np.uint64(3)


@compiled()
def decode_transposed(blocks: np.ndarray, first_row: int, first_column: int, out_XY: np.ndarray) -> None:
    """Decompress a window of a square plane, with its columns as the rows of the result.

    Args:
        blocks: uint8, those of the whole plane, row by row.
        first_row, first_column: of the window's blocks, counted in blocks.
        out_XY: uint8, filled with the window; its sides are multiples of 4.
    """
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
def _to_byte(value: int) -> np.signedinteger:
    """Round a value in units of 2**-20, to which half a unit of the result has been added."""
    return min(max(value >> np.int32(20), np.int32(0)), np.int32(255))


@compiled()
def _to_planes(pixels_HWC: np.ndarray, y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> None:
    """Convert RGB to Y, Cb, Cr (ITU-T T.871), rounded to 8 bits; chroma is the mean of 2x2 pixels."""
    side = len(y)
    both = np.empty(3 * side, np.int32)  # sums of two rows of pixels
    blue_line = np.empty(side, np.int32)
    red_line = np.empty(side, np.int32)
    middle = np.int32((128 << 18) + (1 << 17))  # chroma is a sum of four pixels, in units of 1/262144
    most = np.int32((256 << 18) - 1)  # the largest sums would round to 256
    # Types are written out: numba would compute with 64 bits, and check whether a signed index is negative.
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for row in range(side):
        pixels = pixels_HWC[row].reshape(-1)
        luma = y[row]
        for x in range(side):
            i = three * np.uint64(x)
            red, green, blue = np.int32(pixels[i]), np.int32(pixels[i + one]), np.int32(pixels[i + two])
            weighted = np.int32(19595) * red + np.int32(38470) * green + np.int32(7471) * blue
            luma[x] = (weighted + np.int32(1 << 15)) >> np.int32(16)
    for row in range(0, side, 2):
        upper = pixels_HWC[row].reshape(-1)
        lower = pixels_HWC[row + 1].reshape(-1)
        for k in range(len(both)):
            both[k] = np.int32(upper[k]) + np.int32(lower[k])
        for x in range(side):
            i = three * np.uint64(x)
            red, green, blue = both[i], both[i + one], both[i + two]
            blue_line[x] = np.int32(-11059) * red + np.int32(-21709) * green + np.int32(32768) * blue
            red_line[x] = np.int32(32768) * red + np.int32(-27439) * green + np.int32(-5329) * blue
        cb_line = cb[row // 2]
        cr_line = cr[row // 2]
        for x in range(side // 2):
            i = two * np.uint64(x)
            cb_line[x] = min(blue_line[i] + blue_line[i + one] + middle, most) >> np.int32(18)
            cr_line[x] = min(red_line[i] + red_line[i + one] + middle, most) >> np.int32(18)


@compiled()
def _encode_plane(plane: np.ndarray, fine: int, out: np.ndarray) -> None:
    """Compress the blocks of a plane: all with a short search for their endpoints, some with a long one.

    fine: the sum of squared distances in a block up to which the short search is enough.
    """
    count = len(out) // BLOCK_BYTES
    across = plane.shape[1] // BLOCK
    tiles = _to_tiles(plane)
    search = _new_search()
    long_search = np.empty(count, np.int64)  # numbers of blocks
    long_count = 0
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for p in range(BLOCK * BLOCK):
            tile = tiles[p, first : first + LANES]
            values = search.values[p]
            for lane in range(len(tile)):
                values[lane] = np.float32(tile[lane])
        _find_range(search)
        _try_start(search, 0)
        search.low[:] = search.new_low
        search.high[:] = search.new_high
        _set_exact(search)
        _choose_levels(search)
        for lane in range(lanes):
            number = first + lane
            _write_block(search, lane, out[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            if search.error[lane] > fine:
                long_search[long_count] = number
                long_count += 1
    for first in range(0, long_count, LANES):
        lanes = min(LANES, long_count - first)
        for lane in range(lanes):
            top = long_search[first + lane] // across * BLOCK
            left = long_search[first + lane] % across * BLOCK
            for y in range(BLOCK):
                for x in range(BLOCK):
                    search.values[BLOCK * y + x, lane] = np.float32(plane[top + y, left + x])
        for lane in range(lanes):
            start = long_search[first + lane] * BLOCK_BYTES
            search.new_high[lane] = np.float32(out[start])
            search.new_low[lane] = np.float32(out[start + 1])
        search.error[:] = np.float32(1 << 24)
        _keep_better(search)
        _find_range(search)
        for start in range(1, len(STARTS)):
            _try_start(search, start)
            _keep_better(search)
        _choose_levels(search)
        for lane in range(lanes):
            number = long_search[first + lane]
            _write_block(search, lane, out[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])


@compiled()
def _to_tiles(plane: np.ndarray) -> np.ndarray:
    """Reorder a plane: uint8 (16, blocks), the pixels of each block in a column."""
    across = plane.shape[1] // BLOCK
    tiles = np.empty((BLOCK * BLOCK, plane.size // BLOCK**2), np.uint8)
    for row in range(plane.shape[0]):
        line = plane[row]
        first = row // BLOCK * across
        for x in range(BLOCK):
            tile = tiles[row % BLOCK * BLOCK + x, first : first + across]
            for i in range(len(tile)):
                tile[i] = line[np.uint64(BLOCK) * np.uint64(i) + np.uint64(x)]
    return tiles


@compiled(inline="always")
def _index(sevenths: np.int32) -> np.int32:
    """The index of a level, by the sevenths of the way from the lower to the upper endpoint at which it is."""
    index = (np.int32(8) - sevenths) & np.int32(7)
    return index ^ (np.int32(1) if index < 2 else np.int32(0))


class _Search(NamedTuple):
    """Memory for the search of the endpoints of LANES blocks: a column for each, float32."""

    values: np.ndarray  # (16, LANES): of the pixels, whole numbers
    smallest: np.ndarray  # (LANES,), as all below
    largest: np.ndarray
    high: np.ndarray  # the best endpoints so far, high > low, whole numbers
    low: np.ndarray
    error: np.ndarray  # their sum of squared distances
    new_high: np.ndarray  # endpoints to be tried
    new_low: np.ndarray
    new_error: np.ndarray
    step: np.ndarray  # between levels, and levels per gray level
    per_step: np.ndarray
    sums: np.ndarray  # (4, LANES): of the least squares
    bits: np.ndarray  # int32 (2, LANES): the indices of the first eight pixels, and of the others


@compiled()
def _new_search() -> _Search:
    lane = [np.ones(LANES, np.float32) for _ in range(10)]
    return _Search(
        np.zeros((16, LANES), np.float32), lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6], lane[7],
        lane[8], lane[9], np.empty((4, LANES), np.float32), np.empty((2, LANES), np.int32),
    )  # fmt: skip


@compiled()
def _find_range(search: _Search) -> None:
    """Find the smallest and the largest value of each block."""
    search.smallest[:] = search.values[0]
    search.largest[:] = search.values[0]
    for p in range(1, 16):
        for lane in range(LANES):
            search.smallest[lane] = min(search.smallest[lane], search.values[p, lane])
            search.largest[lane] = max(search.largest[lane], search.values[p, lane])


@compiled()
def _try_start(search: _Search, start: int) -> None:
    """Set the new endpoints: the ends of the range, moved by a share of it, and one step of least squares from there.

    Where values lie in two or three groups, other endpoints than the ends of the range can have levels closer to all.
    """
    move_low = STARTS[start, 0]
    move_high = STARTS[start, 1]
    for lane in range(LANES):
        reach = search.largest[lane] - search.smallest[lane]
        search.new_low[lane] = search.smallest[lane] + move_low * reach
        search.new_high[lane] = search.largest[lane] + move_high * reach
    _round_endpoints(search)
    _fit(search)


@compiled()
def _set_exact(search: _Search) -> None:
    """Choose endpoints between which the levels are all eight gray values, for blocks that have no others."""
    for lane in range(LANES):
        low = min(search.smallest[lane], np.float32(248))
        is_exact = search.largest[lane] - low <= np.float32(7)
        search.low[lane] = low if is_exact else search.low[lane]
        search.high[lane] = low + np.float32(7) if is_exact else search.high[lane]


@compiled(inline="always")
def _clip(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return min(max(value, low), high)


@compiled(inline="always")
def _nearest(value: np.float32, per_step: np.float32) -> np.float32:
    """The nearest level of a value above the lower endpoint, in steps from there: 0 to 7."""
    # Decoders round levels down, by 3/7 in the mean.
    return _clip(np.floor((value + np.float32(3 / 7)) * per_step + np.float32(0.5)), np.float32(0), np.float32(7))


@compiled(inline="always")
def _round_endpoints(search: _Search) -> None:
    """Make whole numbers of the new endpoints, with 0 <= low < high <= 255."""
    for lane in range(LANES):
        low = _clip(np.floor(search.new_low[lane] + np.float32(0.5)), np.float32(0), np.float32(254))
        high = np.floor(search.new_high[lane] + np.float32(0.5))
        search.new_low[lane] = low
        search.new_high[lane] = _clip(high, low + np.float32(1), np.float32(255))


@compiled(inline="always")
def _set_steps(high: np.ndarray, low: np.ndarray, search: _Search) -> None:
    for lane in range(LANES):
        reach = high[lane] - low[lane]
        search.step[lane] = reach * np.float32(1 / 7)
        search.per_step[lane] = np.float32(7) / reach


@compiled()
def _fit(search: _Search) -> None:
    """Move the new endpoints by least squares: what each value is above its level, as a sum of two moves."""
    _set_steps(search.new_high, search.new_low, search)
    values, sums = search.values, search.sums
    sums[:] = 0
    for p in range(16):
        for lane in range(LANES):
            value = values[p, lane] - search.new_low[lane]
            a = _nearest(value, search.per_step[lane])
            rest = value - np.floor(a * search.step[lane] + EPSILON)
            sums[0, lane] += a
            sums[1, lane] += a * a
            sums[2, lane] += rest
            sums[3, lane] += a * rest
    for lane in range(LANES):
        # With b = 7 - a, the parts of the endpoints in a level are a / 7 and b / 7.
        a_sum, aa, rest_sum, a_rest = sums[0, lane], sums[1, lane], sums[2, lane], sums[3, lane]
        ab = np.float32(7) * a_sum - aa
        bb = np.float32(16 * 49) - np.float32(14) * a_sum + aa
        b_rest = np.float32(7) * rest_sum - a_rest
        determinant = aa * bb - ab * ab
        scale = np.float32(7) / determinant if determinant > 0 else np.float32(0)
        search.new_high[lane] += scale * (a_rest * bb - b_rest * ab)
        search.new_low[lane] += scale * (b_rest * aa - a_rest * ab)
    _round_endpoints(search)


@compiled()
def _keep_better(search: _Search) -> None:
    """Take the new endpoints of the blocks for which they are better."""
    _set_steps(search.new_high, search.new_low, search)
    for lane in range(LANES):
        search.new_error[lane] = 0
    for p in range(16):
        for lane in range(LANES):
            value = search.values[p, lane] - search.new_low[lane]
            a = _nearest(value, search.per_step[lane])
            rest = value - np.floor(a * search.step[lane] + EPSILON)
            search.new_error[lane] += rest * rest
    for lane in range(LANES):
        is_better = search.new_error[lane] < search.error[lane]
        search.error[lane] = search.new_error[lane] if is_better else search.error[lane]
        search.high[lane] = search.new_high[lane] if is_better else search.high[lane]
        search.low[lane] = search.new_low[lane] if is_better else search.low[lane]


@compiled()
def _choose_levels(search: _Search) -> None:
    """Choose the nearest level for each value, as indices of 3 bits, eight pixels in an integer; set the errors."""
    bits = search.bits
    bits[:] = 0
    search.error[:] = 0
    _set_steps(search.high, search.low, search)
    for p in range(16):
        shift = np.int32(3 * (p % 8))
        for lane in range(LANES):
            value = search.values[p, lane] - search.low[lane]
            a = _nearest(value, search.per_step[lane])
            rest = value - np.floor(a * search.step[lane] + EPSILON)
            search.error[lane] += rest * rest
            bits[p // 8, lane] |= _index(np.int32(a)) << shift


@compiled()
def _write_block(search: _Search, lane: int, out: np.ndarray) -> None:
    out[0] = np.uint8(search.high[lane])
    out[1] = np.uint8(search.low[lane])
    for half in range(2):
        bits = search.bits[half, lane]
        for i in range(3):
            out[2 + 3 * half + i] = np.uint8((bits >> np.int32(8 * i)) & np.int32(255))
