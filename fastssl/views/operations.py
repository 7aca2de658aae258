"""The operations of the augmentation: pure functions of pixels and per-sample parameters, in torch operations.

Each one equals torchvision's function of the same name, applied to each sample with its own parameters. After the crop,
images are (N, C, H, W) float32 in [0, 1]. Three channels are RGB. With another number of channels there is no color:
the gray value is the mean over the channels, and saturation, hue and grayscale are left out.
"""

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.beton.format import RGB
from fastssl.common.constants import constant
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import ViewsConfig
from fastssl.views.parameters import BRIGHTNESS, CONTRAST, HUE, SATURATION

BLUR_RADIUS = 6  # pixels
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green, blue, as in torchvision (ITU-R 601)
SOLARIZE_THRESHOLD = 128 / 255
RED_OF_CR, GREEN_OF_CB, GREEN_OF_CR, BLUE_OF_CB = 1.402, -0.344136, -0.714136, 1.772  # RGB of YCbCr, ITU-T T.871


def crop_to_unit_range(
    image: Tensor | BlockImages, image_index_N: Tensor, box_N4: Tensor, flip_N: Tensor, size: int
) -> Tensor:
    """`crop_resize` to values in [0, 1], of uint8 pixels (B, H, W, C) or of images in blocks.

    Of images in blocks, luma and chroma are resampled each at its own resolution, and only then become RGB. So chroma
    is resampled once, where decoding to pixels would interpolate it before.
    """
    if isinstance(image, BlockImages):
        y_BHW1, c_BHW2 = image.planes()
        y_N1SS = crop_resize(y_BHW1, image_index_N, box_N4, flip_N, size)
        c_N2SS = crop_resize(c_BHW2, image_index_N, box_N4 / 2, flip_N, size)
        return to_rgb(y_N1SS, c_N2SS)
    return crop_resize(image, image_index_N, box_N4, flip_N, size) / 255


def to_rgb(y_N1HW: Tensor, c_N2HW: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1], clamped: from luma and chroma (Cb, Cr) in [0, 255], JFIF's full-range BT.601."""
    blue, red = (c_N2HW - 128).split(1, dim=1)
    channels = y_N1HW + RED_OF_CR * red, y_N1HW + GREEN_OF_CB * blue + GREEN_OF_CR * red, y_N1HW + BLUE_OF_CB * blue
    return (torch.cat(channels, dim=1) / 255).clamp(0, 1)


def crop_resize(image_BHWC: Tensor, image_index_N: Tensor, box_N4: Tensor, flip_N: Tensor, size: int) -> Tensor:
    """Cut N boxes out of B images and resize each to a square.

    Bilinear, antialiased along an axis that shrinks: a triangle filter of radius max(1, length / size) pixels, cut off
    at the box and normalized, which is the antialiased filter of Pillow and torchvision after a crop. Along each axis
    the same number of pixels is gathered for every output position, some with weight 0.

    image_index_N: the image that each box belongs to. box_N4: top, left, height, width in pixels of the image, which
    may be fractional; pixels that a box touches count. flip_N: bool, True mirrors the result left to right.
    Returns (N, C, size, size) float32 in the range of the images.
    """
    # In float64, as in the CPU kernel: whether the border is within a pixel must not depend on rounding.
    top_N, left_N, height_N, width_N = box_N4.double().unbind(1)
    y_NSK, weight_y_NSK = _taps(top_N, height_N, torch.zeros_like(flip_N), image_BHWC.shape[1], size)
    x_NSK, weight_x_NSK = _taps(left_N, width_N, flip_N, image_BHWC.shape[2], size)
    rows_NSWC = _sum(
        weight[:, :, None, None] * image_BHWC[image_index_N[:, None], y]
        for y, weight in zip(y_NSK.unbind(2), weight_y_NSK.unbind(2))
    )
    n = torch.arange(len(image_index_N), device=image_index_N.device)[:, None, None]
    row = torch.arange(size, device=image_index_N.device)[None, :, None]
    out_NSSC = _sum(
        weight[:, None, :, None] * rows_NSWC[n, row, x[:, None]]
        for x, weight in zip(x_NSK.unbind(2), weight_x_NSK.unbind(2))
    )
    return out_NSSC.permute(0, 3, 1, 2)


def _taps(start_N: Tensor, length_N: Tensor, flip_N: Tensor, in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """(N, out_size, K) positions of input pixels along an axis, int64, and their weights."""
    count = math.ceil(2 * max(1, in_size / out_size))
    first, end = (x[:, None, None] for x in box_limits(start_N, length_N, in_size))
    start = start_N.float()[:, None, None]
    length = length_N.float()[:, None, None]
    out = torch.arange(out_size, device=start_N.device)[:, None]
    out = torch.where(flip_N[:, None, None], out_size - 1 - out, out)
    scale = length / out_size
    reach = scale.clamp(min=1)
    center = start + (out + 0.5) * scale
    pixel = torch.floor(center - reach + 0.5) + torch.arange(count, device=start_N.device)
    weight = (1 - (pixel + 0.5 - center).abs() / reach).clamp(min=0)
    weight = weight * ((pixel >= first) & (pixel < end))
    return pixel.long().clamp(0, in_size - 1), weight / weight.sum(dim=-1, keepdim=True)


def box_limits(start_N: Tensor, length_N: Tensor, in_size: int) -> tuple[Tensor, Tensor]:
    """The first pixel along an axis that a box touches, and the one after the last. start_N, length_N: float64."""
    return torch.floor(start_N).clamp(min=0).float(), torch.ceil(start_N + length_N).clamp(max=in_size).float()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def luma(x: Tensor) -> Tensor:
    """(N, 1, H, W): the gray value."""
    if x.shape[1] != RGB:
        return x.mean(dim=1, keepdim=True)
    r, g, b = x.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)[:, None]


