"""Convert one image of the source to the bytes that the .beton stores. Worker processes run this.

The reference for every image is what Pillow shows: ImageOps.exif_transpose(Image.open(FILE)).convert("RGB"). Metadata
never decides over pixels: if Pillow refuses a file, it is read without its text, profiles and private tags
(metadata.py), and an orientation that cannot be read is ignored. Formats for which Pillow runs other programs are not
opened.

In the full layout a JPEG that fits is stored with its own bytes (without metadata that Pillow refuses), if the loader's
decoder decodes it without a warning. All other images are converted in this order:
1. A JPEG at least twice as large as needed is shrunk while it is decoded, to no less than twice the target size: a
   photograph of 20 megapixels need not be decoded in full. What the loader's decoder refuses (JPEGs with unusual
   sampling factors), Pillow decodes.
2. To 8-bit RGB: more than 8 bits are converted by the range of values (ranges.py), by default to the upper 8 of 16
   bits; transparency is composited over white; Pillow converts palettes, grey and CMYK, without color profiles. Only
   the first frame of an animation is used.
3. Resized with Pillow's bilinear filter, which is antialiased when it shrinks (torchvision's antialiased bilinear
   resize was made equal to it). Where images are compressed, resize.py computes it to within one grey level. Of a JPEG
   that becomes a canvas in BC4, Y, Cb and Cr are resized, each from its own resolution.
4. Rotated according to the EXIF orientation.

Images of one channel (`--channels 1`) become gray after step 2. Other numbers of channels are read by channels.py.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl.beton import channels, jpeg
from fastssl.beton.format import BC4, JPG, PAGE_SIZE, RAW, RGB, is_bc4_side
from fastssl.beton.metadata import without_metadata
from fastssl.beton.ranges import Range, read_16_bit_color, to_8_bits
from fastssl.beton.reading import error_number, machine_error, read_or_explain
from fastssl.beton.source import ImageSource
from fastssl.common.errors import UserError

RAW_UP_TO = 64  # px; a canvas up to this side is stored as pixels, if no codec is named

MAX_MEGAPIXELS = 179  # Pillow's own limit
LONGEST_REASON = 300  # characters; decoders quote what they do not understand
NEARLY_BLACK = 32  # an eighth of the range of 8 bits

# The formats that are opened, in Pillow's order. Left out: EPS, for which Pillow runs Ghostscript; WMF, BUFR, GRIB and
# HDF5, which other programs must draw; MPEG and IPTC, which hold no picture of their own.
FORMATS = (
    *("BMP", "DIB", "GIF", "JPEG", "PPM", "PNG", "AVIF", "BLP", "CUR", "DCX", "DDS", "FITS", "FLI", "FTEX", "GBR"),
    *("ICNS", "ICO", "IM", "IMT", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI", "SPIDER"),
    *("SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)
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


Codec = Literal["jpeg", "bc4"]


class StoragePlan(NamedTuple):
    """How every image of a build is read and stored."""

    layout: Literal["canvas", "full"]  # "canvas": resized to side x side px; "full": shrunk to fit side x side px
    side: int  # px
    quality: int  # of the JPEGs that are encoded, 1 to 100
    value_range: Range = "full"  # of pixels of more than 8 bits per channel
    max_megapixels: int = MAX_MEGAPIXELS  # larger images are bad
    channels: int = RGB  # of the stored images; only a canvas may have others than RGB
    codec: Codec | None = (
        None  # of a canvas; None: pixels up to RAW_UP_TO, larger ones BC4, or JPEG if that is impossible
    )

    @property
    def storage(self) -> Literal["raw", "jpg", "bc4"]:
        if self.layout == "full":
            return "jpg"
        if self.channels != RGB or (self.codec is None and self.side <= RAW_UP_TO):
            return "raw"
        if self.codec is None:
            return "bc4" if is_bc4_side(self.side) else "jpg"
        return "jpg" if self.codec == "jpeg" else "bc4"

    @property
    def described(self) -> str:
        """As what the images are stored, for users."""
        return {"raw": "pixels", "jpg": f"JPEG quality {self.quality}", "bc4": "BC4 blocks"}[self.storage]


class Case(IntEnum):
    """What happened to an image: skipped, stored as it was, or encoded again, and why.

    The manifest counts images by these names; where several reasons apply, the first one counts.
    """

    BAD = 0
    RAW = 1
    PASSED_THROUGH = 2
    CANVAS = 3  # as JPEG or in BC4
    NOT_JPEG = 4
    NOT_RGB = 5
    ROTATED = 6
    LARGER_THAN_MAX_SIDE = 7
    LARGER_THAN_PAGE = 8
    DECODER_WARNING = 9
    DECODER_REFUSED = 10  # the loader's decoder cannot read the JPEG, Pillow can


Sides = int | np.ndarray


class Encoded(NamedTuple):
    """One image as stored."""

    payload: bytes
    mode: int  # format.JPG, RAW or BC4
    height: int  # px, as are the other sides
    width: int
    source_height: int  # after the EXIF rotation, as is source_width
    source_width: int
    case: Case
    is_nearly_black: bool  # no value is as high as NEARLY_BLACK; not known of JPEGs that keep their bytes
    source_format: str  # Pillow's name of the file format, or PIXELS


def is_much_enlarged(source_width: Sides, source_height: Sides, side: Sides) -> np.ndarray:
    """Whether images, which may be arrays of sides in px, have less than half of the side of their square."""
    is_enlarged: np.ndarray = 2 * np.maximum(source_width, source_height) < side
    return is_enlarged


def encode_all(images: Sequence[ImageSource | Image.Image], plan: StoragePlan) -> list[Encoded | str]:
    """Encode some images. The result of a bad image is the reason why it is bad.

    Sets Pillow's limit of this process, which holds for every decoder: Pillow checks the size before others decode.
    Raises UserError or MemoryError for trouble of the machine.
    """
    Image.MAX_IMAGE_PIXELS = plan.max_megapixels * 500_000  # Pillow refuses twice as many
    if plan.storage != "raw":
        with _required("FFCV's library"):
            jpeg.turbojpeg()
    results: list[Encoded | str] = []
    for image in images:
        content = image if isinstance(image, np.ndarray | Image.Image) else read_or_explain(image)
        result = content if isinstance(content, str) else _encode_or_explain(image, content, plan)
        results.append(result[:LONGEST_REASON] if isinstance(result, str) else result)
    return results


def _encode_or_explain(
    source: ImageSource | Image.Image, content: bytes | np.ndarray | Image.Image, plan: StoragePlan
) -> Encoded | str:
    try:
        return encode_image(content, plan)
    except (MemoryError, UserError):  # the machine's fault, not the image's
        raise
    except UnidentifiedImageError:
        more = channels.describe_bands(content) if isinstance(content, bytes) else ""
        return more or "not an image that Pillow can read"
    except Exception as error:  # decoders raise nearly anything on a damaged file
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error_number(error) is not None):
            file = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
            raise machine_error(file, error, "cannot be converted") from error
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _required(name: str) -> Iterator[None]:
    """Turn any error of the block, which uses a library, into a UserError: it is not the fault of an image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{name} does not work on this machine ({reason})",
            hint="run `fastssl doctor`, which may tell why, then the same command again; a build goes on where it "
            "stopped",
        ) from error


