"""The crop box of RandomResizedCrop, drawn in the source image's pixels.

One function serves the device (views) and the CPU (loading), so both cut the same boxes.
"""

import math

import torch
from torch import Tensor

PROPOSALS = 10
NUMBERS = 2 * PROPOSALS + 2  # uniform numbers that one box uses up


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
