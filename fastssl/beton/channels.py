"""Read images of one channel, or of more than three, as uint8 pixels. Worker processes run this.

What one file gives as its N channels, with `--channels N`:
- N = 1: the gray value of any image that Pillow reads, or an array (H, W), (1, H, W) or (H, W, 1) in a .npy file.
- other N: the N pages of a TIFF, all of one size and of one channel; the N bands per pixel of a TIFF whose
  other pages, if any, are overviews of another size (tiff_bands.py); or an array (N, H, W) or (H, W, N) in a .npy file.
Values of more than 8 bits are converted by the range (ranges.py), with one range for all channels of an image.
"""

import io
import math

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from fastssl.beton.format import RGB
from fastssl.beton.ranges import Range, to_8_bits
from fastssl.beton.tiff_bands import BANDS, first_page, read_bands

NPY_MAGIC = b"\x93NUMPY"
NPY = "NPY"  # the source format of an array
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
ONE_CHANNEL = ("1", "L", "F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes


def read_array(content: bytes, channels: int, value_range: Range, most_values: int) -> np.ndarray:
    """Return the uint8 pixels (H, W, channels) of a .npy file. Raises ValueError if it does not hold such an image.

    `most_values` is the limit of height x width x channels. The size that the file states is checked against its bytes
    before memory is taken. Objects (pickles) are refused.
    """
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    if version not in NPY_HEADERS:
        raise ValueError(f"is a .npy file of version {version[0]}.{version[1]}, not 1.0 or 2.0")
    shape, fortran_order, dtype = NPY_HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in "uif":
        raise ValueError(f"is an array of {dtype}, not of integers or floats")
    values = math.prod(shape)
    if min(shape, default=0) < 1 or len(content) - file.tell() != values * dtype.itemsize:
        raise ValueError(f"is an array {shape} of {dtype}, which its {len(content) - file.tell():,} bytes are not")
    axis = _channel_axis(shape, channels)
    _refuse_large(values, most_values)
    array = np.frombuffer(content, dtype, values, file.tell()).reshape(shape, order="F" if fortran_order else "C")
    pixels = array[..., None] if axis is None else np.moveaxis(array, axis, 2)
    return _to_uint8(pixels, value_range)


def _channel_axis(shape: tuple[int, ...], channels: int) -> int | None:
    """Return the axis of the channels, 0 or 2; None for a single channel without an axis."""
    if len(shape) == 2 and channels == 1:
        return None
    axes = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == channels]
    if len(axes) == 1:
        return axes[0]
    expected = f"({channels}, H, W) or (H, W, {channels})" + (" or (H, W)" if channels == 1 else "")
    if not axes:
        raise ValueError(f"is an array {shape}, which --channels {channels} does not take: it must be {expected}")
    raise ValueError(f"is an array {shape}, of which the first or the last axis may be --channels {channels}")


def read_tiff(content: bytes, channels: int, value_range: Range, most_values: int) -> np.ndarray:
    """Return the uint8 pixels (H, W, channels) of the pages of a TIFF, or of the bands of its first page.

    Args:
        content: of the file.
        channels: 2, or more than 3.
        value_range: of values of more than 8 bits.
        most_values: the limit of height x width x channels.

    Raises:
        ValueError: it is no TIFF, has another number of channels, or pages that do not belong together.
    """
    expected = f"and --channels {channels} takes TIFF files with {channels} pages or bands, and arrays in .npy files"
    page = first_page(content)
    if page is None:
        raise ValueError(f"is no TIFF, {expected}")
    if page.bands != channels and not page.has_others:
        raise ValueError(f"has {page.bands} channel{'' if page.bands == 1 else 's'}, {expected}")
    if page.bands == channels:
        if page.has_twins:
            raise ValueError(f"has several pages of {channels} bands: save each in a file of its own")
        try:
            pixels = read_bands(content, page.tags, most_values)
        except KeyError as error:
            raise ValueError(f"is a TIFF that lacks the tag {error}") from error
        return _to_uint8(pixels, value_range)
    image = Image.open(io.BytesIO(content), formats=("TIFF",))
    pages, size = getattr(image, "n_frames", 1), image.size
    if pages != channels:
        raise ValueError(f"has {pages} pages, {expected}")
    _refuse_large(size[0] * size[1] * channels, most_values)
    planes: list[np.ndarray] = []
    for number in range(channels):
        image.seek(number)
        if image.size != size:  # known before the page is decoded
            raise ValueError(f"has pages of {size[0]}x{size[1]} and of {image.width}x{image.height} px")
        if bands_of(image) != 1 or image.mode not in ONE_CHANNEL:
            raise ValueError(f"has pages of several channels or colors ({image.mode}): save one channel on each page")
        plane = np.array(image.convert("L") if image.mode == "1" else image)
        if planes and (plane.shape, plane.dtype) != (planes[0].shape, planes[0].dtype):
            raise ValueError(f"has pages of different types, {planes[0].dtype} and {plane.dtype}")
        planes.append(plane)
    return _to_uint8(np.stack(planes, 2), value_range)


def refuse_channels(image: Image.Image) -> None:
    """Raise ValueError for a TIFF whose gray image would lack some of its channels.

    That is one with several pages of one size, or with more bands than Pillow shows. Pages of another size are
    thumbnails.
    """
    if image.format != "TIFF":
        return
    bands, pages, size = bands_of(image), getattr(image, "n_frames", 1), image.size
    if bands > len(image.getbands()):
        raise ValueError(f"has {bands} channels, and --channels 1 takes images of one or of RGB")
    if pages > 1:
        image.seek(1)
        second = image.size
        image.seek(0)
        image.load()
        if second == size:
            raise ValueError(f"has {pages} pages, and --channels 1 takes one")


def resize_channels(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 pixels to (side, side, C), each channel with Pillow's antialiased bilinear filter."""
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((side, side), Image.Resampling.BILINEAR))
        for plane in np.moveaxis(pixels_HWC, 2, 0)
    ]
    return np.stack(channels, 2)


def describe_bands(content: bytes) -> str:
    """Return what a TIFF is that Pillow does not read because of its number of bands; "" for everything else."""
    try:
        page = first_page(content)
    except Exception:  # readers of damaged tags raise nearly anything
        return ""
    return f"is a TIFF of {page.bands} channels, which --channels {page.bands} reads" if page and page.bands > 1 else ""


def bands_of(image: Image.Image) -> int:
    """Return the channels per pixel that a page of a TIFF states; Pillow drops those that it has no mode for."""
    return int(getattr(image, "tag_v2", {}).get(BANDS, 1))


def _to_uint8(values: np.ndarray, value_range: Range) -> np.ndarray:
    return values if values.dtype == np.uint8 else to_8_bits(values, value_range)


def _refuse_large(values: int, most_values: int) -> None:
    if values > most_values:
        raise ValueError(
            f"has {values / 1e6:,.0f} million values, more than {most_values / RGB / 1e6:,.0f} megapixels of RGB: "
            "--max-megapixels sets the limit"
        )