def encode_image(content: bytes | np.ndarray | Image.Image, plan: StoragePlan) -> Encoded:
    """Decode, convert, resize and encode one image. A bad image raises, whatever the decoder raises.

    Args:
        content: the bytes of an image file, uint8 pixels (H, W) or (H, W, 3), or an image that Pillow has opened.
            With other channels than RGB also pixels (H, W, channels).
        plan: how the image is stored.
    """
    is_array = isinstance(content, bytes) and content.startswith(channels.NPY_MAGIC)
    if is_array or plan.channels not in (1, RGB):
        return _encode_channels(content, plan)
    image, file_bytes = _open(content, plan)  # a JPEG is not decoded yet
    if plan.channels == 1:
        channels.refuse_channels(image)
    source_format = image.format or PIXELS
    orientation = _orientation(image)
    width, height = image.size
    source_height, source_width = (width, height) if orientation in SIDEWAYS else (height, width)
    case = _choose_case(image, file_bytes, orientation, plan)
    if case == Case.PASSED_THROUGH:
        return Encoded(file_bytes, JPG, height, width, height, width, case, False, source_format)

    # Decode, convert to RGB and resize to the target (width, height), which is not rotated yet.
    if plan.layout == "canvas":
        target = (plan.side, plan.side)
    else:
        scale = min(1.0, plan.side / max(width, height))
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = None
    if plan.storage == "bc4" and orientation not in TRANSPOSITIONS:
        planes = _decode_planes(image, file_bytes, target, plan)
    if planes is not None:
        from fastssl.beton import bc4  # numba has just worked

        blocks = bc4.encode_planes(*planes)
        # A pixel's luma is at most its largest value of RGB, so only dark images have to be decoded.
        pixels = bc4.decode(blocks, plan.side) if planes[0].max() < NEARLY_BLACK else planes[0]
        payload, mode = blocks.tobytes(), BC4
    else:
        pixels = _upright_pixels(image, file_bytes, orientation, target, plan)
        payload, mode = _encode_pixels(pixels, plan)
    if len(payload) > PAGE_SIZE:
        raise ValueError(
            f"takes {len(payload):,} bytes as a JPEG, more than a page of {PAGE_SIZE:,}; "
            "a smaller --max-side or --quality makes it fit"
        )
    is_nearly_black = bool(pixels.max() < NEARLY_BLACK)
    size = pixels.shape[0], pixels.shape[1], source_height, source_width
    return Encoded(payload, mode, *size, case, is_nearly_black, source_format)


