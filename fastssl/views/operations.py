"""The augmentation's operations: pure functions of pixels in [0, 1] and per-sample parameters.

Each one equals torchvision's function of the same name, applied to each sample with its own parameters.
Images are (N, 3, H, W) float32, RGB.
"""

import torch
from torch import Tensor

from .parameters import BRIGHTNESS, CONTRAST, HUE

BLUR_RADIUS = 6
SOLARIZE_THRESHOLD = 128 / 255


def luma(x: Tensor) -> Tensor:
    """(N, 1, H, W): the grey value as torchvision weighs it (ITU-R 601)."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def color_jitter(x: Tensor, apply_N: Tensor, order_N4: Tensor, factor_N4: Tensor, with_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, in each sample's own order, clamped after each one.

    The first three are blends with black, with the mean grey and with the grey image, so one blend
    serves all three. `with_hue=False` leaves out the hue's arithmetic where its strength is 0.
    """
    result = x
    for stage in range(4):
        operation_N = order_N4[:, stage]
        factor = factor_N4.gather(1, operation_N[:, None])[:, :, None, None]
        operation = operation_N[:, None, None, None]
        gray = luma(result)
        other = torch.where(operation == CONTRAST, gray.mean(dim=(2, 3), keepdim=True), gray)
        other = torch.where(operation == BRIGHTNESS, torch.zeros_like(gray), other)
        blended = (factor * result + (1 - factor) * other).clamp(0, 1)
        same_or_shifted = shift_hue(result, factor) if with_hue else result
        result = torch.where(operation == HUE, same_or_shifted, blended)
    return torch.where(apply_N[:, None, None, None], result, x)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (in turns of the colour circle, broadcastable) to the hue of HSV, saturation and value kept.

    Back from HSV by f(n) = v - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1,
    which needs no branch on the sextant.
    """
    r, g, b = x.split(1, dim=1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sextant = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = torch.remainder(n + sextant + 6 * turn, 6.0)
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def grayscale(x: Tensor, apply_N: Tensor) -> Tensor:
    return torch.where(apply_N[:, None, None, None], luma(x), x)


def gaussian_blur(x: Tensor, apply_N: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur of radius 6 with a sigma (in pixels) a sample and a reflected border."""
    rows, columns = _blur_matrix(sigma_N, x.shape[2]), _blur_matrix(sigma_N, x.shape[3])
    blurred = rows[:, None] @ x @ columns[:, None].transpose(-1, -2)
    return torch.where(apply_N[:, None, None, None], blurred, x)


def solarize(x: Tensor, apply_N: Tensor) -> Tensor:
    inverted = torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)
    return torch.where(apply_N[:, None, None, None], inverted, x)


def _blur_matrix(sigma_N: Tensor, size: int) -> Tensor:
    """(N, size, size): convolution with each sample's kernel along one axis, border included."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=sigma_N.device)
    kernel = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    return (kernel @ _reflected_shifts(size, sigma_N.device).flatten(1)).view(-1, size, size)


@torch.compiler.assume_constant_result  # else a compiled graph would build it for every batch
def _reflected_shifts(size: int, device: torch.device) -> Tensor:
    """(13, size, size) of 0 and 1: entry (d, i, j) is 1 where position i + d - 6 is pixel j after reflection."""
    if (size, device) not in _shifts:
        position = torch.arange(size)[:, None] + torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
        position = torch.remainder(position, 2 * size - 2)
        position = torch.minimum(position, 2 * size - 2 - position)
        _shifts[size, device] = torch.nn.functional.one_hot(position.T, size).float().to(device)
    return _shifts[size, device]


_shifts: dict[tuple[int, torch.device], Tensor] = {}
