"""The augmentation's operations: pure functions of pixels in [0, 1] and per-sample parameters.

Each one equals torchvision's function of the same name, applied to each sample with its own parameters.
Images are (N, 3, H, W) float32, RGB.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.views.parameters import BRIGHTNESS, CONTRAST, HUE

BLUR_RADIUS = 6
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue, as torchvision weighs them (ITU-R 601)
SOLARIZE_THRESHOLD = 128 / 255


def luma(x: Tensor) -> Tensor:
    """(N, 1, H, W): the grey value."""
    r, g, b = x.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)[:, None]


def color_jitter(x: Tensor, apply_N: Tensor, order_N4: Tensor, factor_N4: Tensor, with_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, in each sample's own order, clamped after each one.

    Contrast alone looks beyond the pixel, at the image's mean grey. So the operations before it make one
    pointwise pass that ends in a mean, and contrast and those behind it make another.
    `with_hue=False` leaves out the hue's arithmetic where its strength is 0.
    """
    contrast_at_N = (order_N4 == CONTRAST).int().argmax(dim=1)

    def pointwise(x: Tensor, stage: int, active_N: Tensor) -> Tensor:
        """Brightness and saturation, blends with black and with the grey image, or hue."""
        operation_N = order_N4[:, stage]
        factor = factor_N4.gather(1, operation_N[:, None])[:, :, None, None]
        operation_N = torch.where(active_N, operation_N, CONTRAST)[:, None, None, None]
        other = torch.where(operation_N == BRIGHTNESS, 0.0, luma(x))
        result = torch.where(operation_N == CONTRAST, x, (factor * x + (1 - factor) * other).clamp(0, 1))
        return torch.where(operation_N == HUE, shift_hue(x, factor), result) if with_hue else result

    for stage in range(3):
        x = pointwise(x, stage, apply_N & (stage < contrast_at_N))
    factor = torch.where(apply_N, factor_N4[:, CONTRAST], 1.0)[:, None, None, None]
    x = (factor * x + (1 - factor) * luma(x).mean(dim=(2, 3), keepdim=True)).clamp(0, 1)
    for stage in range(1, 4):
        x = pointwise(x, stage, apply_N & (stage > contrast_at_N))
    return x


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (in turns of the colour circle, broadcastable) to the hue of HSV, saturation and value kept.

    Back from HSV by f(n) = v - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1,
    which needs no branch on the sextant.
    """
    r, g, b = x.split(1, dim=1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = torch.remainder(n + sextant + 6 * turn, 6.0)
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def grayscale(x: Tensor, apply_N: Tensor) -> Tensor:
    return torch.where(apply_N[:, None, None, None], luma(x), x)


def gaussian_blur(x: Tensor, apply_N: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur of radius 6 with a sigma (in pixels) a sample and a reflected border."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    kernel_NK = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel_NK = kernel_NK / kernel_NK.sum(dim=1, keepdim=True)
    kernel_NK = torch.where(apply_N[:, None], kernel_NK, (offset == 0).float())
    taps = kernel_NK[:, :, None, None, None].unbind(1)
    height, width = x.shape[2:]
    x = functional.pad(x, (0, 0, BLUR_RADIUS, BLUR_RADIUS), mode="reflect")
    x = sum(tap * x[:, :, d : d + height] for d, tap in enumerate(taps))
    x = functional.pad(x, (BLUR_RADIUS, BLUR_RADIUS, 0, 0), mode="reflect")
    return sum(tap * x[..., d : d + width] for d, tap in enumerate(taps))


def solarize(x: Tensor, apply_N: Tensor) -> Tensor:
    inverted = torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)
    return torch.where(apply_N[:, None, None, None], inverted, x)
