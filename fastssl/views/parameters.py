"""Every random number of the augmentation, drawn by counter (see fastssl/randomness.py)."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl import geometry
from fastssl.randomness import AUGMENTATION, uniforms
from fastssl.recipe import Views

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_SIGMA = (0.1, 2.0)  # in output pixels (BYOL, appendix B)

# Where each number sits in a sample's row of uniform numbers.
_FLIP, _JITTER, _ORDER, _FACTORS, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _COUNT = (
    geometry.NUMBERS + offset for offset in (0, 1, 2, 3, 7, 8, 9, 10, 11)
)


class Parameters(NamedTuple):
    """What happens to N images. Booleans say whether an operation applies."""

    flip_N: Tensor
    jitter_N: Tensor
    order_N4: Tensor  # the jitter's four operations, first to last
    factor_N4: Tensor  # float32: brightness, contrast, saturation factors; hue shift in turns
    gray_N: Tensor
    blur_N: Tensor
    sigma_N: Tensor
    solarize_N: Tensor


def draw_uniforms(seed: int, epoch: int | Tensor, index_B: Tensor, view: int) -> Tensor:
    """(B, numbers) float64: all of one view's random numbers for the samples with these ids."""
    return uniforms(seed, epoch, index_B, view, _COUNT, AUGMENTATION)


def draw_boxes(u_BN: Tensor, views: Views, height_B: Tensor, width_B: Tensor) -> Tensor:
    """(B, 4) int64 crop boxes (top, left, height, width) in source pixels."""
    return geometry.crop_box(u_BN[:, : geometry.NUMBERS], height_B, width_B, views.scale, views.ratio)


def draw_parameters(u_BN: Tensor, views: Views, view: int) -> Parameters:
    """Turn one view's uniform numbers into the parameters of everything but the crop."""
    jitter, own = views.jitter, (views.first, views.second)[view]
    if jitter.order == "random":
        orders = torch.tensor(list(itertools.permutations(range(4))), device=u_BN.device)
        order_N4 = orders[(u_BN[:, _ORDER] * len(orders)).long()]
    else:
        order_N4 = torch.arange(4, device=u_BN.device).expand(len(u_BN), 4)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (jitter.brightness, jitter.contrast, jitter.saturation)]
    ranges.append((-jitter.hue, jitter.hue))
    low = torch.tensor([a for a, _ in ranges], dtype=torch.float64, device=u_BN.device)
    high = torch.tensor([b for _, b in ranges], dtype=torch.float64, device=u_BN.device)
    return Parameters(
        flip_N=u_BN[:, _FLIP] < views.flip,
        jitter_N=u_BN[:, _JITTER] < jitter.p,
        order_N4=order_N4,
        factor_N4=(low + u_BN[:, _FACTORS : _FACTORS + 4] * (high - low)).float(),
        gray_N=u_BN[:, _GRAY] < views.gray,
        blur_N=u_BN[:, _BLUR] < own.blur,
        sigma_N=(BLUR_SIGMA[0] + u_BN[:, _SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])).float(),
        solarize_N=u_BN[:, _SOLARIZE] < own.solarize,
    )
