"""Compiled functions that decode stored bytes to pixels, and cut resized crops out of them.

Several threads decode a batch: each one runs the same function, without the GIL, and takes samples from a shared
counter until none is left. FFCV's loader is not used, because an exception in it blocks forever, and after a failed
decode it returns the pixels of the previous batch. Here every sample has a status from the decoder, which is turbojpeg,
as in build-beton.
"""

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import llvmlite.binding
import numpy as np
from numba import types
from numba.extending import intrinsic

from fastssl.beton import bc4, jpeg
from fastssl.beton.format import BC4, RAW
from fastssl.beton.resize import resize_box
from fastssl.common.compiled import compiled
from fastssl.loading.crops import LARGEST_SHRINK, CropScratch, Planes, crop_planes

# Status of a sample.
DECODED = 0
WARNED = 1  # decoded, with a warning of the decoder
FAILED = 2
# An error after a warning is reported as a warning, and leaves the rows that follow as they were. So the last row is
# filled before an image is decoded; one that still has this value is decoded again with the other one.
MARKS = 85, 170
ALL_TAKEN = 1 << 62  # a counter that is set to this makes the threads stop


def _external(name: str, result: types.Type, *arguments: types.Type) -> Callable[..., int]:
    """A turbojpeg function that compiled code calls by name, so that the code can be cached. Pointers are numbers."""
    symbol = f"fastssl_{name}"  # another library of the process may have turbojpeg's own names
    llvmlite.binding.add_symbol(symbol, ctypes.cast(jpeg.turbojpeg()[name], ctypes.c_void_p).value)
    return cast("Callable[..., int]", types.ExternalFunction(symbol, result(*arguments)))


_POINTER = types.uintp
_INT = types.int32
_new_decoder = _external("tjInitDecompress", _POINTER)
_free_decoder = _external("tjDestroy", _INT, _POINTER)
_read_size = _external("tjDecompressHeader3", _INT, _POINTER, _POINTER, types.uint64, *[_POINTER] * 4)
_decompress = _external("tjDecompress2", _INT, _POINTER, _POINTER, types.uint64, _POINTER, *[_INT] * 5)
_decompress_planes = _external(
    "tjDecompressToYUVPlanes", _INT, _POINTER, _POINTER, types.uint64, _POINTER, _INT, _POINTER, _INT, _INT
)
_error_code = _external("tjGetErrorCode", _INT, _POINTER)
# libc's: 2.5 times as fast as numba's copy of a slice (48 KiB at random positions of a mapped file).
_memcpy = cast("Callable[..., int]", types.ExternalFunction("memcpy", _POINTER(_POINTER, _POINTER, types.uint64)))

# By turbojpeg's number of the subsampling: rows and columns of luma that a pixel of chroma spans, 0 where another path
# has to decode it.
_SPANS = np.array([jpeg.SUBSAMPLING.get(number, (0, 0)) for number in range(max(jpeg.SUBSAMPLING) + 1)])


class DecodeArrays(NamedTuple):
    """What the threads that decode a batch read, and what they fill."""

    file: np.ndarray  # uint8: the mapped .beton
    start_B: np.ndarray  # int64: byte of the file at which each image starts
    size_B: np.ndarray  # stored bytes of each image
    mode_B: np.ndarray  # RAW, JPG or BC4 of beton.format
    shape_B2: np.ndarray  # int64: stored height and width in px
    box_BV4: np.ndarray  # float64: boxes to cut out (top, left, height, width), in stored px; V = 0 for whole images
    flip_BV: np.ndarray  # bool: mirror the crop left to right
    # uint8, filled by the threads: (B, H, W, C), or (B, bytes) for blocks, or (B, V, size, size, 3) for crops
    out: np.ndarray
    status_B: np.ndarray  # int8, filled too: DECODED, WARNED or FAILED; a failed sample's pixels are undefined
    counter: np.ndarray  # int64 (1,): the next sample that no thread has taken


@compiled()
def gather_rows(file: np.ndarray, position_B: np.ndarray, out_BN: np.ndarray) -> None:
    """Fill each row of `out_BN` with the bytes of the file from a position on. Others run while it waits for a disk."""
    for b in range(len(position_B)):
        out_BN[b] = file[position_B[b] : position_B[b] + out_BN.shape[1]]


@compiled()
def copy_images(arrays: DecodeArrays) -> None:
    """Copy the stored bytes of whole images, pixels or blocks, until no sample is left to take."""
    b = take(arrays.counter)
    while b < len(arrays.start_B):
        source = arrays.file[arrays.start_B[b] : arrays.start_B[b] + arrays.size_B[b]]
        arrays.status_B[b] = _copy(source, arrays.out[b].reshape(-1))
        b = take(arrays.counter)


@compiled()
def decode_blocks(blocks_BN: np.ndarray, out_BHWC: np.ndarray, counter: np.ndarray) -> None:
    """Decode images in blocks to pixels, until none is left to take."""
    b = take(counter)
    while b < len(blocks_BN):
        bc4.decode_into(blocks_BN[b], out_BHWC[b])
        b = take(counter)


