"""Remove what does not decide over the pixels from an image file that Pillow refuses: text, profiles, private tags.

Pillow refuses a whole file for a comment that is damaged or that unpacks to more than a megabyte. Every viewer shows
the image.
"""

import zlib
from collections.abc import Iterator
from typing import Literal

# Chunks of PNG that are known not to change a pixel. A chunk that is not known and has a wrong checksum may be a
# damaged one of the others, so it stays.
PNG_METADATA = {
    *(b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"cHRM", b"gAMA", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"sBIT", b"bKGD"),
    *(b"hIST", b"pHYs", b"sPLT", b"tIME", b"acTL", b"fcTL", b"fdAT", b"oFFs", b"pCAL", b"sCAL", b"caBX"),
}
PNG_XMP = b"XML:com.adobe.xmp\0\0"  # not compressed
LARGEST_XMP = 1 << 19  # bytes; Pillow reads up to 1 MiB

# Tags of TIFF that decide over the pixels: sizes, compression, strips, tiles, colors, samples, old and new JPEG.
TIFF_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332),
    *(338, 339, 347, *range(512, 522), 529, 530, 531, 532),
}
TIFF_ORIENTATION = 274
WEBP_EXIF_FLAG = 0x08  # of the chunk VP8X; 0x20 and 0x04 stand for a color profile and XMP


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield copies of an image file without metadata: first one with its orientation, then one without.

    Yields nothing for formats that are not known here, or if there is nothing to remove.
    """
    for keep_orientation in (True, False):
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            result = _png(content, keep_orientation)
        elif content.startswith(b"\xff\xd8"):
            result = _jpeg(content, keep_orientation)
        elif content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            result = _tiff(content, keep_orientation)
        elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            result = _webp(content, keep_orientation)
        elif content[4:8] == b"ftyp":
            result = _avif(content, keep_orientation)
        else:
            return
        if result != content:
            yield result


def _png(content: bytes, keep_orientation: bool) -> bytes:
    kept = [content[:8]]
    position = 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4])
        chunk = content[position : position + 12 + length]
        position += 12 + length
        kind, data = chunk[4:8], chunk[8 : 8 + length]
        is_intact = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        is_metadata = kind in PNG_METADATA or (is_intact and kind[0] & 0x20 and kind != b"tRNS")
        is_small_xmp = kind == b"iTXt" and data.startswith(PNG_XMP) and length < LARGEST_XMP
        tells_orientation = is_intact and (kind == b"eXIf" or is_small_xmp)
        if (keep_orientation and tells_orientation) or not (is_metadata or kind == b"eXIf"):
            kept.append(chunk)
    return b"".join(kept)


def _jpeg(content: bytes, keep_orientation: bool) -> bytes:
    kept = [content[:2]]
    position = 2
    while content[position : position + 1] == b"\xff":
        marker = content[position + 1 : position + 2]
        if marker == b"\xff":  # fill byte
            position += 1
            continue
        if marker == b"\xda":  # the scans begin
            break
        segment = content[position : position + 2 + max(2, int.from_bytes(content[position + 2 : position + 4]))]
        position += len(segment)
        if marker == b"\xe1":
            is_kept = keep_orientation and segment[4:].startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
        elif marker == b"\xe0" or marker == b"\xee":  # JFIF and Adobe tell the colors; libjpeg ignores shorter ones
            is_kept = len(segment) >= (16 if marker == b"\xe0" else 14)
        else:
            is_kept = not (b"\xe2" <= marker <= b"\xef" or marker == b"\xfe")
        if is_kept:
            kept.append(segment)
    return b"".join([*kept, content[position:]])


def _tiff(content: bytes, keep_orientation: bool) -> bytes:
    """Remove tags from the directory of the first image; what they point to stays."""
    is_big = content[2:4] in (b"+\0", b"\0+")
    order: Literal["little", "big"] = "little" if content[:1] == b"I" else "big"
    pointer_size, count_size, entry_size = (8, 8, 20) if is_big else (4, 2, 12)
    start = int.from_bytes(content[pointer_size : 2 * pointer_size], order)  # at byte 4, in BigTIFF at byte 8
    count = int.from_bytes(content[start : start + count_size], order)
    first = start + count_size
    tags = TIFF_TAGS | {TIFF_ORIENTATION} if keep_orientation else TIFF_TAGS
    count = min(count, (len(content) - first) // entry_size)
    entries = [content[first + n * entry_size : first + (n + 1) * entry_size] for n in range(max(0, count))]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in tags]
    directory = len(kept).to_bytes(count_size, order) + b"".join(kept) + bytes(pointer_size)  # no next image
    return content[:start] + directory + content[start + len(directory) :]


def _webp(content: bytes, keep_orientation: bool) -> bytes:
    kept = []
    position = 12
    while position < len(content):
        kind = content[position : position + 4]
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        chunk = content[position : position + 8 + size + size % 2]
        position += 8 + size + size % 2
        has_exif = kind == b"EXIF" and keep_orientation and len(chunk) >= 8 + size
        if kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF") or has_exif:
            kept.append(chunk)
    exif = WEBP_EXIF_FLAG if any(chunk[:4] == b"EXIF" for chunk in kept) else 0
    for n, chunk in enumerate(kept):
        if chunk[:4] == b"VP8X" and len(chunk) > 8:
            kept[n] = chunk[:8] + bytes([chunk[8] & ~0x2C | exif]) + chunk[9:]
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _avif(content: bytes, keep_orientation: bool) -> bytes:
    """Rename the items with EXIF and XMP, so that the decoder skips them. The orientation of AVIF is not in EXIF."""
    start = content.find(b"meta")
    end = start - 4 + int.from_bytes(content[start - 4 : start]) if start > 4 else 0
    items = content[:end].replace(b"mime\0", b"skip\0")
    return (items if keep_orientation else items.replace(b"Exif\0", b"skip\0")) + content[end:]
