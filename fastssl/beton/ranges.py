"""Convert pixels of more than 8 bits per channel to 8 bits, by the range of values that `--range` names.

- "full", the default: 0 to 65,535. The upper 8 bits are kept. Floating-point pixels have no full range: they are bad.
- "auto": for each image the smallest of 0 to 1 (floating point only), 8, 10, 12, 14 and 16 bits that holds its values.
- (low, high): low becomes 0 and high becomes 255; what lies outside is clipped.
Pixels that are not numbers, or that lie outside "full" or "auto", make an image bad.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageFile

from fastssl.common.errors import UserError, quote

Range = Literal["auto", "full"] | tuple[float, float]

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners

# Pillow keeps the upper bytes of 16-bit color (16B, 16L: the order of the bytes; 16N: the machine's, little-endian).
# Read in the other order, it gives the lower bytes.
OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB", "NB")
} | {"LA;16B": "RGBA"}


def parse_range(text: str) -> Range:
    """Read the value of `--range`. Raises UserError if it is neither auto, full nor LOW,HIGH."""
    if text == "auto":
        return "auto"
    if text == "full":
        return "full"
    try:
        low, high = (float(bound) for bound in text.split(","))
    except ValueError:
        raise UserError(
            f"--range must be auto, full or LOW,HIGH, got {quote(text)}",
            hint="write two numbers, such as --range 0,4095",
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--range is {text}, and LOW must be below HIGH", hint="write the smaller number first")
    return low, high


def to_8_bits(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Convert integers or floats of any shape to uint8. Raises ValueError if the range does not hold them."""
    is_float = values.dtype.kind == "f"
    if is_float and not np.isfinite(values).all():
        raise ValueError("has pixels that are infinite or not a number")
    if isinstance(value_range, tuple):
        low, high = value_range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if is_float and value_range == "full":
        raise ValueError("floating-point pixels have no full range; --range auto or --range LOW,HIGH reads them")
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"has values from {lowest:g} to {highest:g}, outside 0 to 65,535; --range LOW,HIGH sets another range"
        )
    if value_range == "full":
        bits = 16
    elif is_float and highest <= 1:
        return np.rint(values * 255).astype(np.uint8)
    else:
        bits = next(bits for bits in BIT_DEPTHS if highest < 1 << bits)
    return (values / (1 << bits - 8)).astype(np.uint8) if is_float else (values >> (bits - 8)).astype(np.uint8)


def read_16_bit_color(image: Image.Image, again: ImageFile.ImageFile) -> np.ndarray | None:
    """Return color of 16 bits per channel, uint16 (H, W, 3 or 4), or None if the image has 8 bits.

    Args:
        image: a PNG or TIFF file, opened and decoded.
        again: the same file, opened and not decoded.

    Raises:
        ValueError: Pillow reads only the upper bytes of this kind of 16-bit color.
    """
    tiles = again.tile
    raw_modes = {tile.args if isinstance(tile.args, str) else tile.args[0] for tile in tiles if tile.args}
    if not any(";16" in str(mode) for mode in raw_modes) or image.mode.startswith("I"):
        return None
    mode = raw_modes.pop()
    if raw_modes or mode not in OTHER_BYTES:
        raise ValueError(f"has 16-bit pixels ({mode}) that Pillow reads with 8 bits; use --range full")
    other = OTHER_BYTES[mode]
    again.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *(tile.args or ())[1:])) for tile in tiles
    ]
    lower, upper = np.asarray(again), np.asarray(image).astype(np.uint16)
    if mode == "LA;16B":  # read as four bytes: both of grey, both of alpha
        grey = upper[..., :1] << 8 | lower[..., 1:2]
        return np.concatenate([grey, grey, grey, upper[..., 3:] << 8 | lower[..., 3:]], 2)
    return upper << 8 | lower


def format_range(value_range: Range) -> str:
    """The inverse of `parse_range`."""
    return value_range if isinstance(value_range, str) else f"{value_range[0]:g},{value_range[1]:g}"
