"""The crop boxes, compared with torchvision's RandomResizedCrop."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fastssl.common.geometry import UNIFORMS_PER_BOX, crop_box
from fastssl.common.randomness import AUGMENTATION, uniforms

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def boxes(count, height, width):
    u = uniforms(0, 0, torch.arange(count), 0, UNIFORMS_PER_BOX, AUGMENTATION)
    return crop_box(u, torch.full((count,), height), torch.full((count,), width), SCALE, RATIO)


def test_crop_boxes_have_the_distribution_of_torchvision():
    """Areas, aspect ratios and positions, by Kolmogorov-Smirnov tests."""
    n, height, width = 4000, 375, 500
    ours = boxes(n, height, width).numpy()
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, SCALE, RATIO) for _ in range(n)])
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (height - b[:, 2] + 1),
        lambda b: b[:, 1] / (width - b[:, 3] + 1),
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1), (3, 2000)])
def test_crop_boxes_of_extreme_images_stay_inside(height, width):
    top, left, h, w = boxes(200, height, width).unbind(1)
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_the_fallback_box_equals_that_of_torchvision():
    """No proposal fits an image 100 times as wide as high: the central box of the largest allowed ratio."""
    u = torch.full((1, UNIFORMS_PER_BOX), 0.999, dtype=torch.float64)
    box = crop_box(u, torch.tensor([10]), torch.tensor([1000]), (0.9, 1), RATIO)
    assert box.tolist() == [[0, (1000 - 13) // 2, 10, 13]]
