"""Canvases compressed in blocks (fastssl.beton.bc4, fastssl.loading.blocks)."""

import numpy as np
import pytest
import torch

from fastssl.beton import bc4
from fastssl.beton.format import bc4_bytes
from fastssl.loading.blocks import BlockImages


def random_blocks(count: int, side: int) -> np.ndarray:
    """Random bytes: half of the blocks are of each mode."""
    return np.random.default_rng(0).integers(0, 256, (count, bc4_bytes(side)), np.uint8)


@pytest.mark.parametrize("side", [8, 24, 64])
def test_torch_and_numba_decode_any_bytes_to_the_same_pixels(side: int) -> None:
    blocks = random_blocks(3, side)
    images = BlockImages(torch.from_numpy(blocks), side)
    want = np.stack([bc4.decode(row, side) for row in blocks])
    assert images.shape == want.shape
    np.testing.assert_array_equal(images.pixels().numpy(), want)
    np.testing.assert_array_equal(images._pixels_in_torch().numpy(), want)  # as on a GPU
    y_BHW1, c_BHW2 = images.planes()
    assert y_BHW1.shape == (3, side, side, 1) and c_BHW2.shape == (3, side // 2, side // 2, 2)