@compiled()
def decode_images(arrays: DecodeArrays) -> None:
    """Decode whole images of one size, until no sample is left to take."""
    decoder = _new_decoder()
    b = take(arrays.counter)
    while b < len(arrays.start_B):
        source = arrays.file[arrays.start_B[b] : arrays.start_B[b] + arrays.size_B[b]]
        arrays.status_B[b], decoder = _decode(decoder, source, arrays.mode_B[b], arrays.out[b])
        b = take(arrays.counter)
    _free_decoder(decoder)


@compiled()
def decode_eval_crops(arrays: DecodeArrays, scratch: CropScratch) -> None:
    """Decode each image to RGB and cut its resized boxes out of it, until no sample is left to take.

    scratch: this thread's own memory.
    """
    decoder = _new_decoder()
    b = take(arrays.counter)
    while b < len(arrays.start_B):
        source = arrays.file[arrays.start_B[b] : arrays.start_B[b] + arrays.size_B[b]]
        arrays.status_B[b], decoder = _crop_pixels(decoder, source, b, arrays, scratch)
        b = take(arrays.counter)
    _free_decoder(decoder)


@compiled()
def decode_crops(arrays: DecodeArrays, scratch: CropScratch) -> None:
    """Decode each image once and cut its resized crops out of it, mirrored where drawn, until none is left to take.

    Images in YCbCr are decoded to their planes only. scratch: this thread's own memory.
    """
    decoder = _new_decoder()
    b = take(arrays.counter)
    while b < len(arrays.start_B):
        source = arrays.file[arrays.start_B[b] : arrays.start_B[b] + arrays.size_B[b]]
        height, width = arrays.shape_B2[b]
        rows = columns = 0
        if max(height, width) <= LARGEST_SHRINK * arrays.out.shape[2]:
            if arrays.mode_B[b] == BC4:
                rows = columns = 2
            elif arrays.mode_B[b] != RAW:
                rows, columns = _read_subsampling(decoder, source, height, width)
        if rows == 0:
            arrays.status_B[b], decoder = _crop_pixels(decoder, source, b, arrays, scratch)
            for v in range(arrays.flip_BV.shape[1]):
                if arrays.flip_BV[b, v]:
                    _mirror(arrays.out[b, v])
        else:
            planes = _new_planes(height, width, rows, columns, scratch.image)
            if arrays.mode_B[b] == BC4:
                arrays.status_B[b] = _decode_windows(source, arrays.box_BV4[b], planes)
            else:
                arrays.status_B[b], decoder = _decode_planes(decoder, source, planes)
            if arrays.status_B[b] != FAILED:
                for v in range(arrays.box_BV4.shape[1]):
                    crop_planes(planes, arrays.box_BV4[b, v], arrays.flip_BV[b, v], arrays.out[b, v], scratch)
        b = take(arrays.counter)
    _free_decoder(decoder)


def _take(typing_context: Any, counter: types.Array) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


# Within compiled code, take(counter) adds 1 to counter[0] and returns its value before that. The addition is atomic, so
# every value goes to one thread.
take = cast("Callable[[np.ndarray], int]", intrinsic(_take))


@compiled()
def _crop_pixels(
    decoder: int, source: np.ndarray, b: int, arrays: DecodeArrays, scratch: CropScratch
) -> tuple[int, int]:
    """Decode sample b to RGB pixels, and resize its boxes. Returns what `_decode` does."""
    height, width = arrays.shape_B2[b]
    image = scratch.image[: height * width * 3].reshape((height, width, 3))
    status, decoder = _decode(decoder, source, arrays.mode_B[b], image)
    if status != FAILED:
        for v in range(arrays.box_BV4.shape[1]):
            resize_box(image, arrays.box_BV4[b, v], arrays.out[b, v], scratch.row)
    return status, decoder


