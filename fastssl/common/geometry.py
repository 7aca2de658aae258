"""Crop boxes in pixels of the source image, for the views and for the evaluation transform.

`views` (crops on the device) and `loading` (crops on the CPU) both call these functions, so both cut the same boxes.
A box is (top, left, height, width).
"""

import math
from typing import Literal

import torch
from torch import Tensor

PROPOSALS = 10
UNIFORMS_PER_BOX = 2 * PROPOSALS + 2  # uniform random numbers that one box takes
FLIP = UNIFORMS_PER_BOX  # the next one says whether the crop is mirrored: it is, if the number is below the probability
CENTER = 224 / 256  # of the shorter side: "resize to 256, center crop of 224" (arXiv 1512.03385), at any size


def crop_box(
    u_BN: Tensor, height_B: Tensor, width_B: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Draw boxes with the distribution of torchvision's RandomResizedCrop.get_params.

    Each of ten proposals has a random area and aspect ratio. The first one that fits into the image is used, or else
    the largest centered box whose aspect ratio is within `ratio`.

    Args:
        u_BN: (B, N) float64, uniform in [0, 1); the first UNIFORMS_PER_BOX columns are used.
        height_B, width_B: (B,) size of the source images in pixels.
        scale: range of the box's area, as a fraction of the image's.
        ratio: range of the box's width / height; its logarithm is uniform.

    Returns:
        (B, 4) int64: whole pixels, inside the image.
    """
    # In float64 the rounding to pixels is the same on every device.
    height_B = height_B.double()
    width_B = width_B.double()
    u_area = u_BN[:, :PROPOSALS]
    u_ratio = u_BN[:, PROPOSALS : 2 * PROPOSALS]
    area = (height_B * width_B)[:, None] * (scale[0] + u_area * (scale[1] - scale[0]))
    low, high = (math.log(limit) for limit in ratio)
    aspect = torch.exp(low + u_ratio * (high - low))
    w = torch.round(torch.sqrt(area * aspect))
    h = torch.round(torch.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width_B[:, None]) & (h <= height_B[:, None])

    first = fits.int().argmax(dim=1, keepdim=True)  # argmax returns the first of equal values
    w = w.gather(1, first)[:, 0]
    h = h.gather(1, first)[:, 0]
    fits = fits.any(dim=1)
    top = torch.floor(u_BN[:, 2 * PROPOSALS] * (height_B - h + 1))
    left = torch.floor(u_BN[:, 2 * PROPOSALS + 1] * (width_B - w + 1))

    # torchvision's fallback, for images that are much wider or higher than `ratio` allows.
    whole = width_B / height_B
    w_fallback = torch.where(whole > ratio[1], torch.round(height_B * ratio[1]), width_B)
    h_fallback = torch.where(whole < ratio[0], torch.round(width_B / ratio[0]), height_B)
    w = torch.where(fits, w, w_fallback.clamp(min=1))
    h = torch.where(fits, h, h_fallback.clamp(min=1))
    top = torch.where(fits, top, torch.floor((height_B - h) / 2))
    left = torch.where(fits, left, torch.floor((width_B - w) / 2))
    return torch.stack([top, left, h, w], dim=1).long()


def eval_box(height_B: Tensor, width_B: Tensor, kind: Literal["squash", "center"]) -> Tensor:
    """(B, 4) float64: the box of the evaluation transform: the whole image, or its central square of CENTER."""
    height_B = height_B.double()
    width_B = width_B.double()
    if kind == "squash":
        return torch.stack([torch.zeros_like(height_B), torch.zeros_like(width_B), height_B, width_B], dim=1)
    side_B = CENTER * torch.minimum(height_B, width_B)
    return torch.stack([(height_B - side_B) / 2, (width_B - side_B) / 2, side_B, side_B], dim=1)
