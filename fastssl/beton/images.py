"""One image: from a file, bytes or pixels to the bytes that the .beton stores.

This is what the worker processes run. It imports neither torch nor ffcv, so a worker starts fast.

In the full layout a JPEG that fits is stored with its own bytes, once the loader's decoder has
decoded it without a complaint. What it warns of is decoded by Pillow instead and encoded anew.

How the pixels of all others are converted, in this order:
1. A JPEG at least twice as large as needed is shrunk inside its decoder, to no less than twice the
   target, before the exact resize: photographs of 20 megapixels need not be decoded in full.
2. To 8-bit RGB: 16-bit grey keeps its upper 8 bits; transparency is laid over white; palette, grey
   and CMYK as Pillow converts them, without colour profiles. Of an animation the first frame.
   Floating-point pixels have no agreed range: such an image is bad.
3. Resized with Pillow's bilinear filter, which is antialiased when it shrinks: the filter that
   torchvision's antialiased bilinear, our reference, was made equal to. For images stored as JPEG
   resize.py computes it, to one grey level.
4. Turned as the EXIF orientation says.
"""

from __future__ import annotations

import io
import warnings
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl.beton import jpeg
from fastssl.beton.format import JPG, PAGE_SIZE, RAW
from fastssl.beton.sample import ImageSource

RAW_UP_TO = 64  # px; a canvas up to this side is stored as pixels, a larger one as JPEG

PIXELS = "pixels"  # the source's format where it is no file

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


class Plan(NamedTuple):
    """How every image of a build is stored.

    `layout` "canvas": resized to side x side px. "full": shrunk to fit side x side px.
    """

    layout: str
    side: int
    quality: int

    @property
    def storage(self) -> str:
        return "raw" if self.layout == "canvas" and self.side <= RAW_UP_TO else "jpg"


class Case(IntEnum):
    """What became of an image: left out, stored as it was, or encoded anew and for which reason.

    The manifest counts them by these names; where several reasons hold, the first one counts.
    """

    BAD = 0
    RAW = 1
    PASSED_THROUGH = 2
    CANVAS = 3
    NOT_JPEG = 4
    NOT_RGB = 5
    ROTATED = 6
    LARGER_THAN_MAX_SIDE = 7
    LARGER_THAN_PAGE = 8
    DECODER_WARNING = 9


class Encoded(NamedTuple):
    """One image as stored; the source's height and width are those after the EXIF rotation."""

    payload: bytes
    mode: int
    height: int
    width: int
    source_height: int
    source_width: int
    case: Case
    source_format: str  # Pillow's name of the file's format, or "pixels"


def encode_all(images: list[ImageSource], plan: Plan) -> list[Encoded | str]:
    """Encode some images; for a bad one the reason stands in its place."""
    results: list[Encoded | str] = []
    for image in images:
        try:
            results.append(encode_image(image, plan))
        except MemoryError:  # says something about the machine, nothing about the image
            raise
        except UnidentifiedImageError:
            results.append("not an image that Pillow can read")
        except Exception as error:  # decoders raise nearly anything on a damaged file
            results.append(f"{type(error).__name__}: {error}")
    return results


