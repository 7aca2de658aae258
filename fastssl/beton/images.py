"""Convert one image of the source to the bytes that the .beton stores. Worker processes run this.

In the full layout a JPEG that fits is stored with its own bytes, if the loader's decoder decodes it without a warning.
All other images are converted in this order:
1. A JPEG at least twice as large as needed is shrunk while it is decoded, to no less than twice the target size: a
   photograph of 20 megapixels need not be decoded in full.
2. To 8-bit RGB: 16-bit grey keeps its upper 8 bits; transparency is composited over white; Pillow converts palettes,
   grey and CMYK, without color profiles. Only the first frame of an animation is used. Floating-point pixels have no
   agreed range: such an image is bad.
3. Resized with Pillow's bilinear filter, which is antialiased when it shrinks (torchvision's antialiased bilinear
   resize was made equal to it). For images that are stored as JPEG, resize.py computes it to within one grey level.
4. Rotated according to the EXIF orientation.
"""

import io
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl.beton import jpeg
from fastssl.beton.format import JPG, PAGE_SIZE, RAW
from fastssl.beton.source import ImageFile, ImageSource

RAW_UP_TO = 64  # px; a canvas up to this side is stored as pixels, a larger one as JPEG

PIXELS = "pixels"  # the source format of an image that is not a file

EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {  # EXIF orientation -> how to make the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


class StoragePlan(NamedTuple):
    """How every image of a build is stored."""

    layout: Literal["canvas", "full"]  # "canvas": resized to side x side px; "full": shrunk to fit side x side px
    side: int  # px
    quality: int  # of the JPEGs that are encoded, 1 to 100

    @property
    def storage(self) -> Literal["raw", "jpg"]:
        return "raw" if self.layout == "canvas" and self.side <= RAW_UP_TO else "jpg"


class Case(IntEnum):
    """What happened to an image: skipped, stored as it was, or encoded again, and why.

    The manifest counts images by these names; where several reasons apply, the first one counts.
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
    """One image as stored."""

    payload: bytes
    mode: int  # format.JPG or format.RAW
    height: int  # px, as are the other sides
    width: int
    source_height: int  # after the EXIF rotation, as is source_width
    source_width: int
    case: Case
    source_format: str  # Pillow's name of the file format, or PIXELS


def encode_all(images: list[ImageSource], plan: StoragePlan) -> list[Encoded | str]:
    """Encode some images. The result of a bad image is the reason why it is bad."""
    results: list[Encoded | str] = []
    for image in images:
        try:
            content = image if isinstance(image, np.ndarray) else read_image_bytes(image)
            results.append(encode_image(content, plan))
        except MemoryError:  # the machine's fault, not the image's
            raise
        except UnidentifiedImageError:
            results.append("not an image that Pillow can read")
        except Exception as error:  # decoders raise nearly anything on a damaged file
            results.append(f"{type(error).__name__}: {error}")
    return results


def encode_image(content: bytes | np.ndarray, plan: StoragePlan) -> Encoded:
    """Decode, convert, resize and encode one image. A bad image raises, whatever the decoder raises.

    Args:
        content: the bytes of an image file, or uint8 pixels (H, W) or (H, W, 3).
        plan: how the image is stored.
    """
    image, file_bytes = _open(content)  # not decoded yet
    source_format = image.format or PIXELS
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    width, height = image.size
    source_height, source_width = (width, height) if orientation in SIDEWAYS else (height, width)
    case = _choose_case(image, file_bytes, orientation, plan)
    if case == Case.PASSED_THROUGH:
        return Encoded(file_bytes, JPG, height, width, height, width, case, source_format)

    # Decode, convert to RGB and resize to the target (width, height), which is not rotated yet.
    if plan.layout == "canvas":
        target = (plan.side, plan.side)
    else:
        scale = min(1.0, plan.side / max(width, height))
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if plan.storage == "raw":  # small, so Pillow's exact pixels are affordable
        image.draft(None, (2 * target[0], 2 * target[1]))
        image = _to_rgb(image).resize(target, Image.Resampling.BILINEAR)
    else:
        pixels = _decode(image, file_bytes, target)
        if (pixels.shape[1], pixels.shape[0]) != target:
            from fastssl.beton.resize import resize  # imports numba, which not every build needs

            pixels = resize(pixels, target[1], target[0])
        image = Image.fromarray(pixels)
    if orientation in TRANSPOSITIONS:
        image = image.transpose(TRANSPOSITIONS[orientation])

    # Encode.
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


def _choose_case(image: Image.Image, file_bytes: bytes, orientation: int, plan: StoragePlan) -> Case:
    """Decide how the image is stored. Raises ValueError if the loader's decoder cannot decode it."""
    if plan.storage == "raw":
        return Case.RAW
    if plan.layout == "canvas":
        return Case.CANVAS
    if image.format not in ("JPEG", "MPO"):  # MPO: a phone's JPEG with further images after it
        return Case.NOT_JPEG
    if image.mode != "RGB":
        return Case.NOT_RGB
    if orientation in TRANSPOSITIONS:
        return Case.ROTATED
    if max(image.size) > plan.side:
        return Case.LARGER_THAN_MAX_SIDE
    if len(file_bytes) > PAGE_SIZE:
        return Case.LARGER_THAN_PAGE
    return Case.DECODER_WARNING if jpeg.check(file_bytes) else Case.PASSED_THROUGH


def _decode(image: Image.Image, file_bytes: bytes, target: tuple[int, int]) -> np.ndarray:
    """Decode to uint8 (H, W, 3), at no less than twice the target (width, height) if the image is that large."""
    if image.format == "JPEG" and image.mode == "RGB":
        # The same pixels as Pillow's, without copies: 1.3 ms for 500x375 px, Pillow takes 2.0.
        room = min(image.width // (2 * target[0]), image.height // (2 * target[1]))
        shrink = next((factor for factor in (8, 4, 2) if room >= factor), 1)
        decoded = jpeg.decode(file_bytes, shrink)
        if not decoded.warning:  # otherwise Pillow decides whether the image is complete
            return decoded.pixels
    image.draft(None, (2 * target[0], 2 * target[1]))
    return np.array(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to 8-bit RGB; the rules are at the top of this file."""
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


def _open(content: bytes | np.ndarray) -> tuple[Image.Image, bytes]:
    """Return the image, not yet decoded, and the bytes of its file (b"" for pixels)."""
    if isinstance(content, np.ndarray):
        is_grey_or_rgb = content.ndim == 2 or (content.ndim == 3 and content.shape[2] == 3)
        if content.dtype != np.uint8 or not is_grey_or_rgb:
            raise ValueError(f"pixels must be uint8 (H, W) or (H, W, 3), not {content.dtype} {content.shape}")
        return Image.fromarray(content), b""
    if not content:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(content)), content


def read_image_bytes(source: ImageFile) -> bytes:
    """Return the bytes of an image file, from where `Sample.image` says."""
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
