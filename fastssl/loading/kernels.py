"""Compiled operations over whole batches: JPEG bytes to pixels, pixels to resized crops.

FFCV's library (turbojpeg) does the decoding; its loader is not used, because there an error in a
pipeline blocks for ever and a failed decode returns the previous batch's pixels. Here each sample
reports whether it decoded.
"""

import math
from threading import Lock

import numba
import numpy as np
import torch

# Importing ffcv sets torch's and numba's thread counts to 1.
_torch_threads, _numba_threads = torch.get_num_threads(), numba.get_num_threads()
from ffcv.libffcv import ctypes_imdecode, ctypes_memcopy  # noqa: E402

torch.set_num_threads(_torch_threads)
numba.set_num_threads(_numba_threads)

# numba's own "workqueue" layer aborts the process when two threads run parallel regions at once.
# omp and tbb survive it, but would oversubscribe the cores: so one lock, one region at a time.
numba.config.THREADING_LAYER = "threadsafe"
_one_region = Lock()

JPG = 0  # FFCV's code for an image stored as JPEG; 1 is raw pixels


def decode_squares(file, start_B, size_B, mode_B, out_BHWC, workers: int) -> np.ndarray:
    """Decode samples of one size straight into the batch. Returns (B,) bool: which ones decoded.

    file: the mapped file, uint8. start_B, size_B: where each sample's bytes lie in it.
    """
    with _one_region:
        numba.set_num_threads(workers)
        return _decode_squares(file, start_B, size_B, mode_B, out_BHWC)


def decode_crops(file, start_B, size_B, mode_B, shape_B2, box_BV4, out_BVSSC, workers: int) -> np.ndarray:
    """Decode each sample once and cut V resized crops out of it. Returns (B,) bool: which decoded.

    shape_B2: stored heights and widths. box_BV4: float64 top, left, height, width in stored pixels.
    """
    scratch = int(shape_B2.prod(axis=1).max()) * 3
    tallest = int(shape_B2[:, 0].max())
    with _one_region:
        numba.set_num_threads(workers)
        return _decode_crops(
            file, start_B, size_B, mode_B, shape_B2, box_BV4, out_BVSSC,
            np.empty((workers, scratch), np.uint8),
            np.empty((workers, tallest, out_BVSSC.shape[2], 3), np.float32),
        )  # fmt: skip


@numba.njit(parallel=True, nogil=True, error_model="numpy")
def _decode_squares(file, start_B, size_B, mode_B, out_BHWC):
    ok_B = np.zeros(len(start_B), np.bool_)
    for b in numba.prange(len(start_B)):
        source = file[start_B[b] : start_B[b] + size_B[b]]
        ok_B[b] = _decode(source, mode_B[b], out_BHWC[b])
    return ok_B


@numba.njit(parallel=True, nogil=True, error_model="numpy")
def _decode_crops(file, start_B, size_B, mode_B, shape_B2, box_BV4, out_BVSSC, scratch_TN, rows_THSC):
    ok_B = np.zeros(len(start_B), np.bool_)
    for b in numba.prange(len(start_B)):
        thread = numba.get_thread_id()
        source = file[start_B[b] : start_B[b] + size_B[b]]
        height, width = shape_B2[b]
        image = scratch_TN[thread, : height * width * 3].reshape((height, width, 3))
        ok_B[b] = _decode(source, mode_B[b], image)
        if ok_B[b]:
            for v in range(box_BV4.shape[1]):
                crop_resize(image, box_BV4[b, v], out_BVSSC[b, v], rows_THSC[thread])
    return ok_B


