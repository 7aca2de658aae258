"""The random parameters of the augmentation, drawn by counter (see fastssl/common/randomness.py).

N images stand for the views of a batch: N = count * B, all first views before all second ones.
"""

import itertools
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastssl.common.constants import constant
from fastssl.common.geometry import FLIP, UNIFORMS_PER_BOX
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.recipe import ViewsConfig

Array = TypeVar("Array", Tensor, np.ndarray)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))  # in which the jitter may apply them
BLUR_SIGMA = (0.1, 2.0)  # in output pixels (BYOL, appendix B)

# Columns of the uniform numbers of a view. The first ones are the crop box's and the flip's.
_JITTER = UNIFORMS_PER_BOX + 1
_ORDER = UNIFORMS_PER_BOX + 2
_FACTORS = UNIFORMS_PER_BOX + 3  # and the next three
_GRAY = UNIFORMS_PER_BOX + 7
_BLUR = UNIFORMS_PER_BOX + 8
_SIGMA = UNIFORMS_PER_BOX + 9
_SOLARIZE = UNIFORMS_PER_BOX + 10
_COUNT = UNIFORMS_PER_BOX + 11


class Parameters(NamedTuple, Generic[Array]):
    """The parameters of N images for everything but the crop: tensors, or arrays for the CPU kernel."""

    flip_N: Array  # bool: mirror left to right
    jitter_N: Array  # bool: apply the color jitter
    order_N4: Array  # int64: the jitter's operations BRIGHTNESS to HUE, first to last
    factor_N4: Array  # float32: factors of brightness, contrast, saturation; hue shift in turns
    gray_N: Array  # bool
    blur_N: Array  # bool
    sigma_N: Array  # float32: of the blur, in output pixels
    solarize_N: Array  # bool


def draw_uniforms(seed: int, epoch: int | Tensor, index_B: Tensor, count: Literal[1, 2] = 2) -> Tensor:
    """(N, numbers) float64: the uniform random numbers of `count` views."""
    view_N = torch.arange(count, device=index_B.device).repeat_interleave(len(index_B))
    return uniforms(seed, epoch, index_B.repeat(count), view_N, _COUNT, AUGMENTATION)


def draw_parameters(u_NU: Tensor, views: ViewsConfig, count: Literal[1, 2] = 2) -> Parameters[Tensor]:
    """Map uniform numbers to the parameters of everything but the crop."""
    jitter = views.jitter
    orders = constant(ORDERS, u_NU.device)
    order_N4 = orders[(u_NU[:, _ORDER] * len(orders)).long()]
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (jitter.brightness, jitter.contrast, jitter.saturation)]
    ranges.append((-jitter.hue, jitter.hue))
    factors = [low + u_NU[:, _FACTORS + i] * (high - low) for i, (low, high) in enumerate(ranges)]
    # Blur and solarize have a probability per view.
    per_view = list(zip(u_NU.chunk(count), (views.first, views.second)))
    return Parameters(
        flip_N=u_NU[:, FLIP] < views.flip,
        jitter_N=u_NU[:, _JITTER] < jitter.p,
        order_N4=order_N4,
        factor_N4=torch.stack(factors, dim=1).float(),
        gray_N=u_NU[:, _GRAY] < views.gray,
        blur_N=torch.cat([u_BU[:, _BLUR] < view.blur for u_BU, view in per_view]),
        sigma_N=(BLUR_SIGMA[0] + u_NU[:, _SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])).float(),
        solarize_N=torch.cat([u_BU[:, _SOLARIZE] < view.solarize for u_BU, view in per_view]),
    )


def no_augmentation(count: int, device: torch.device) -> Parameters[Tensor]:
    """Parameters under which no operation applies."""
    no = torch.zeros(count, dtype=torch.bool, device=device)
    one = torch.ones(count, device=device)
    order_N4 = torch.arange(4, device=device).expand(count, 4)
    return Parameters(no, no, order_N4, one[:, None].expand(count, 4), no, no, one, no)
