"""The fast kernel of the views on a CPU: one view after the other, each while it is in the cache.

It is compiled by numba, because torch.compile's kernel for the CPU runs every operation on every sample and reaches a
twentieth of the speed. Here an operation runs only on the views that drew it. Parameters come from parameters.py; the
pixels equal those of paired.torch_views, the oracle, up to rounding.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from fastssl.beton.format import RGB
from fastssl.beton.resize import resize_line, resize_weights
from fastssl.common.compiled import compiled
from fastssl.common.threads import run_in_threads
from fastssl.loading.blocks import BlockImages
from fastssl.loading.decoding import Buffers
from fastssl.loading.kernels import take
from fastssl.recipe import ViewsConfig
from fastssl.views.cpu_blocks import new_scratch, resize_blocks_to_planes
from fastssl.views.operations import BLUR_RADIUS, LUMA, SOLARIZE_THRESHOLD
from fastssl.views.parameters import BRIGHTNESS, CONTRAST, HUE, Parameters

# 512 views of 224 px in new memory cost 75,000 page faults, more time than all operations but the crop and the blur.
_buffers = Buffers(pinned=False, limit=2)  # a loop holds one pair of views while it makes the next
_buffers_lock = Lock()
_kernel = compiled(fastmath={"contract"})  # a product and a sum may be rounded once, as one instruction
_inlined = compiled(inline="always")
_to_tuple = cast("Callable[[np.ndarray, int], tuple[Any, ...]]", to_fixed_tuple)
BLUR_SIZE = 2 * BLUR_RADIUS + 1
LANES = 32


def cpu_views(
    image: Tensor | BlockImages, box_N4: Tensor | None, drawn: Parameters[Tensor], views: ViewsConfig
) -> Tensor:
    """(N, C, size, size) float32, normalized: N = count * B views of a batch, all first ones before all second ones.

    image: uint8, (B, H, W, C), or images in blocks, with the crops' boxes (top, left, height, width) in its pixels, or
    already cropped, (B, count, size, size, C). drawn: the parameters of the N views.
    """
    if isinstance(image, BlockImages):
        assert box_N4 is not None  # the loader cuts crops of pixels only
        source = image.blocks.contiguous().numpy()
    elif box_N4 is None:
        source = image.contiguous().numpy()
        box_N4 = torch.tensor([0, 0, views.size, views.size]).expand(len(drawn.flip_N), 4)
    else:
        source = image[:, None].contiguous().numpy()  # one crop: the whole image
    channels = image.shape[-1]
    if len(box_N4) == 0:
        return torch.empty(0, channels, views.size, views.size)
    with _buffers_lock:
        memory = _buffers.take((len(box_N4), channels, views.size, 4 * views.size))
    out = memory.view(torch.float32)
    arrays: Parameters[np.ndarray] = Parameters(*[parameter.contiguous().numpy() for parameter in drawn])
    arguments = (
        source, box_N4.double().contiguous().numpy(), arrays,
        np.full(channels, views.mean, np.float32), np.full(channels, views.std, np.float32), out.numpy(),
        np.zeros(1, np.int64),
    )  # fmt: skip
    if isinstance(image, BlockImages):
        make_views = _make_views_of_blocks
    else:
        make_views = _make_views if channels == RGB else _make_views_without_colors
    run_in_threads(make_views, *arguments)
    return out


@_kernel
def _make_views(
    source: np.ndarray,
    box_N4: np.ndarray,
    drawn: Parameters[np.ndarray],
    mean: np.ndarray,
    std: np.ndarray,
    out: np.ndarray,
    counter: np.ndarray,
) -> None:
    """Make views of RGB images until none is left to take; several threads run this at the same time.

    source: (B, crops, H, W, C), with a crop for each view, or with one for all.
    """
    size = out.shape[2]
    line = np.empty(3 * source.shape[3], np.float32)
    padded = np.empty((size, size + 2 * BLUR_RADIUS), np.float32)
    n = take(counter)
    while n < len(out):
        x = out[n]
        pixels_HWC = source[n % len(source), n // len(source) % source.shape[1]]
        _resize_to_planes(pixels_HWC, box_N4[n], drawn.flip_N[n], x, line)
        _augment(x, n, drawn, mean, std, padded)
        n = take(counter)


@_kernel
def _make_views_of_blocks(
    source: np.ndarray,
    box_N4: np.ndarray,
    drawn: Parameters[np.ndarray],
    mean: np.ndarray,
    std: np.ndarray,
    out: np.ndarray,
    counter: np.ndarray,
) -> None:
    """The same for images in blocks, (B, bytes)."""
    size = out.shape[2]
    side = int(np.sqrt(4 * source.shape[1] // 3))
    scratch = new_scratch(side, size)
    padded = np.empty((size, size + 2 * BLUR_RADIUS), np.float32)
    n = take(counter)
    while n < len(out):
        resize_blocks_to_planes(source[n % len(source)], side, box_N4[n], drawn.flip_N[n], out[n], scratch)
        _augment(out[n], n, drawn, mean, std, padded)
        n = take(counter)


@_kernel
def _augment(
    x: np.ndarray, n: int, drawn: Parameters[np.ndarray], mean: np.ndarray, std: np.ndarray, padded: np.ndarray
) -> None:
    """Apply the operations that follow the crop to view n, planes of RGB in [0, 1]; normalize it."""
    red, green, blue = x[0].reshape(-1), x[1].reshape(-1), x[2].reshape(-1)
    if drawn.jitter_N[n]:
        for stage in range(4):
            operation = drawn.order_N4[n, stage]
            factor = drawn.factor_N4[n, operation]
            if operation == HUE and factor != 0:
                _shift_hue(red, green, blue, factor)
            elif operation != HUE:
                _blend(red, green, blue, operation, factor)
    if drawn.gray_N[n]:
        for i in range(len(red)):
            red[i] = green[i] = blue[i] = _luma(red[i], green[i], blue[i])
    if drawn.blur_N[n]:
        kernel_K = _gaussian(drawn.sigma_N[n])
        for channel in range(3):
            _blur(x[channel], kernel_K, padded)
    for channel in range(3):
        _finish(x[channel].reshape(-1), drawn.solarize_N[n], mean[channel], np.float32(1) / std[channel])


@_kernel
def _make_views_without_colors(
    source: np.ndarray,
    box_N4: np.ndarray,
    drawn: Parameters[np.ndarray],
    mean: np.ndarray,
    std: np.ndarray,
    out: np.ndarray,
    counter: np.ndarray,
) -> None:
    """As `_make_views`, for images of any number of channels, without the operations on colors."""
    channels, size = out.shape[1], out.shape[2]
    line = np.empty(channels * source.shape[3], np.float32)
    padded = np.empty((size, size + 2 * BLUR_RADIUS), np.float32)
    n = take(counter)
    while n < len(out):
        x = out[n]
        pixels_HWC = source[n % len(source), n // len(source) % source.shape[1]]
        _resize_channels_to_planes(pixels_HWC, box_N4[n], drawn.flip_N[n], x, line)
        if drawn.jitter_N[n]:
            for stage in range(4):
                operation = drawn.order_N4[n, stage]
                if operation == BRIGHTNESS or operation == CONTRAST:
                    _blend_with_gray(x.reshape(-1), operation, drawn.factor_N4[n, operation])
        kernel_K = _gaussian(drawn.sigma_N[n])
        for channel in range(channels):
            if drawn.blur_N[n]:
                _blur(x[channel], kernel_K, padded)
            _finish(x[channel].reshape(-1), drawn.solarize_N[n], mean[channel], np.float32(1) / std[channel])
        n = take(counter)


@_kernel
def _resize_channels_to_planes(
    pixels_HWC: np.ndarray, box: np.ndarray, flip: bool, out_CSS: np.ndarray, line: np.ndarray
) -> None:
    """Like `_resize_to_planes`, for any number of channels; `line` is as long as a row of all channels."""
    channels, size = out_CSS.shape[0], out_CSS.shape[1]
    top, left, height, width = box
    first_Y, weight_YK = resize_weights(top, height, size, pixels_HWC.shape[0])
    first_X, weight_XK = resize_weights(left, width, size, pixels_HWC.shape[1])
    weight_YK /= np.float32(255)
    begin, end = first_X[0], first_X[-1] + weight_XK.shape[1]
    for y in range(size):
        part = line[: channels * (end - begin)]
        part[:] = 0
        for k in range(weight_YK.shape[1]):
            weight = weight_YK[y, k]
            if weight > 0:
                row = pixels_HWC[first_Y[y] + k, begin:end].reshape(-1)
                for j in range(len(part)):
                    part[j] += weight * np.float32(row[j])
        for x in range(size):
            column = size - 1 - x if flip else x
            start = channels * (first_X[x] - begin)
            for channel in range(channels):
                value = np.float32(0)
                for k in range(weight_XK.shape[1]):
                    value += weight_XK[x, k] * part[start + channels * k + channel]
                out_CSS[channel, y, column] = value


@_kernel
def _resize_to_planes(
    pixels_HWC: np.ndarray, box: np.ndarray, flip: bool, out_CSS: np.ndarray, line: np.ndarray
) -> None:
    """Like beton.resize.resize_box, but to planes of floats in [0, 1], mirrored where `flip`."""
    size = out_CSS.shape[1]
    top, left, height, width = box
    if pixels_HWC.shape[0] == pixels_HWC.shape[1] == height == width == size and not flip:
        _to_planes(pixels_HWC, out_CSS)
        return
    first_Y, weight_YK = resize_weights(top, height, size, pixels_HWC.shape[0])
    first_X, weight_XK = resize_weights(left, width, size, pixels_HWC.shape[1])
    # The vertical pass scales the pixels to [0, 1].
    weight_YK /= np.float32(255)
    resized = np.empty(3 * size, np.float32)
    for y in range(size):
        resize_line(pixels_HWC, first_Y[y], weight_YK[y], first_X, weight_XK, line, resized)
        for x in range(size):
            column = size - 1 - x if flip else x
            for channel in range(3):
                out_CSS[channel, y, column] = resized[3 * x + channel]


@_kernel
def _to_planes(pixels_HWC: np.ndarray, out_CSS: np.ndarray) -> None:
    """`_resize_to_planes` where nothing is resized, as of crops that the loader has cut: in a tenth of the time."""
    scale = np.float32(1 / 255)
    three = np.uint64(3)
    for y in range(out_CSS.shape[1]):
        row = pixels_HWC[y].reshape(-1)
        for channel in range(3):
            line = out_CSS[channel, y]
            for x in range(len(line)):
                line[x] = np.float32(row[three * np.uint64(x) + np.uint64(channel)]) * scale


@_inlined
def _luma(red: np.float32, green: np.float32, blue: np.float32) -> np.float32:
    return np.float32(LUMA[0]) * red + np.float32(LUMA[1]) * green + np.float32(LUMA[2]) * blue


@_inlined
def _clamp(value: np.float32) -> np.float32:
    return min(max(value, np.float32(0)), np.float32(1))


@_kernel
def _blend(red: np.ndarray, green: np.ndarray, blue: np.ndarray, operation: int, factor: float) -> None:
    """Brightness, contrast, saturation: a blend with black, with the mean gray value, with the gray image."""
    mean = _mean_luma(red, green, blue) if operation == CONTRAST else np.float32(0)
    rest = np.float32(1) - factor
    if operation == BRIGHTNESS or operation == CONTRAST:
        for plane in (red, green, blue):
            for i in range(len(plane)):
                plane[i] = _clamp(factor * plane[i] + rest * mean)
    else:
        for i in range(len(red)):
            other = rest * _luma(red[i], green[i], blue[i])
            red[i] = _clamp(factor * red[i] + other)
            green[i] = _clamp(factor * green[i] + other)
            blue[i] = _clamp(factor * blue[i] + other)


@_kernel
def _mean_luma(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.float32:
    """The mean gray value: a float64 sum in the order of the pixels, divided and rounded."""
    count = len(red)
    # Sums of every LANES-th pixel take a third of the time, as vector instructions add them.
    sums = np.zeros(LANES, np.float64)
    whole = count - count % LANES
    for start in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += _luma(red[start + i], green[start + i], blue[start + i])
    total: float | np.floating = sums.sum()
    for i in range(whole, count):
        total += _luma(red[i], green[i], blue[i])
    # Sums in two orders differ by less than this, and once in thousands of views the mean may then round differently.
    error = total * count * 2.0**-51
    mean = np.float32((total - error) / count)
    if mean == np.float32((total + error) / count):
        return mean
    total = 0.0
    for i in range(count):
        total += _luma(red[i], green[i], blue[i])
    return np.float32(total / count)


@_kernel
def _blend_with_gray(values: np.ndarray, operation: int, factor: float) -> None:
    """Brightness and contrast of an image without colors, all of its channels in one array."""
    mean = np.float32(0)
    if operation == CONTRAST:
        total: float | np.floating = 0.0
        for i in range(len(values)):
            total += values[i]
        mean = np.float32(total / len(values))
    rest = np.float32(1) - factor
    for i in range(len(values)):
        values[i] = _clamp(factor * values[i] + rest * mean)


@_kernel
def _shift_hue(red: np.ndarray, green: np.ndarray, blue: np.ndarray, turn: float) -> None:
    """See operations.shift_hue."""
    zero, one, four, six = np.float32(0), np.float32(1), np.float32(4), np.float32(6)
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        scale = one / (one if chroma == zero else chroma)
        from_red = (g - b) * scale
        from_green = (b - r) * scale + np.float32(2)
        from_blue = (r - g) * scale + four
        sextant = from_red if value == r else (from_green if value == g else from_blue)
        start = sextant + six * turn
        red[i] = _channel(np.float32(5) + start, value, chroma)
        green[i] = _channel(np.float32(3) + start, value, chroma)
        blue[i] = _channel(one + start, value, chroma)


@_inlined
def _channel(k: np.float32, value: np.float32, chroma: np.float32) -> np.float32:
    k -= np.float32(6) * np.floor(k * np.float32(1 / 6))
    return _clamp(value - chroma * _clamp(min(k, np.float32(4) - k)))


@_kernel
def _gaussian(sigma: float) -> np.ndarray:
    offset = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1).astype(np.float32)
    kernel_K = np.exp(np.float32(-0.5) * (offset / sigma) ** 2)
    return kernel_K / kernel_K.sum()


@_kernel
def _blur(plane: np.ndarray, kernel_K: np.ndarray, padded: np.ndarray) -> None:
    """Blur the columns into `padded`, then the rows of that back into `plane`; borders are reflected.

    padded: scratch, BLUR_RADIUS columns wider than the plane on both sides.
    """
    size = len(plane)
    # As tuples, the weights and the rows stay in registers while a line is summed: three times as fast as adding the
    # weighted rows to the line one after the other.
    weights = _to_tuple(kernel_K, BLUR_SIZE)
    row_K = np.empty(BLUR_SIZE, np.int64)
    for y in range(size):
        for d in range(BLUR_SIZE):
            row_K[d] = _reflected(y + d - BLUR_RADIUS, size)
        rows = _to_tuple(row_K, BLUR_SIZE)
        line = padded[y]
        for x in range(size):
            total = np.float32(0)
            for d in range(BLUR_SIZE):
                total += weights[d] * plane[rows[d], x]
            line[BLUR_RADIUS + x] = total
    for y in range(size):
        line = padded[y]
        for x in range(1, BLUR_RADIUS + 1):
            line[BLUR_RADIUS - x] = line[BLUR_RADIUS + _reflected(-x, size)]
            line[BLUR_RADIUS + size - 1 + x] = line[BLUR_RADIUS + _reflected(size - 1 + x, size)]
        out = plane[y]
        for x in range(size):
            total = np.float32(0)
            for d in range(BLUR_SIZE):
                total += weights[d] * line[x + d]
            out[x] = total


@_inlined
def _reflected(position: int, size: int) -> int:
    position = abs(position)
    return position if position < size else 2 * size - 2 - position


@_kernel
def _finish(plane: np.ndarray, solarize: bool, mean: float, scale: float) -> None:
    """Solarize if drawn, then normalize."""
    threshold = np.float32(SOLARIZE_THRESHOLD) if solarize else np.float32(2)
    for i in range(len(plane)):
        value = plane[i]
        value = np.float32(1) - value if value >= threshold else value
        plane[i] = (value - mean) * scale
