"""The resize of build-beton (whole images) and of the loader (crops) on the CPU, compared with Pillow's."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_images import photo

from fastssl.beton.resize import resize, resize_box, resize_line, resize_weights
from fastssl.common.geometry import UNIFORMS_PER_BOX, crop_box


def test_resize_equals_pillows_to_one_grey_level():
    """Noise and black-and-white images, shrunk and enlarged, with sides from 1 px."""
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


def test_crops_are_closer_to_pillow_than_those_of_opencv_area():
    """PSNR against Pillow's antialiased bilinear, for boxes as in training, to 224 and to 64 px."""
    noise = np.random.default_rng(1).normal(0, 20, (375, 500, 3))
    pixels = (np.asarray(photo(3, 500, 375)) + noise).clip(0, 255).astype(np.uint8)
    u = torch.from_numpy(np.random.default_rng(0).random((60, UNIFORMS_PER_BOX)))
    boxes = crop_box(u, torch.full((60,), 375), torch.full((60,), 500), (0.08, 1.0), (3 / 4, 4 / 3)).numpy()
    line, ours, opencv = np.empty(1500, np.float32), [], []
    for number, (top, left, height, width) in enumerate(boxes):
        size = (224, 64)[number % 2]
        crop = pixels[top : top + height, left : left + width]
        want = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)).astype(float)
        out = np.empty((size, size, 3), np.uint8)
        resize_box(pixels, np.array([top, left, height, width], np.float64), out, line)
        area = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
        ours.append(np.square(out - want).mean())
        opencv.append(np.square(area - want).mean())
        assert np.abs(out - want).max() <= 1
    assert max(ours) < 0.5 and np.mean(ours) < np.mean(opencv)  # 0.5: a PSNR of 51 dB


@pytest.mark.parametrize("function", [resize, resize_box, resize_line, resize_weights])
def test_fastmath_is_set(function):
    """Otherwise numba compiles a function with the fastmath of its first caller: see the next test."""
    assert function.targetoptions["fastmath"] is False


@pytest.mark.slow  # compiles the resize twice
def test_the_pixels_do_not_depend_on_which_caller_compiled_the_resize_first(tmp_path):
    """numba lets a function inherit fastmath from its first caller, and caches the result: a build after the views had
    run gave other bytes."""
    script = """
import sys, numba, numpy as np
from fastssl.beton.resize import resize, resize_line, resize_weights
image = np.random.default_rng(0).integers(0, 256, (61, 79, 3), dtype=np.uint8)

@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
def fast_caller(image, line, out):
    first_Y, weight_YK = resize_weights(0.0, float(image.shape[0]), 96, image.shape[0])
    first_X, weight_XK = resize_weights(0.0, float(image.shape[1]), 96, image.shape[1])
    resize_line(image, first_Y[0], weight_YK[0], first_X, weight_XK, line, out)

if sys.argv[1] == "fast first":
    fast_caller(image, np.empty(79 * 3, np.float32), np.empty(96 * 3, np.float32))
sys.stdout.buffer.write(resize(image, 96, 96).tobytes())
"""
    bytes_of = {}
    for order in ("fast first", "plain first"):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / order.replace(" ", "-"))}
        done = subprocess.run([sys.executable, "-c", script, order], env=environment, capture_output=True, check=True)
        bytes_of[order] = done.stdout
    assert len(bytes_of["plain first"]) == 96 * 96 * 3
    assert bytes_of["fast first"] == bytes_of["plain first"]
