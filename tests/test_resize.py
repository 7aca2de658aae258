"""The resize of build-beton beside Pillow's."""

import numpy as np
from PIL import Image

from fastssl.beton.resize import resize


def test_resize_is_pillows_to_one_grey_level():
    """Noise and black-and-white, all ways of shrinking and enlarging, sides from 1 px on."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        height, width, out_height, out_width = (int(side) for side in rng.integers(1, 200, 4))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if trial % 2:
            pixels = (pixels > 127).astype(np.uint8) * 255
        expected = np.asarray(Image.fromarray(pixels).resize((out_width, out_height), Image.Resampling.BILINEAR))
        got = resize(pixels, out_height, out_width)
        assert got.shape == expected.shape
        # Pillow rounds between its two passes, so one grey level is all there can be.
        assert np.abs(got.astype(int) - expected).max() <= 1
    assert (resize(np.full((9, 7, 3), 255, np.uint8), 5, 4) == 255).all()