def _upright_pixels(
    image: Image.Image, file_bytes: bytes, orientation: int, target: tuple[int, int], plan: StoragePlan
) -> np.ndarray:
    """Return the pixels as they are to be stored, before compression: resized to the target, then rotated."""
    if plan.storage == "raw":  # small, so Pillow's exact pixels are affordable
        image.draft(None, (2 * target[0], 2 * target[1]))
        image = _to_rgb(image, file_bytes, plan)
        if plan.channels == 1:
            image = image.convert("L")  # a gray image keeps its values: the weights of RGB add up to 1
        image = image.resize(target, Image.Resampling.BILINEAR)
        if orientation in TRANSPOSITIONS:
            image = image.transpose(TRANSPOSITIONS[orientation])
        return np.asarray(image)
    pixels = _decode(image, file_bytes, target, plan)
    if (pixels.shape[1], pixels.shape[0]) != target:
        with _required("numba"):
            from fastssl.beton.resize import resize  # imports numba, which not every build needs

            pixels = resize(pixels, target[1], target[0])
    if orientation in TRANSPOSITIONS:
        pixels = np.array(Image.fromarray(pixels).transpose(TRANSPOSITIONS[orientation]))
    return pixels


def _encode_pixels(pixels: np.ndarray, plan: StoragePlan) -> tuple[bytes, int]:
    """Return the bytes to store, and their mode."""
    if plan.storage == "raw":
        return pixels.tobytes(), RAW
    if plan.storage == "bc4":
        with _required("numba"):
            from fastssl.beton import bc4

            return bc4.encode(pixels).tobytes(), BC4
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=plan.quality, subsampling="4:2:0")
    return buffer.getvalue(), JPG


def _encode_channels(content: bytes | np.ndarray | Image.Image, plan: StoragePlan) -> Encoded:
    """Encode an image whose channels are neither gray nor RGB, or an array of a .npy file."""
    if plan.channels == RGB:
        raise ValueError("is an array in a .npy file, which --channels reads for other numbers of channels than 3")
    most_values = plan.max_megapixels * 1_000_000 * RGB
    if isinstance(content, Image.Image):
        raise ValueError(f"is an image of {len(content.getbands())} channels, not of {plan.channels}")
    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8 or content.ndim != 3 or content.shape[2] != plan.channels:
            raise ValueError(f"pixels must be uint8 (H, W, {plan.channels}), not {content.dtype} {content.shape}")
        pixels_HWC, source_format = content, PIXELS
    elif content.startswith(channels.NPY_MAGIC):
        pixels_HWC = channels.read_array(content, plan.channels, plan.value_range, most_values)
        source_format = channels.NPY
    elif not content:
        raise ValueError("the file is empty")
    else:
        pixels_HWC = channels.read_tiff(content, plan.channels, plan.value_range, most_values)
        source_format = "TIFF"
    stored_HWC = channels.resize_channels(pixels_HWC, plan.side)
    is_nearly_black = bool(stored_HWC.max() < NEARLY_BLACK)
    size = plan.side, plan.side, pixels_HWC.shape[0], pixels_HWC.shape[1]
    return Encoded(stored_HWC.tobytes(), RAW, *size, Case.RAW, is_nearly_black, source_format)


def _open(content: bytes | np.ndarray | Image.Image, plan: StoragePlan) -> tuple[Image.Image, bytes]:
    """Return the image and the bytes of its file (b"" for pixels). Only a JPEG is not decoded yet.

    If Pillow refuses the file, it is opened without its metadata; these are then the bytes that are returned.
    """
    if isinstance(content, Image.Image):
        return content.copy(), b""  # decoded, with its EXIF, without the name of a format
    if isinstance(content, np.ndarray):
        is_grey_or_rgb = content.ndim == 2 or (content.ndim == 3 and content.shape[2] == 3)
        if content.dtype != np.uint8 or not is_grey_or_rgb:
            raise ValueError(f"pixels must be uint8 (H, W) or (H, W, 3), not {content.dtype} {content.shape}")
        return Image.fromarray(content), b""
    if not content:
        raise ValueError("the file is empty")
    try:
        return _open_file(content), content
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more than {plan.max_megapixels} megapixels; --max-megapixels sets the limit") from error
    except Exception as error:
        for remaining in without_metadata(content):
            with contextlib.suppress(Exception):
                return _open_file(remaining), remaining
        raise error