@compiled()
def _mirror(out_YXC: np.ndarray) -> None:
    """Exchange left and right."""
    size = out_YXC.shape[1]
    for y in range(out_YXC.shape[0]):
        for x in range(size // 2):
            for channel in range(out_YXC.shape[2]):
                value = out_YXC[y, x, channel]
                out_YXC[y, x, channel] = out_YXC[y, size - 1 - x, channel]
                out_YXC[y, size - 1 - x, channel] = value


@compiled()
def _read_subsampling(decoder: int, source: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """How many pixels of luma one of chroma spans, by the header of a JPEG; 0, 0 if it has no such planes."""
    header, failed = _read_header(decoder, source)
    subsampling = header[2]
    is_expected = header[0] == width and header[1] == height and header[3] == jpeg.TJCS_YCBCR
    if failed or not is_expected or not 0 <= subsampling < len(_SPANS):
        return 0, 0
    return _SPANS[subsampling, 0], _SPANS[subsampling, 1]


@compiled()
def _new_planes(height: int, width: int, rows: int, columns: int, memory: np.ndarray) -> Planes:
    """Planes of an image in `memory`, each of whole pixels of chroma."""
    c_height = (height + rows - 1) // rows
    c_width = (width + columns - 1) // columns
    y_bytes = c_height * rows * c_width * columns
    c_bytes = c_height * c_width
    return Planes(
        memory[:y_bytes].reshape((c_height * rows, c_width * columns)),
        memory[y_bytes : y_bytes + c_bytes].reshape((c_height, c_width)),
        memory[y_bytes + c_bytes : y_bytes + 2 * c_bytes].reshape((c_height, c_width)),
        height,
        width,
        rows,
        columns,
    )


@compiled()
def _decode_windows(source: np.ndarray, box_V4: np.ndarray, planes: Planes) -> int:
    """Decode a canvas in blocks where its boxes lie. Returns its status."""
    side = planes.width
    y_bytes = side * side // 2
    if source.size != y_bytes * 3 // 2:
        return FAILED
    if len(box_V4) == 0:  # the profiler decodes without crops
        box_V4 = np.array([[0.0, 0.0, side, side]])
    top = left = side
    bottom = right = 0
    for box in box_V4:
        top = min(top, max(int(box[0]), 0))
        left = min(left, max(int(box[1]), 0))
        bottom = max(bottom, min(int(math.ceil(box[0] + box[2])), side))
        right = max(right, min(int(math.ceil(box[1] + box[3])), side))
    bc4.decode_window(source[:y_bytes], top, left, bottom, right, planes.y)
    # A pixel of chroma is two of luma.
    window = top // 2, left // 2, (bottom + 1) // 2, (right + 1) // 2
    bc4.decode_window(source[y_bytes : y_bytes + y_bytes // 4], *window, planes.cb)
    bc4.decode_window(source[y_bytes + y_bytes // 4 :], *window, planes.cr)
    return DECODED


@compiled()
def _decode_planes(decoder: int, source: np.ndarray, planes: Planes) -> tuple[int, int]:
    """Decode a JPEG whose header has these sizes to its planes. Returns what `_decode` does."""
    pointers = np.array([planes.y.ctypes.data, planes.cb.ctypes.data, planes.cr.ctypes.data], np.uintp)
    last_row = planes.y[planes.height - 1, : planes.width]
    for mark in MARKS:
        last_row[:] = mark
        failed = _decompress_planes(
            decoder, source.ctypes.data, np.uint64(source.size), pointers.ctypes.data,
            np.int32(planes.width), np.uintp(0), np.int32(planes.height), np.int32(0),
        )  # fmt: skip
        if not failed:
            return DECODED, decoder
        if _error_code(decoder) != jpeg.TJERR_WARNING:
            break
        if not (last_row == mark).all():
            return WARNED, decoder
    _free_decoder(decoder)
    return FAILED, _new_decoder()


@compiled()
def _decode(decoder: int, source: np.ndarray, mode: int, out_HWC: np.ndarray) -> tuple[int, int]:
    """Decode one stored image into `out_HWC`. Returns its status, and the decoder for the next image."""
    if mode == RAW:
        return _copy(source, out_HWC.reshape(-1)), decoder
    if mode == BC4:
        if source.size != out_HWC.size // 4:
            return FAILED, decoder
        bc4.decode_into(source, out_HWC)
        return DECODED, decoder
    # Compare the size in the header first: turbojpeg scales an image of another size to the requested one, and leaves
    # the rest of the buffer unchanged.
    height, width, _ = out_HWC.shape
    header, _ = _read_header(decoder, source)
    if header[0] == width and header[1] == height:
        last_row = out_HWC[height - 1].reshape(-1)
        for mark in MARKS:
            last_row[:] = mark
            failed = _decompress(
                decoder, source.ctypes.data, np.uint64(source.size), out_HWC.ctypes.data,
                np.int32(width), np.int32(0), np.int32(height), np.int32(jpeg.TJPF_RGB), np.int32(0),
            )  # fmt: skip
            if not failed:
                return DECODED, decoder
            if _error_code(decoder) != jpeg.TJERR_WARNING:
                break
            if not (last_row == mark).all():
                return WARNED, decoder
    _free_decoder(decoder)  # after a damaged header a decoder fails for every image
    return FAILED, _new_decoder()


@compiled()
def _read_header(decoder: int, source: np.ndarray) -> tuple[np.ndarray, int]:
    """What the header of a JPEG states, int32: width, height, subsampling, color space; and whether reading failed."""
    header = np.zeros(4, np.int32)
    at = header.ctypes.data
    failed = _read_size(decoder, source.ctypes.data, np.uint64(source.size), at, at + 4, at + 8, at + 12)
    return header, failed


@compiled()
def _copy(source: np.ndarray, out: np.ndarray) -> int:
    """Copy a stored image to the bytes `out`. Returns its status: FAILED if it has another number of bytes."""
    if source.size != out.size:
        return FAILED
    _memcpy(out.ctypes.data, source.ctypes.data, np.uint64(out.size))
    return DECODED
