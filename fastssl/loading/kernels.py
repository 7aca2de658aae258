"""Compiled operations: stored bytes to pixels, pixels to resized crops.

A batch is decoded by several threads at once: each one enters the same function, without the GIL,
and takes samples from a counter that all share until none is left. FFCV's loader is not used: there
an error blocks for ever, and a failed decode returns the previous batch's pixels. Here each sample's
status says what the decoder (turbojpeg, the one that build-beton checks every JPEG with) thought.
"""

from ctypes import c_void_p, cast

import llvmlite.binding
import numpy as np
from numba import types
from numba.extending import intrinsic

from fastssl.beton import jpeg
from fastssl.beton.format import RAW
from fastssl.beton.resize import resize_box
from fastssl.common.compiled import compiled

DECODED, WARNED, FAILED = 0, 1, 2  # a sample's status; WARNED: decoded, but the decoder complained
ALL_TAKEN = 1 << 62  # set as the counter it makes the threads stop


def _external(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    """A turbojpeg function that compiled code calls by name, so that the code can be cached. Pointers are numbers."""
    symbol = f"fastssl_{name}"  # another library of the process may have turbojpeg's own names
    llvmlite.binding.add_symbol(symbol, cast(jpeg.turbojpeg()[name], c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


_POINTER, _INT = types.uintp, types.int32
_new_decoder = _external("tjInitDecompress", _POINTER)
_free_decoder = _external("tjDestroy", _INT, _POINTER)
_read_size = _external("tjDecompressHeader3", _INT, _POINTER, _POINTER, types.uint64, *[_POINTER] * 4)
_decompress = _external("tjDecompress2", _INT, _POINTER, _POINTER, types.uint64, _POINTER, *[_INT] * 5)
_error_code = _external("tjGetErrorCode", _INT, _POINTER)
_TJPF_RGB, _TJERR_WARNING = jpeg.TJPF_RGB, jpeg.TJERR_WARNING


@compiled()
def decode_squares(file, start_B, size_B, mode_B, out_BHWC, status_B, counter):
    """Decode samples of one size straight into the batch, until none is left to take.

    file: the mapped file, uint8. start_B, size_B: where each sample's bytes lie in it, mode_B: how
    they are stored. status_B: is filled. counter: int64 (1,), the next sample that nobody has taken.
    """
    decoder = _new_decoder()
    b = take(counter)
    while b < len(start_B):
        source = file[start_B[b] : start_B[b] + size_B[b]]
        status_B[b], decoder = _decode(decoder, source, mode_B[b], out_BHWC[b])
        b = take(counter)
    _free_decoder(decoder)


@compiled()
def decode_crops(file, start_B, size_B, mode_B, shape_B2, box_BV4, out_BVSSC, status_B, counter, scratch, line):
    """The same, but decode each sample once into `scratch` and cut V resized crops out of it.

    shape_B2: stored heights and widths. box_BV4: float64 top, left, height, width in stored pixels.
    scratch, line: this thread's own, uint8 for the largest image and float32 for its longest line.
    """
    decoder = _new_decoder()
    b = take(counter)
    while b < len(start_B):
        source = file[start_B[b] : start_B[b] + size_B[b]]
        height, width = shape_B2[b]
        image = scratch[: height * width * 3].reshape((height, width, 3))
        status_B[b], decoder = _decode(decoder, source, mode_B[b], image)
        if status_B[b] != FAILED:
            for v in range(box_BV4.shape[1]):
                resize_box(image, box_BV4[b, v], out_BVSSC[b, v], line)
        b = take(counter)
    _free_decoder(decoder)


@intrinsic
def take(typing_context, counter):
    """Add one to counter[0] and return what it was, in one step that no other thread can split."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


@compiled()
def _decode(decoder, source, mode, out_HWC):
    """One stored image into `out_HWC`. Returns its status, and the decoder for the next one."""
    if mode == RAW:
        out_HWC.reshape(-1)[:] = source
        return DECODED, decoder
    # turbojpeg scales an image of another size to what it is asked for and leaves the rest of the
    # buffer as it was, so the size in the header is compared first.
    height, width = out_HWC.shape[0], out_HWC.shape[1]
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = header.ctypes.data
    data, size = source.ctypes.data, np.uint64(source.size)
    failed = _read_size(decoder, data, size, at, at + 4, at + 8, at + 12)
    if header[0] == width and header[1] == height:
        failed = _decompress(
            decoder, data, size, out_HWC.ctypes.data,
            np.int32(width), np.int32(0), np.int32(height), np.int32(_TJPF_RGB), np.int32(0),
        )  # fmt: skip
        if not failed:
            return DECODED, decoder
        if _error_code(decoder) == _TJERR_WARNING:
            return WARNED, decoder
    _free_decoder(decoder)  # one that has met a damaged header fails ever after
    return FAILED, _new_decoder()
