"""Every random number of the augmentation, drawn by counter (see fastssl/randomness.py)."""

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastssl.common import geometry
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.recipe import ViewsConfig

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


def draw_uniforms(seed: int, epoch: int | Tensor, index_B: Tensor, count: Literal[1, 2] = 2) -> Tensor:
    """(count * B, numbers) float64: all random numbers of the views, the first view's samples before the second's."""
    view = torch.arange(count, device=index_B.device).repeat_interleave(len(index_B))
    return uniforms(seed, epoch, index_B.repeat(count), view, _COUNT, AUGMENTATION)


def draw_boxes(u_NU: Tensor, views: ViewsConfig, height_N: Tensor, width_N: Tensor) -> Tensor:
    """(N, 4) int64 crop boxes (top, left, height, width) in source pixels."""
    return geometry.crop_box(u_NU[:, : geometry.NUMBERS], height_N, width_N, views.scale, views.ratio)


def draw_parameters(u_NU: Tensor, views: ViewsConfig, count: Literal[1, 2] = 2) -> Parameters:
    """Turn the views' uniform numbers (N = count * B) into the parameters of everything but the crop."""
    jitter = views.jitter
    per_microbatch = list(zip(u_NU.chunk(count), (views.first, views.second)))
    if jitter.order == "random":
        orders = torch.tensor(list(itertools.permutations(range(4))), device=u_NU.device)
        order_N4 = orders[(u_NU[:, _ORDER] * len(orders)).long()]
    else:
        order_N4 = torch.arange(4, device=u_NU.device).expand(len(u_NU), 4)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (jitter.brightness, jitter.contrast, jitter.saturation)]
    ranges.append((-jitter.hue, jitter.hue))
    factors = [low + u_NU[:, _FACTORS + i] * (high - low) for i, (low, high) in enumerate(ranges)]
    return Parameters(
        flip_N=u_NU[:, _FLIP] < views.flip,
        jitter_N=u_NU[:, _JITTER] < jitter.p,
        order_N4=order_N4,
        factor_N4=torch.stack(factors, dim=1).float(),
        gray_N=u_NU[:, _GRAY] < views.gray,
        blur_N=torch.cat([u[:, _BLUR] < only.blur for u, only in per_microbatch]),
        sigma_N=(BLUR_SIGMA[0] + u_NU[:, _SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])).float(),
        solarize_N=torch.cat([u[:, _SOLARIZE] < only.solarize for u, only in per_microbatch]),
    )


def nothing_drawn(count: int) -> Parameters:
    """Parameters, on the CPU, under which no operation applies."""
    no = torch.zeros(count, dtype=torch.bool)
    order_N4 = torch.arange(4).expand(count, 4)
    return Parameters(no, no, order_N4, torch.ones(count, 4), no, no, torch.ones(count), no)