def color_jitter(x: Tensor, apply_N: Tensor, order_N4: Tensor, factor_N4: Tensor, with_hue: bool) -> Tensor:
    """Apply brightness, contrast, saturation and hue in each sample's own order, clamping after each one.

    Only contrast depends on more than one pixel: on the mean gray value of the image. So the operations before it are
    one pointwise pass that ends in a mean, and contrast and the operations after it are another one.

    order_N4, factor_N4: see `Parameters`. Samples where apply_N is False stay as they are. with_hue=False leaves out
    the hue, for a strength of 0; without RGB, saturation and hue are left out.
    """
    is_rgb = x.shape[1] == RGB
    with_hue &= is_rgb
    skipped = () if with_hue else ((HUE,) if is_rgb else (SATURATION, HUE))
    contrast_at_N = (order_N4 == CONTRAST).int().argmax(dim=1)

    def pointwise(x: Tensor, stage: int, active_N: Tensor) -> Tensor:
        """Brightness (a blend with black), saturation (a blend with the gray image) or hue."""
        operation_N = order_N4[:, stage]
        factor = factor_N4.gather(1, operation_N[:, None])[:, :, None, None]
        for skip in skipped:
            active_N = active_N & (operation_N != skip)
        # CONTRAST stands for "no change" here.
        operation_N = torch.where(active_N, operation_N, CONTRAST)[:, None, None, None]
        other = torch.where(operation_N == BRIGHTNESS, 0.0, luma(x))
        result = torch.where(operation_N == CONTRAST, x, (factor * x + (1 - factor) * other).clamp(0, 1))
        return torch.where(operation_N == HUE, shift_hue(x, factor), result) if with_hue else result

    # Stages before contrast, in those samples where they are; then contrast; then the stages after it.
    for stage in range(3):
        x = pointwise(x, stage, apply_N & (stage < contrast_at_N))
    factor = torch.where(apply_N, factor_N4[:, CONTRAST], 1.0)[:, None, None, None]
    x = (factor * x + (1 - factor) * luma(x).mean(dim=(2, 3), keepdim=True)).clamp(0, 1)
    for stage in range(1, 4):
        x = pointwise(x, stage, apply_N & (stage > contrast_at_N))
    return x


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (in turns of the color circle, broadcastable) to the hue of HSV; saturation and value stay.

    The way back from HSV is f(n) = v - c * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6 and n = 5, 3, 1 for
    red, green, blue, which needs no branch on the sextant.
    """
    r, g, b = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    n = constant((5.0, 3.0, 1.0), x.device).view(1, 3, 1, 1)
    k = torch.remainder(n + sextant + 6 * turn, 6.0)
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def grayscale(x: Tensor, apply_N: Tensor) -> Tensor:
    """Replace the samples where apply_N is True by their gray image."""
    return torch.where(apply_N[:, None, None, None], luma(x), x)


def gaussian_blur(x: Tensor, apply_N: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur of radius 6 with one sigma (in pixels) per sample and a reflected border."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    kernel_NK = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel_NK = kernel_NK / kernel_NK.sum(dim=1, keepdim=True)
    # A kernel with a single 1 leaves the other samples as they are.
    kernel_NK = torch.where(apply_N[:, None], kernel_NK, (offset == 0).float())
    taps = kernel_NK[:, :, None, None, None].unbind(1)
    height, width = x.shape[2:]
    x = functional.pad(x, (0, 0, BLUR_RADIUS, BLUR_RADIUS), mode="reflect")
    x = _sum(tap * x[:, :, d : d + height] for d, tap in enumerate(taps))
    x = functional.pad(x, (BLUR_RADIUS, BLUR_RADIUS, 0, 0), mode="reflect")
    return _sum(tap * x[..., d : d + width] for d, tap in enumerate(taps))


def solarize(x: Tensor, apply_N: Tensor) -> Tensor:
    """Invert the pixels above the threshold, where apply_N is True."""
    inverted = torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)
    return torch.where(apply_N[:, None, None, None], inverted, x)


def to_unit_range(image_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32 in [0, 1]."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


def normalize(x: Tensor, views: ViewsConfig) -> Tensor:
    """(x - views.mean) / views.std, per channel or with one value for all channels."""
    return (x - _per_channel(views.mean, x)) / _per_channel(views.std, x)


def unnormalize(x: Tensor, views: ViewsConfig) -> Tensor:
    """The inverse of `normalize`, clamped to [0, 1], for figures."""
    return (x * _per_channel(views.std, x) + _per_channel(views.mean, x)).clamp(0, 1)


def _per_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    return constant(values, x.device).view(1, -1, 1, 1)
