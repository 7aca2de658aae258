"""The Triton kernels of the views on a GPU: see gpu.py, which launches them.

A program makes one tile of TILE x TILE pixels of one view. What the view did not draw is a branch that all threads of
the program skip. All sums have a fixed order, so a view is the same, bit for bit, in every run.

`planes` holds views in between, in [0, 1]: N x 3 planes of SIZE x SIZE pixels.
"""

import triton
import triton.language as tl

from fastssl.views import operations
from fastssl.views.parameters import BRIGHTNESS, CONTRAST, HUE, SATURATION

# Columns of the table of parameters: one row of float32 for each view.
TOP, LEFT, HEIGHT, WIDTH = (tl.constexpr(column) for column in range(4))  # the crop box, in pixels of the stored image
FIRST_Y, END_Y, FIRST_X, END_X = (tl.constexpr(column) for column in range(4, 8))  # pixels that the box touches
FLIP, JITTER, GRAY, BLUR, SOLARIZE = (tl.constexpr(column) for column in range(8, 13))  # 1 if the view drew it, else 0
BEFORE = tl.constexpr(13)  # number of the jitter's operations before contrast; 0 without jitter
ORDER = tl.constexpr(14)  # and the next three: the jitter's operations, first to last
FACTOR = tl.constexpr(18)  # and the next three: by operation
TAPS = tl.constexpr(22)  # and the next six: weights of the blur at distances of 0 to 6 pixels
COLUMNS = tl.constexpr(32)

RADIUS = tl.constexpr(operations.BLUR_RADIUS)
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in operations.LUMA)
RED_OF_CR, GREEN_OF_CB = tl.constexpr(operations.RED_OF_CR), tl.constexpr(operations.GREEN_OF_CB)
GREEN_OF_CR, BLUE_OF_CB = tl.constexpr(operations.GREEN_OF_CR), tl.constexpr(operations.BLUE_OF_CB)
# Of a block, by index from the lowest four bits up: the steps from the first endpoint to the second, of 7 or of 5.
STEPS_OF_7, STEPS_OF_5 = tl.constexpr(0x65432170), tl.constexpr(0x00432150)
ONE, SEVENTH, FIFTH = tl.constexpr(65541), tl.constexpr(9363), tl.constexpr(13108)  # in units of 1/65536, rounded up
THRESHOLD = tl.constexpr(operations.SOLARIZE_THRESHOLD)
IS_BRIGHTNESS, IS_SATURATION, IS_HUE = (tl.constexpr(number) for number in (BRIGHTNESS, SATURATION, HUE))
IS_CONTRAST = tl.constexpr(CONTRAST)