@numba.njit(nogil=True, error_model="numpy")
def _decode(source, mode, out_HWC):
    """One stored image into `out_HWC`; False where it is damaged or of another size."""
    height, width = out_HWC.shape[0], out_HWC.shape[1]
    if mode != JPG:
        ctypes_memcopy(source.ctypes.data, out_HWC.ctypes.data, np.uint64(height * width * 3))
        return True
    if _jpeg_shape(source) != (height, width):
        return False
    return (
        ctypes_imdecode(
            source.ctypes.data, np.uint64(source.size), np.uint32(height), np.uint32(width),
            out_HWC.ctypes.data, np.uint32(height), np.uint32(width),
            np.uint32(0), np.uint32(0), np.uint32(1), np.uint32(1), False, False,
        ) == 0
    )  # fmt: skip


@numba.njit(nogil=True, error_model="numpy")
def _jpeg_shape(source):
    """(height, width) that a JPEG's own header states; (0, 0) where there is none.

    turbojpeg scales an image of another size to what it is asked for and leaves the rest of the
    buffer as it was, so the size is compared first.
    """
    at = 2
    while at + 9 < source.size and source[at] == 0xFF:
        marker = source[at + 1]
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return (
                np.int64(source[at + 5]) << 8 | np.int64(source[at + 6]),
                np.int64(source[at + 7]) << 8 | np.int64(source[at + 8]),
            )
        if marker == 0xFF:  # padding
            at += 1
        else:
            at += 2 + (np.int64(source[at + 2]) << 8 | np.int64(source[at + 3]))
    return np.int64(0), np.int64(0)


@numba.njit(nogil=True, error_model="numpy", fastmath=True)
def crop_resize(image_HWC, box, out_SSC, rows_HSC):
    """Antialiased bilinear resize of a box (top, left, height, width; float pixels), as views/resample.py.

    rows_HSC: float32 scratch, at least as high as the image: the image resized along its width only.
    """
    size = out_SSC.shape[0]
    top, left, height, width = box
    low_S, high_S, weight_SK = _weights(left, width, size, image_HWC.shape[1])
    first_row = max(0, int(math.floor(top)))
    end_row = min(image_HWC.shape[0], int(math.ceil(top + height)))
    for row in range(first_row, end_row):
        for x in range(size):
            r = g = b = np.float32(0)
            for i in range(low_S[x], high_S[x]):
                w = weight_SK[x, i - low_S[x]]
                r += w * image_HWC[row, i, 0]
                g += w * image_HWC[row, i, 1]
                b += w * image_HWC[row, i, 2]
            rows_HSC[row, x, 0], rows_HSC[row, x, 1], rows_HSC[row, x, 2] = r, g, b

    low_S, high_S, weight_SK = _weights(top, height, size, image_HWC.shape[0])
    line = np.empty(size * 3, np.float32)
    for y in range(size):
        line[:] = 0.5  # rounds to nearest below
        for i in range(low_S[y], high_S[y]):
            w = weight_SK[y, i - low_S[y]]
            row_values = rows_HSC[i].reshape(-1)
            for j in range(size * 3):
                line[j] += w * row_values[j]
        out = out_SSC[y].reshape(-1)
        for j in range(size * 3):
            out[j] = np.uint8(line[j])


@numba.njit(nogil=True, error_model="numpy")
def _weights(start, length, out_size, in_size):
    """For each output position its range [low, high) of input pixels and their weights."""
    scale = length / out_size
    support = max(scale, 1.0)
    low_S = np.empty(out_size, np.int64)
    high_S = np.empty(out_size, np.int64)
    weight_SK = np.zeros((out_size, int(2 * support) + 3), np.float32)
    for position in range(out_size):
        center = start + (position + 0.5) * scale
        # Pixels with a part inside the interval, and within the triangle's reach.
        low = max(int(math.floor(start)), int(math.floor(center - support)), 0)
        high = min(int(math.ceil(start + length)), int(math.ceil(center + support)), in_size)
        total = 0.0
        for i in range(low, high):
            total += max(0.0, 1.0 - abs(i + 0.5 - center) / support)
        for i in range(low, high):
            weight_SK[position, i - low] = max(0.0, 1.0 - abs(i + 0.5 - center) / support) / total
        low_S[position], high_S[position] = low, high
    return low_S, high_S, weight_SK
