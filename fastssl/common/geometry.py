"""The crop box of RandomResizedCrop, drawn in the source image's pixels, and cutting it out on the device.

One function draws for the device (views) and the CPU (loading), so both cut the same boxes.
"""

import math
from typing import Literal

import torch
from torch import Tensor

PROPOSALS = 10
NUMBERS = 2 * PROPOSALS + 2  # uniform numbers that one box uses up
CENTER = 224 / 256  # of the shorter side: "resize to 256, centre crop of 224" (arXiv 1512.03385), at any size


def crop_box(u_BN: Tensor, height_B: Tensor, width_B: Tensor, scale: tuple[float, float], ratio: tuple[float, float]):
    """Boxes with the distribution of torchvision's RandomResizedCrop.get_params.

    Ten proposals of (area share, log aspect ratio); the first that fits is taken, else the largest
    centred box whose aspect ratio is within `ratio`.

    u_BN: (B, NUMBERS) float64 uniform in [0, 1). height_B, width_B: source size in pixels.
    Returns (B, 4) int64: top, left, height, width, in whole source pixels, inside the image.
    float64 keeps the rounding to pixels the same on every device.
    """
    height_B, width_B = height_B.double(), width_B.double()
    u_area, u_ratio = u_BN[:, :PROPOSALS], u_BN[:, PROPOSALS : 2 * PROPOSALS]
    area = (height_B * width_B)[:, None] * (scale[0] + u_area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + u_ratio * (high - low))
    w = torch.round(torch.sqrt(area * aspect))
    h = torch.round(torch.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width_B[:, None]) & (h <= height_B[:, None])

    first = fits.int().argmax(dim=1, keepdim=True)  # argmax gives the first of equal values
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(dim=1)
    top = torch.floor(u_BN[:, -2] * (height_B - h + 1))
    left = torch.floor(u_BN[:, -1] * (width_B - w + 1))

    whole = width_B / height_B
    w_fallback = torch.where(whole > ratio[1], torch.round(height_B * ratio[1]), width_B)
    h_fallback = torch.where(whole < ratio[0], torch.round(width_B / ratio[0]), height_B)
    w = torch.where(fits, w, w_fallback.clamp(min=1))
    h = torch.where(fits, h, h_fallback.clamp(min=1))
    top = torch.where(fits, top, torch.floor((height_B - h) / 2))
    left = torch.where(fits, left, torch.floor((width_B - w) / 2))
    return torch.stack([top, left, h, w], dim=1).long()


def eval_box(height_B: Tensor, width_B: Tensor, kind: Literal["squash", "center"]) -> Tensor:
    """(B, 4) float64: what evaluation sees of images of that many pixels: all of each, or its central square."""
    height_B, width_B = height_B.double(), width_B.double()
    if kind == "squash":
        return torch.stack([torch.zeros_like(height_B), torch.zeros_like(width_B), height_B, width_B], dim=1)
    side_B = CENTER * torch.minimum(height_B, width_B)
    return torch.stack([(height_B - side_B) / 2, (width_B - side_B) / 2, side_B, side_B], dim=1)


def crop_resize(image_BHWC: Tensor, image_index_N: Tensor, box_N4: Tensor, flip_N: Tensor, size: int) -> Tensor:
    """Cut N boxes out of B images and resize each to a square: (N, 3, size, size) float32, on the images' scale.

    of_N: the image that each box belongs to. box_N4: top, left, height, width in pixels of the image, which
    may be fractional; pixels that a box touches count. flip_N: mirror the result left to right.

    Bilinear, antialiased along an axis that shrinks: a triangle of radius max(1, length / size) pixels, cut
    off at the box and normalised, which is Pillow's and torchvision's antialiased filter after a crop. Along
    each axis the same number of pixels is gathered for every output position, some with weight 0.
    """
    top_N, left_N, height_N, width_N = box_N4.float().unbind(1)
    y_NSK, weight_y_NSK = _taps(top_N, height_N, torch.zeros_like(flip_N), image_BHWC.shape[1], size)
    x_NSK, weight_x_NSK = _taps(left_N, width_N, flip_N, image_BHWC.shape[2], size)
    rows_NSWC = sum(
        weight[:, :, None, None] * image_BHWC[image_index_N[:, None], y]
        for y, weight in zip(y_NSK.unbind(2), weight_y_NSK.unbind(2))
    )
    n = torch.arange(len(image_index_N), device=image_index_N.device)[:, None, None]
    row = torch.arange(size, device=image_index_N.device)[None, :, None]
    out_NSSC = sum(
        weight[:, None, :, None] * rows_NSWC[n, row, x[:, None]]
        for x, weight in zip(x_NSK.unbind(2), weight_x_NSK.unbind(2))
    )
    return out_NSSC.permute(0, 3, 1, 2)


def _taps(start_N: Tensor, length_N: Tensor, flip_N: Tensor, in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """(N, out_size, K) positions of pixels along an axis, int64, and their weights."""
    count = math.ceil(2 * max(1, in_size / out_size))
    start, length = start_N[:, None, None], length_N[:, None, None]
    out = torch.arange(out_size, device=start_N.device)[:, None]
    out = torch.where(flip_N[:, None, None], out_size - 1 - out, out)
    scale = length / out_size
    reach = scale.clamp(min=1)
    center = start + (out + 0.5) * scale
    pixel = torch.floor(center - reach + 0.5) + torch.arange(count, device=start_N.device)
    weight = (1 - (pixel + 0.5 - center).abs() / reach).clamp(min=0)
    weight = weight * ((pixel >= torch.floor(start)) & (pixel < torch.ceil(start + length)))
    return pixel.long().clamp(0, in_size - 1), weight / weight.sum(dim=-1, keepdim=True)
