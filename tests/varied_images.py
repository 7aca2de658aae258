"""About 200 small image files: formats, modes, metadata and damage, for tests/beton/test_variety.py."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from synthetic_images import photo

WIDTH, HEIGHT = 60, 44  # below twice the sides of the canvases in the test, so that no JPEG is shrunk in its decoder
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'
BIG = b" " * (2 << 20)  # above Pillow's limit for a text or a profile of a PNG


class VariedImage(NamedTuple):
    name: str
    content: bytes
    shown: bytes  # a file of which Pillow shows the pixels that are wanted; most often `content` itself


def varied_images() -> Iterator[VariedImage]:
    for files in (jpegs, pngs, tiffs, webps, others):
        yield from files()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str) -> Image.Image:
    """Return a photograph in one of Pillow's modes."""
    image = photo(7, WIDTH, HEIGHT)
    grey = np.asarray(image.convert("L"))
    if mode.startswith("I"):
        return Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)))
        return image
    if mode == "P":
        return image.quantize(64, dither=Image.Dither.NONE)  # JPEG changes dithered pixels much more
    return image.convert(mode)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def plain(name: str, content: bytes) -> VariedImage:
    return VariedImage(name, content, content)


def cut(name: str, content: bytes) -> Iterator[VariedImage]:
    """A file that ends too early: Pillow decides whether it is an image."""
    for share in (0.3, 0.7, 0.95):
        yield plain(f"{name}, cut at {share:.0%}", content[: int(share * len(content))])


def jpegs() -> Iterator[VariedImage]:
    rgb = in_mode("RGB")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for progressive in (False, True):
            options = {"quality": 92, "subsampling": subsampling, "progressive": progressive}
            yield plain(f"JPEG {subsampling} progressive={progressive}", saved(rgb, "JPEG", **options))
    for mode in ("L", "CMYK"):
        yield plain(f"JPEG {mode}", saved(in_mode(mode), "JPEG", quality=92))
    good = saved(rgb, "JPEG", quality=92)
    yield plain("JPEG with restart markers", saved(rgb, "JPEG", quality=92, restart_marker_blocks=2))
    yield plain("JPEG with an ICC profile of 300 KB", saved(rgb, "JPEG", quality=92, icc_profile=bytes(300_000)))
    yield plain("JPEG with bytes after its end", good + b"more" * 99)
    yield plain("JPEG with other images after it", saved(rgb, "MPO", save_all=True, append_images=[in_mode("RGB")]))
    for orientation in (0, *range(1, 10)):
        yield plain(f"JPEG EXIF orientation {orientation}", saved(rgb, "JPEG", quality=92, exif=exif(orientation)))
    for orientation in (3, 6, 8):
        segment = b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(orientation).encode()
        yield plain(f"JPEG XMP orientation {orientation}", with_segment(good, 0xE1, segment))
    for name, marker, segment in (
        ("EXIF of noise", 0xE1, b"Exif\0\0" + bytes(range(200))),
        ("EXIF that is cut", 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        ("ICC of noise", 0xE2, b"ICC_PROFILE\0\x05\x02noise"),
        ("index of images of noise", 0xE2, b"MPF\0" + bytes(range(90))),
        ("Photoshop resources of noise", 0xED, b"Photoshop 3.0\x008BIM" + bytes(range(60))),
    ):
        yield VariedImage(f"JPEG with {name}", with_segment(good, marker, segment), good)
    for factors in SAMPLING:
        yield plain(f"JPEG with sampling factors {factors}", sampled_jpeg(factors))
    yield from cut("JPEG", good)


def with_segment(content: bytes, marker: int, segment: bytes) -> bytes:
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(segment) + 2) + segment + content[2:]


# Horizontal and vertical sampling factors of Y, Cb and Cr. turbojpeg refuses most of them.
SAMPLING = (
    ((2, 2), (1, 1), (1, 1)),
    ((4, 2), (1, 1), (1, 1)),
    ((2, 1), (2, 1), (2, 1)),
    ((1, 2), (1, 2), (1, 2)),
    ((3, 1), (1, 1), (1, 1)),
    ((2, 2), (1, 2), (2, 1)),
    ((1, 3), (1, 1), (1, 1)),
    ((2, 2), (1, 1), (2, 2)),
)


def sampled_jpeg(factors: tuple[tuple[int, int], ...]) -> bytes:
    """Write a baseline JPEG whose blocks of 8 x 8 px each have one random value, smooth enough for any upsampling.

    Pillow cannot write these sampling factors. One Huffman table has a code of four bits for each size of a difference,
    the other one a code of one bit, "nothing but zeros follows".
    """
    wide, high = max(h for h, _ in factors), max(v for _, v in factors)
    units = -(-WIDTH // (8 * wide)) * -(-HEIGHT // (8 * high))
    rng = np.random.default_rng(0)
    bits, previous = [], [0, 0, 0]
    for _ in range(units):
        for component, (h, v) in enumerate(factors):
            for value in rng.integers(-40, 40, h * v).tolist():
                difference, previous[component] = value - previous[component], value
                size = abs(difference).bit_length()
                bits.append(f"{size:04b}")
                if size:
                    bits.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
                bits.append("0")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    components = b"".join(bytes([n, h << 4 | v, 0]) for n, (h, v) in enumerate(factors, 1))
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, b"\0" + bytes([8] * 64)),
            segment(0xC0, struct.pack(">BHHB", 8, HEIGHT, WIDTH, 3) + components),
            segment(0xC4, b"\0" + bytes([0, 0, 0, 12, *[0] * 12]) + bytes(range(12))),
            segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0"),
            segment(0xDA, b"\x03" + b"\x01\0\x02\0\x03\0" + b"\0\x3f\0"),
            scan + b"\xff\xd9",
        )
    )