@triton.jit
def crop_kernel(
    image, row_B, table, planes, gray_sums,
    batch, in_height, in_width,
    SIZE: tl.constexpr, CROPS: tl.constexpr, IN_BLOCKS: tl.constexpr, BY_ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Crop, resize and flip as operations.crop_to_unit_range does; then the jitter's operations before contrast.

    image: uint8 pixels; IN_BLOCKS: the words of 64 bits of images in blocks (fastssl/beton/bc4.py).
    """
    n, y, x, inside = _tile(SIZE, TILE)
    parameters = table + n * COLUMNS
    source = n % batch
    if BY_ROW:
        source = tl.load(row_B + source)
    if CROPS > 1:  # an image holds a crop for each view
        source = source * CROPS + n // batch
    x_in_source = tl.where(tl.load(parameters + FLIP) > 0, SIZE - 1 - x, x)
    if IN_BLOCKS:
        words = image + source.to(tl.int64) * (in_height * in_width * 3 // 32)
        red, green, blue = _crop_blocks(words, parameters, y, x_in_source, inside, in_width, SIZE, TILE)
    else:
        pixels = image + source.to(tl.int64) * (in_height * in_width * 3)
        red, green, blue = _crop_pixels(pixels, parameters, y, x_in_source, inside, in_height, in_width, SIZE, TILE)

    for stage in range(tl.load(parameters + BEFORE).to(tl.int32)):
        red, green, blue = _jitter(red, green, blue, parameters, stage)
    gray = tl.where(inside, _luma(red, green, blue), 0.0)
    tl.store(gray_sums + tl.program_id(0), tl.sum(gray))
    _store_planes(planes + n.to(tl.int64) * 3 * SIZE * SIZE + y * SIZE + x, red, green, blue, inside, SIZE)


@triton.jit
def contrast_kernel(
    planes, table, gray_sums, out,
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, STEP_C: tl.constexpr, STEP_P: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr, TILES_2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Contrast, the jitter's operations after it, grayscale. TILES_2: the next power of two."""
    n, y, x, inside = _tile(SIZE, TILE)
    parameters = table + n * COLUMNS
    plane = planes + n.to(tl.int64) * 3 * SIZE * SIZE + y * SIZE + x
    red, green, blue = _load_planes(plane, inside, SIZE)
    if tl.load(parameters + JITTER) > 0:
        tile = tl.arange(0, TILES_2)
        mean = tl.sum(tl.load(gray_sums + n * TILES + tile, mask=tile < TILES, other=0.0)) / (SIZE * SIZE)
        red, green, blue = _blend(red, green, blue, mean, tl.load(parameters + FACTOR + IS_CONTRAST))
        for stage in range(tl.load(parameters + BEFORE).to(tl.int32) + 1, 4):
            red, green, blue = _jitter(red, green, blue, parameters, stage)
    if tl.load(parameters + GRAY) > 0:
        gray = _luma(red, green, blue)
        red, green, blue = gray, gray, gray
    if tl.load(parameters + BLUR) > 0:
        _store_planes(plane, red, green, blue, inside, SIZE)
    else:
        _finish(red, green, blue, parameters, out, n, y, x, inside,
                mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, STEP_C, STEP_P, SIZE)  # fmt: skip


@triton.jit
def blur_columns_kernel(planes, table, halfway, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Blur along y, one of the 3 N planes per program; views that did not draw a blur are left out."""
    plane, y, x, inside = _tile(SIZE, TILE)
    parameters = table + plane // 3 * COLUMNS
    if tl.load(parameters + BLUR) > 0:
        start = plane.to(tl.int64) * SIZE * SIZE
        total = tl.zeros([TILE, TILE], tl.float32)
        for k in tl.static_range(2 * RADIUS + 1):
            pixel = planes + start + _reflect(y + (k - RADIUS), SIZE) * SIZE + x
            weight = tl.load(parameters + TAPS + (k - RADIUS if k > RADIUS else RADIUS - k))
            total += weight * tl.load(pixel, mask=inside, other=0).to(tl.float32)
        # Transposed, so that the next kernel too reads neighboring pixels at once.
        tl.store(halfway + start + tl.trans(x * SIZE + y), tl.trans(total), mask=tl.trans(inside))


@triton.jit
def blur_rows_kernel(
    halfway, table, out,
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, STEP_C: tl.constexpr, STEP_P: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Blur along x and finish; views that did not draw a blur are left out."""
    n, x, y, inside = _tile(SIZE, TILE)  # `halfway` is transposed
    parameters = table + n * COLUMNS
    if tl.load(parameters + BLUR) > 0:
        column = halfway + n.to(tl.int64) * 3 * SIZE * SIZE + y
        red = tl.zeros([TILE, TILE], tl.float32)
        green = tl.zeros([TILE, TILE], tl.float32)
        blue = tl.zeros([TILE, TILE], tl.float32)
        for k in tl.static_range(2 * RADIUS + 1):
            weight = tl.load(parameters + TAPS + (k - RADIUS if k > RADIUS else RADIUS - k))
            r, g, b = _load_planes(column + _reflect(x + (k - RADIUS), SIZE) * SIZE, inside, SIZE)
            red += weight * r
            green += weight * g
            blue += weight * b
        _finish(tl.trans(red), tl.trans(green), tl.trans(blue),
                parameters, out, n, tl.trans(y), tl.trans(x), tl.trans(inside),
                mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, STEP_C, STEP_P, SIZE)  # fmt: skip


@triton.jit
def _tile(SIZE: tl.constexpr, TILE: tl.constexpr):
    """The view (or plane) of this program, its rows (TILE, 1) and columns (1, TILE), and which pixels there are."""
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE
    tile = tl.program_id(0) % (ACROSS * ACROSS)
    y = (tile // ACROSS * TILE + tl.arange(0, TILE))[:, None]
    x = (tile % ACROSS * TILE + tl.arange(0, TILE))[None, :]
    return tl.program_id(0) // (ACROSS * ACROSS), y, x, (y < SIZE) & (x < SIZE)


@triton.jit
def _crop_pixels(pixels, parameters, y, x, inside, in_height, in_width, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Red, green and blue in [0, 1] of the output positions (y, x), from interleaved pixels of an image."""
    center_y, reach_y = _filter(y, tl.load(parameters + TOP), tl.load(parameters + HEIGHT), SIZE)
    center_x, reach_x = _filter(x, tl.load(parameters + LEFT), tl.load(parameters + WIDTH), SIZE)
    low_y, high_y = tl.load(parameters + FIRST_Y), tl.load(parameters + END_Y)
    low_x, high_x = tl.load(parameters + FIRST_X), tl.load(parameters + END_X)
    first_y, first_x = tl.floor(center_y - reach_y + 0.5), tl.floor(center_x - reach_x + 0.5)
    per_pixel_y, per_pixel_x = 1.0 / reach_y, 1.0 / reach_x
    red = tl.zeros([TILE, TILE], tl.float32)
    green = tl.zeros([TILE, TILE], tl.float32)
    blue = tl.zeros([TILE, TILE], tl.float32)
    sum_y = tl.zeros([TILE, 1], tl.float32)
    sum_x = tl.zeros([1, TILE], tl.float32)
    taps_x = tl.ceil(2 * reach_x).to(tl.int32)  # two, unless the box has more pixels than the view
    for k in range(taps_x):
        sum_x += _weight(first_x + k, center_x, per_pixel_x, low_x, high_x)
    for j in range(tl.ceil(2 * reach_y).to(tl.int32)):
        weight_y = _weight(first_y + j, center_y, per_pixel_y, low_y, high_y)
        sum_y += weight_y
        row = pixels + _clamp_position(first_y + j, in_height) * in_width * 3
        for k in range(taps_x):
            weight = weight_y * _weight(first_x + k, center_x, per_pixel_x, low_x, high_x)
            pixel = row + _clamp_position(first_x + k, in_width) * 3
            red += weight * tl.load(pixel, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(pixel + 1, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(pixel + 2, mask=inside, other=0).to(tl.float32)
    scale = 1.0 / (255.0 * sum_y * sum_x)
    return red * scale, green * scale, blue * scale


@triton.jit
def _crop_blocks(words, parameters, y, x, inside, side, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The same from the blocks of an image: luma and chroma, each resampled at its own resolution."""
    luma, _ = _crop_planes(words, parameters, y, x, inside, side, 1, 1, SIZE, TILE)
    blue, red = _crop_planes(words + side * side // 16, parameters, y, x, inside, side, 2, 2, SIZE, TILE)
    luma, blue, red = luma * (1.0 / 255.0), (blue - 128.0) * (1.0 / 255.0), (red - 128.0) * (1.0 / 255.0)
    return (
        _clamp(luma + RED_OF_CR * red),
        _clamp(luma + GREEN_OF_CB * blue + GREEN_OF_CR * red),
        _clamp(luma + BLUE_OF_CB * blue),
    )


@triton.jit
def _crop_planes(
    words, parameters, y, x, inside, side,
    PLANES: tl.constexpr, PER_PIXEL: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One plane or two, in [0, 255], the pixels of which are PER_PIXEL pixels of luma high and wide."""
    SCALE: tl.constexpr = 1.0 / PER_PIXEL
    side = side // PER_PIXEL
    across = side // 4
    center_y, reach_y = _filter(y, SCALE * tl.load(parameters + TOP), SCALE * tl.load(parameters + HEIGHT), SIZE)
    center_x, reach_x = _filter(x, SCALE * tl.load(parameters + LEFT), SCALE * tl.load(parameters + WIDTH), SIZE)
    low_y, high_y = tl.floor(SCALE * tl.load(parameters + FIRST_Y)), tl.ceil(SCALE * tl.load(parameters + END_Y))
    low_x, high_x = tl.floor(SCALE * tl.load(parameters + FIRST_X)), tl.ceil(SCALE * tl.load(parameters + END_X))
    first_y, first_x = tl.floor(center_y - reach_y + 0.5), tl.floor(center_x - reach_x + 0.5)
    per_pixel_y, per_pixel_x = 1.0 / reach_y, 1.0 / reach_x
    one = tl.zeros([TILE, TILE], tl.float32)
    two = tl.zeros([TILE, TILE], tl.float32)
    sum_y = tl.zeros([TILE, 1], tl.float32)
    sum_x = tl.zeros([1, TILE], tl.float32)
    taps_y = tl.ceil(2 * reach_y).to(tl.int32)
    for j in range(taps_y):
        sum_y += _weight(first_y + j, center_y, per_pixel_y, low_y, high_y)
    # A thread has eight pixels of one row, so what depends on the column is computed in the outer loop.
    for k in range(tl.ceil(2 * reach_x).to(tl.int32)):
        weight_x = _weight(first_x + k, center_x, per_pixel_x, low_x, high_x)
        sum_x += weight_x
        column = _clamp_position(first_x + k, side)
        for j in range(taps_y):
            weight = weight_x * _weight(first_y + j, center_y, per_pixel_y, low_y, high_y)
            row = _clamp_position(first_y + j, side)
            word = words + ((row >> 2) * across + (column >> 2))
            bit = (16 + 12 * (row & 3)) + 3 * (column & 3)
            one += weight * _decode(tl.load(word, mask=inside, other=0), bit)
            if PLANES == 2:
                two += weight * _decode(tl.load(word + across * across, mask=inside, other=0), bit)
    scale = 1.0 / (sum_y * sum_x)
    return one * scale, two * scale


@triton.jit
def _decode(word, bit):
    """The level, 0 to 255, of the pixel of a block whose index has its lowest bit there.

    A level is first + (second - first) * steps / 7 or 5, rounded down, here in units of 1/65536. The factors that
    replace the divisions are rounded up, by so little that the level is exact for all endpoints.
    """
    endpoints = word.to(tl.int32)
    first, second = endpoints & 255, (endpoints >> 8) & 255
    index_4 = (word >> (bit - 2)).to(tl.int32) & 28  # four times the index, for the tables of steps
    has_six = first <= second  # levels, and the extremes 0 and 255; else eight
    steps = (tl.where(has_six, STEPS_OF_5, STEPS_OF_7) >> index_4) & 15
    between = first * ONE + (second - first) * (steps * tl.where(has_six, FIFTH, SEVENTH))
    is_extreme = has_six & (index_4 >= 24)
    return (tl.where(is_extreme, (index_4 - 24) * (255 * 16384), between) >> 16).to(tl.float32)


@triton.jit
def _filter(position, start, length, SIZE: tl.constexpr):
    """Center and radius of the triangle filter of output positions. See operations._taps."""
    scale = length / SIZE
    center = start + (position.to(tl.float32) + 0.5) * scale
    return center, tl.maximum(scale, 1.0)


@triton.jit
def _weight(pixel, center, per_pixel, low, high):
    """Of a pixel for output positions, not normalized; per_pixel: what it falls per pixel of distance."""
    weight = tl.maximum(1.0 - tl.abs(pixel + 0.5 - center) * per_pixel, 0.0)
    return tl.where((pixel >= low) & (pixel < high), weight, 0.0)


@triton.jit
def _clamp_position(position, count):
    return tl.minimum(tl.maximum(position.to(tl.int32), 0), count - 1)


@triton.jit
def _reflect(position, SIZE: tl.constexpr):
    position = tl.abs(position)
    # A tile may reach over the border, so there is a second reflection: no address is outside of the plane.
    position = tl.where(position >= SIZE, 2 * SIZE - 2 - position, position)
    return tl.maximum(position, 0)


@triton.jit
def _load_planes(pixel, inside, SIZE: tl.constexpr):
    red = tl.load(pixel, mask=inside, other=0).to(tl.float32)
    green = tl.load(pixel + SIZE * SIZE, mask=inside, other=0).to(tl.float32)
    blue = tl.load(pixel + 2 * SIZE * SIZE, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _store_planes(pixel, red, green, blue, inside, SIZE: tl.constexpr):
    tl.store(pixel, red, mask=inside)
    tl.store(pixel + SIZE * SIZE, green, mask=inside)
    tl.store(pixel + 2 * SIZE * SIZE, blue, mask=inside)


@triton.jit
def _luma(red, green, blue):
    return RED * red + GREEN * green + BLUE * blue


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _blend(red, green, blue, other, factor):
    rest = (1.0 - factor) * other
    return _clamp(factor * red + rest), _clamp(factor * green + rest), _clamp(factor * blue + rest)


@triton.jit
def _jitter(red, green, blue, parameters, stage):
    """Brightness, saturation or hue: the operation that the view drew for this stage."""
    operation = tl.load(parameters + ORDER + stage).to(tl.int32)
    factor = tl.load(parameters + FACTOR + operation)
    if operation == IS_BRIGHTNESS:
        red, green, blue = _blend(red, green, blue, 0.0, factor)
    elif operation == IS_SATURATION:
        red, green, blue = _blend(red, green, blue, _luma(red, green, blue), factor)
    elif (operation == IS_HUE) & (factor != 0):
        red, green, blue = _shift_hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _shift_hue(red, green, blue, turn):
    """See operations.shift_hue."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    scale = 1.0 / tl.where(chroma == 0.0, 1.0, chroma)
    not_red = tl.where(value == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0)
    start = tl.where(value == red, (green - blue) * scale, not_red) + 6.0 * turn
    return (
        _channel(5.0 + start, value, chroma),
        _channel(3.0 + start, value, chroma),
        _channel(1.0 + start, value, chroma),
    )


@triton.jit
def _channel(k, value, chroma):
    k -= 6.0 * tl.floor(k * (1.0 / 6.0))
    return _clamp(value - chroma * _clamp(tl.minimum(k, 4.0 - k)))


@triton.jit
def _finish(
    red, green, blue, parameters, out, n, y, x, inside,
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b, STEP_C: tl.constexpr, STEP_P: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Solarize if drawn, normalize, and write the view. STEP_C, STEP_P: strides of channels and of pixels."""
    if tl.load(parameters + SOLARIZE) > 0:
        red = tl.where(red >= THRESHOLD, 1.0 - red, red)
        green = tl.where(green >= THRESHOLD, 1.0 - green, green)
        blue = tl.where(blue >= THRESHOLD, 1.0 - blue, blue)
    pixel = out + n.to(tl.int64) * 3 * SIZE * SIZE + (y * SIZE + x) * STEP_P
    tl.store(pixel, (red - mean_r) * scale_r, mask=inside)
    tl.store(pixel + STEP_C, (green - mean_g) * scale_g, mask=inside)
    tl.store(pixel + 2 * STEP_C, (blue - mean_b) * scale_b, mask=inside)