def encode_image(source: ImageSource, plan: Plan) -> Encoded:
    """Decode, convert, resize and encode one image as `plan` says; raises on a bad one."""
    image, file_bytes = _open(source)
    orientation = _orientation(image)
    width, height = image.size
    source_height, source_width = (width, height) if orientation in SIDEWAYS else (height, width)

    case, source_format = _case(image, file_bytes, orientation, plan), image.format or PIXELS
    if case == Case.PASSED_THROUGH:
        return Encoded(file_bytes, JPG, height, width, height, width, case, source_format)

    if plan.layout == "canvas":
        target = (plan.side, plan.side)
    else:
        scale = min(1.0, plan.side / max(width, height))
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if plan.storage == "raw":  # small, and Pillow's pixels exactly
        image.draft(None, (2 * target[0], 2 * target[1]))
        image = _to_rgb(image).resize(target, Image.Resampling.BILINEAR)
    else:
        image = _shrink(_pixels(image, file_bytes, target), target)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])

    if plan.storage == "raw":
        payload, mode = image.tobytes(), RAW
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=plan.quality, subsampling="4:2:0")
        payload, mode = buffer.getvalue(), JPG
    if len(payload) > PAGE_SIZE:
        raise ValueError(
            f"takes {len(payload):,} bytes as a JPEG, more than a page of {PAGE_SIZE:,}; "
            "a smaller --max-side or --quality makes it fit"
        )
    return Encoded(payload, mode, image.height, image.width, source_height, source_width, case, source_format)


def _pixels(image: Image.Image, file_bytes: bytes, target: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), no smaller than twice the target (width, height) where the image is not."""
    if image.format == "JPEG" and image.mode == "RGB":
        # The same pixels as Pillow's, without copies: 1.3 ms for 500x375 px, against 2.0.
        room = min(image.width // (2 * target[0]), image.height // (2 * target[1]))
        shrink = next((factor for factor in (8, 4, 2) if room >= factor), 1)
        decoded = jpeg.decode(file_bytes, shrink)
        if not decoded.warning:  # else Pillow says whether the image is whole
            return decoded.pixels
    image.draft(None, (2 * target[0], 2 * target[1]))
    return np.array(_to_rgb(image))


def _shrink(pixels: np.ndarray, target: tuple[int, int]) -> Image.Image:
    if pixels.shape[1::-1] != target:
        from fastssl.beton.resize import resize  # brings numba, which not every build needs

        pixels = resize(pixels, target[1], target[0])
    return Image.fromarray(pixels)


def _case(image: Image.Image, file_bytes: bytes, orientation: int, plan: Plan) -> Case:
    """How the image will be stored; ValueError where the loader's decoder cannot decode it."""
    if plan.storage == "raw":
        return Case.RAW
    if plan.layout == "canvas":
        return Case.CANVAS
    if image.format not in ("JPEG", "MPO"):  # MPO: a phone's JPEG with more pictures behind it
        return Case.NOT_JPEG
    if image.mode != "RGB":
        return Case.NOT_RGB
    if orientation in TURNS:
        return Case.ROTATED
    if max(image.size) > plan.side:
        return Case.LARGER_THAN_MAX_SIDE
    if len(file_bytes) > PAGE_SIZE:
        return Case.LARGER_THAN_PAGE
    return Case.DECODER_WARNING if jpeg.check(file_bytes) else Case.PASSED_THROUGH


def read_image_bytes(source: ImageSource) -> bytes:
    """The bytes of an image file that is not pixels in memory; see `Sample.image`."""
    if isinstance(source, bytes):
        return source
    if callable(source):
        return source()
    path, offset, size = source if isinstance(source, tuple) else (source, 0, -1)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
    if size > len(content):
        raise ValueError(f"{path} ends within this image, at byte {offset + len(content):,}")
    return content


def _open(source: ImageSource) -> tuple[Image.Image, bytes]:
    """The image, not yet decoded, and the bytes of its file (empty for pixels)."""
    if isinstance(source, np.ndarray):
        shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
        if source.dtype != np.uint8 or not shaped:
            raise ValueError(f"pixels must be uint8 (H, W) or (H, W, 3), not {source.dtype} {source.shape}")
        return Image.fromarray(source), b""
    file_bytes = read_image_bytes(source)
    if not file_bytes:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(file_bytes)), file_bytes


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none."""
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to 8-bit RGB; the rules stand at the top of this file."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255
        upper_8_bits = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(upper_8_bits)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def quiet_decoders() -> None:
    """Silence Pillow's warnings about odd but readable files; a million files make many."""
    warnings.simplefilter("ignore")