def _open_file(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.format not in ("JPEG", "MPO"):  # MPO: a phone's JPEG with further images after it
        # Orientation and transparency may be known only then: a PNG's EXIF can follow the pixels, and Pillow turns a
        # TIFF itself.
        image.load()
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, where `ImageOps.exif_transpose` finds it; 1 if it cannot be read."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        return int(orientation) if orientation in TRANSPOSITIONS else 1
    except Exception:  # readers of metadata raise nearly anything
        return 1


def _choose_case(image: Image.Image, file_bytes: bytes, orientation: int, plan: StoragePlan) -> Case:
    """Decide how the image is stored."""
    if plan.storage == "raw":
        return Case.RAW
    if plan.layout == "canvas":
        return Case.CANVAS
    if image.format not in ("JPEG", "MPO"):
        return Case.NOT_JPEG
    if image.mode != "RGB":
        return Case.NOT_RGB
    if orientation in TRANSPOSITIONS:
        return Case.ROTATED
    if max(image.size) > plan.side:
        return Case.LARGER_THAN_MAX_SIDE
    if len(file_bytes) > PAGE_SIZE:
        return Case.LARGER_THAN_PAGE
    try:
        warning = jpeg.check(file_bytes, (image.height, image.width))
        return Case.DECODER_WARNING if warning else Case.PASSED_THROUGH
    except ValueError:
        return Case.DECODER_REFUSED


def _decode(image: Image.Image, file_bytes: bytes, target: tuple[int, int], plan: StoragePlan) -> np.ndarray:
    """Decode to uint8 (H, W, 3), at no less than twice the target (width, height) if the image is that large."""
    if image.format == "JPEG" and image.mode == "RGB":
        # The same pixels as Pillow's, without copies: 1.3 ms for 500x375 px, Pillow takes 2.0.
        with contextlib.suppress(ValueError):  # unusual sampling factors, for example
            decoded = jpeg.decode(file_bytes, _shrink(image, target), (image.height, image.width))
            if not decoded.warning:
                return decoded.pixels
        # Pillow decides whether the image is complete.
    image.draft(None, (2 * target[0], 2 * target[1]))
    return np.array(_to_rgb(image, file_bytes, plan))


def _decode_planes(
    image: Image.Image, file_bytes: bytes, target: tuple[int, int], plan: StoragePlan
) -> list[np.ndarray] | None:
    """Decode a JPEG to the planes Y, Cb and Cr of a canvas in BC4, each resized from its own resolution.

    The way through RGB makes chroma larger before it makes it smaller, and takes 10 % longer in all.
    Returns None for other images, and for those of which Pillow has to decide whether they are complete.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        decoded = jpeg.decode_planes(file_bytes, _shrink(image, target), (image.height, image.width))
    except ValueError:
        return None
    if decoded.warning:
        return None
    with _required("numba"):
        from fastssl.beton.resize import resize_plane

        sides = plan.side, plan.side // 2, plan.side // 2
        return [
            resize_plane(plane, float(height), float(width), side)
            for plane, (height, width), side in zip(decoded.planes, decoded.sides, sides, strict=True)
        ]


def _shrink(image: Image.Image, target: tuple[int, int]) -> int:
    """Return how much smaller a JPEG can be decoded, to no less than twice the target (width, height)."""
    room = min(image.width // (2 * target[0]), image.height // (2 * target[1]))
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _to_rgb(image: Image.Image, file_bytes: bytes, plan: StoragePlan) -> Image.Image:
    """Decode and convert to 8-bit RGB; the rules are at the top of this file."""
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255
        image = Image.fromarray(to_8_bits(np.asarray(image), plan.value_range))
    elif plan.value_range != "full" and image.format in ("PNG", "TIFF"):
        color = read_16_bit_color(image, Image.open(io.BytesIO(file_bytes), formats=FORMATS))
        if color is not None:
            pixels = to_8_bits(color[..., :3], plan.value_range)
            if color.shape[2] == 4:
                pixels = np.concatenate([pixels, (color[..., 3:] >> 8).astype(np.uint8)], 2)
            image = Image.fromarray(pixels)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