def pngs() -> Iterator[VariedImage]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for level in (0, 9):
            yield plain(f"PNG {mode} level {level}", saved(in_mode(mode), "PNG", compress_level=level))
    for bits in (1, 2, 4):
        image = in_mode("RGB").quantize(1 << bits)
        yield plain(f"PNG P of {bits} bits", saved(image, "PNG", bits=bits))
    for mode, transparency in (("L", 90), ("RGB", (10, 20, 30)), ("P", 3), ("P", bytes(range(0, 256, 2)))):
        yield plain(f"PNG {mode} tRNS {transparency!r:.9}", saved(in_mode(mode), "PNG", transparency=transparency))
    for orientation in range(1, 9):
        yield plain(f"PNG EXIF orientation {orientation}", saved(in_mode("RGB"), "PNG", exif=exif(orientation)))
    good = saved(in_mode("RGB"), "PNG")
    size = b"\0\0\0\x01" * 3  # nonsense for every chunk
    for name, kind, data in (
        ("2 MB of text", b"zTXt", b"parameters\0\0" + zlib.compress(BIG)),
        ("2 MB of XMP", b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)),
        ("2 MB of profile", b"iCCP", b"icc\0\0" + zlib.compress(BIG)),
        ("text of noise", b"zTXt", b"key\0\0" + bytes(range(99))),
        ("profile of noise", b"iCCP", b"icc\0\0" + bytes(range(99))),
        ("EXIF of noise", b"eXIf", bytes(range(99))),
        ("a density of noise", b"pHYs", size),
        ("a private chunk", b"prVt", bytes(range(99))),
    ):
        for position, before in ((33, "before"), (len(good) - 12, "after")):
            content = good[:position] + chunk(kind, data) + good[position:]
            yield VariedImage(f"PNG with {name} {before} the pixels", content, good)
        broken = chunk(kind, data)[:-4] + b"\0\0\0\0"
        if kind in (b"zTXt", b"iCCP", b"pHYs"):
            yield VariedImage(f"PNG with {name}, wrong checksum", good[:33] + broken + good[33:], good)
    yield plain("PNG with a wrong checksum of pixels", good[:-16] + bytes(4) + good[-12:])
    yield plain("PNG animated", saved(in_mode("RGB"), "PNG", save_all=True, append_images=[photo(1, WIDTH, HEIGHT)]))
    yield from cut("PNG", good)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiffs() -> Iterator[VariedImage]:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
        for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits"):
            yield plain(f"TIFF {mode} {compression}", saved(in_mode(mode), "TIFF", compression=compression))
    for mode in ("L", "RGB"):
        yield plain(f"TIFF {mode} jpeg", saved(in_mode(mode), "TIFF", compression="jpeg", quality=95))
    for compression in ("raw", "tiff_lzw"):
        for orientation in range(1, 9):
            content = saved(in_mode("RGB"), "TIFF", exif=exif(orientation), compression=compression)
            yield plain(f"TIFF {compression} orientation {orientation}", content)
    pages = {"save_all": True, "append_images": [photo(1, WIDTH, HEIGHT)]}
    yield plain("TIFF of two pages", saved(in_mode("RGB"), "TIFF", **pages))
    yield from cut("TIFF", saved(in_mode("RGB"), "TIFF", compression="tiff_deflate"))


def webps() -> Iterator[VariedImage]:
    for mode in ("RGB", "RGBA"):
        for lossless in (False, True):
            yield plain(f"WebP {mode} lossless={lossless}", saved(in_mode(mode), "WEBP", lossless=lossless))
    frames = {"save_all": True, "append_images": [photo(1, WIDTH, HEIGHT)]}
    yield plain("WebP animated", saved(in_mode("RGB"), "WEBP", **frames))
    for orientation in range(1, 9):
        yield plain(f"WebP orientation {orientation}", saved(in_mode("RGB"), "WEBP", exif=exif(orientation)))
    good = saved(in_mode("RGB"), "WEBP", lossless=True)
    noise = saved(in_mode("RGB"), "WEBP", lossless=True, exif=bytes(range(99)), xmp=b"<x", icc_profile=b"noise")
    yield VariedImage("WebP with EXIF, XMP and profile of noise", noise, good)
    yield from cut("WebP", good)


def others() -> Iterator[VariedImage]:
    for orientation in (1, 3, 6):
        yield plain(f"AVIF orientation {orientation}", saved(in_mode("RGB"), "AVIF", exif=exif(orientation)))
    yield plain("AVIF RGBA", saved(in_mode("RGBA"), "AVIF"))
    for mode in ("L", "P", "RGB"):
        yield plain(f"GIF {mode}", saved(in_mode(mode), "GIF"))
    yield plain("GIF transparent", saved(in_mode("P"), "GIF", transparency=5))
    yield plain("GIF animated", saved(in_mode("P"), "GIF", save_all=True, append_images=[photo(1, WIDTH, HEIGHT)]))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield plain(f"BMP {mode}", saved(in_mode(mode), "BMP"))
    for mode in ("1", "L", "RGB", "I;16", "I"):
        yield plain(f"PPM {mode}", saved(in_mode(mode), "PPM"))
    for mode in ("L", "LA", "RGB", "RGBA"):
        yield plain(f"JPEG 2000 {mode}", saved(in_mode(mode), "JPEG2000"))
        yield plain(f"TGA {mode}", saved(in_mode(mode), "TGA"))
    yield plain("an empty file", b"")
    yield plain("text", b"not an image")
    yield plain("an EPS file, which Pillow would give to Ghostscript", saved(in_mode("RGB"), "EPS"))
