"""Damaged and unusual input files for fuzz_build.py: small valid files that are made here, then mutated.

Each function below draws one file from a random.Random; `KINDS` names them. A file of a container is (bytes, number of
images that it held before it was mutated, whether its own checks were renewed after that).
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastssl.beton.format import ALLOCATION, FIELD, HEADER, metadata_type

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
ROWS = 12  # images in a container


class Case(NamedTuple):
    """One input file."""

    content: bytes
    suffix: str
    images: int = 1  # before it was mutated
    checks_renewed: bool = True  # so that what the mutation says is what the file says, as far as a reader can tell


# --- bytes ------------------------------------------------------------------------------------------------


def mutate_bytes(rng: Random, content: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Flip bits, cut off, insert, remove, repeat or overwrite bytes between `start` and `end`."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        last = len(data) if end is None else min(end, len(data))
        if last <= start:
            break
        at = rng.randrange(start, last)
        size = rng.choice((1, 2, 4, 16, 200))
        how = rng.randrange(7)
        if how <= 2:
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(start, last)] ^= 1 << rng.randrange(8)
        elif how == 3:
            del data[at:]
        elif how == 4:
            data[at:at] = rng.randbytes(size)
        elif how == 5:
            del data[at : at + size]
        else:
            data[at : at + size] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * min(size, len(data) - at)
    return bytes(data)


def mutate_beton(rng: Random, content: bytes) -> bytes:
    """Write unexpected numbers into the tables of a sound .beton: into one or two columns, of one row or of many."""
    data = np.frombuffer(bytearray(content), np.uint8)
    header = data[: HEADER.itemsize].view(HEADER)
    end = HEADER.itemsize + int(header["num_fields"][0]) * FIELD.itemsize
    fields = data[HEADER.itemsize : end].view(FIELD)
    types = {each["name"].tobytes().rstrip(b"\0").decode(): int(each["type_id"]) for each in fields}
    metadata = metadata_type(types)
    samples = data[end : end + int(header["num_samples"][0]) * metadata.itemsize].view(metadata)
    allocations = data[int(header["alloc_table_ptr"][0]) :].view(ALLOCATION)
    table = rng.choice((header, fields, samples, samples, samples, allocations))
    for _ in range(rng.choice((1, 1, 2))):
        rows = table[rng.choice((slice(None), slice(rng.randrange(len(table)), None), slice(0, 1)))][
            :: rng.choice((1, 2))
        ]
        names = [name for name in table.dtype.names or () if name]
        column = rows[rng.choice(names)]
        while column.dtype.names:
            column = column[rng.choice(column.dtype.names)]
        at = column.reshape(len(rows), -1)
        value = number(rng, 8 * column.dtype.itemsize).to_bytes(column.dtype.itemsize, "little")
        at[:, rng.randrange(at.shape[1])] = np.frombuffer(value, column.dtype)[0]
    return data.tobytes()


def number(rng: Random, bits: int) -> int:
    return rng.choice((rng.choice(NUMBERS), rng.getrandbits(bits), rng.randrange(20))) % (1 << bits)


# --- valid images -----------------------------------------------------------------------------------------


def picture(rng: Random, mode: str = "RGB") -> Image.Image:
    """A smooth random image of 8 to 130 px."""
    coarse = np.frombuffer(rng.randbytes(4 * 5 * 4), np.uint8).reshape(4, 5, 4)
    size = rng.randrange(8, 130), rng.randrange(8, 130)
    image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def valid_jpeg(rng: Random) -> bytes:
    image = picture(rng, rng.choice(("RGB", "RGB", "RGB", "L", "CMYK")))
    options: dict[str, object] = {"quality": rng.choice((30, 90, 100)), "progressive": rng.random() < 0.3}
    if image.mode == "RGB":
        options["subsampling"] = rng.choice((0, 1, 2))
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = rng.randrange(1, 9)
    return saved(image, "JPEG", **options)


def valid_png(rng: Random) -> bytes:
    image = picture(rng, rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I;16")))
    transparency = {"transparency": rng.choice((0, rng.randbytes(9)))} if image.mode == "P" else {}
    return saved(image, "PNG", **transparency)


def valid_tiff(rng: Random) -> bytes:
    mode, compression = rng.choice((
        ("RGB", "raw"), ("RGB", "tiff_lzw"), ("RGB", "tiff_adobe_deflate"), ("RGB", "jpeg"), ("RGBA", "packbits"),
        ("L", "raw"), ("L", "packbits"), ("1", "group4"), ("P", "tiff_lzw"), ("CMYK", "raw"), ("I;16", "raw"),
        ("F", "raw"),
    ))  # fmt: skip
    return saved(picture(rng, mode), "TIFF", compression=compression, big_tiff=rng.random() < 0.1)


def valid_webp(rng: Random) -> bytes:
    image = picture(rng, rng.choice(("RGB", "RGBA")))
    if rng.random() < 0.2:
        frames = [image, image.rotate(90).resize(image.size)]
        return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    return saved(image, "WEBP", lossless=rng.random() < 0.4)


def other_image(rng: Random) -> Case:
    kind, mode, suffix = rng.choice((
        ("GIF", "P", ".gif"), ("GIF", "RGB", ".gif"), ("BMP", "RGB", ".bmp"), ("BMP", "P", ".bmp"),
        ("PPM", "RGB", ".ppm"), ("PPM", "L", ".pgm"), ("TGA", "RGBA", ".tga"), ("TGA", "P", ".tga"),
        ("JPEG2000", "RGB", ".jp2"), ("AVIF", "RGB", ".avif"), ("ICO", "RGBA", ".ico"), ("PCX", "RGB", ".pcx"),
        ("SGI", "RGB", ".sgi"), ("DDS", "RGBA", ".dds"), ("QOI", "RGB", ".qoi"), ("IM", "RGB", ".im"),
    ))  # fmt: skip
    image = picture(rng, mode)
    more = {"save_all": True, "append_images": [image.rotate(180)]} if kind == "GIF" and rng.random() < 0.5 else {}
    return Case(saved(image, kind, **more), suffix)


def whole_file(rng: Random) -> Case:
    """Any format, with bytes changed anywhere."""
    make = rng.choice((valid_jpeg, valid_png, valid_tiff, valid_webp, other_image, other_image, other_image))
    made = make(rng)
    case = made if isinstance(made, Case) else Case(made, "." + make.__name__.removeprefix("valid_"))
    if rng.random() < 0.05:
        return case  # valid: holds the comparison itself to its tolerance
    return case._replace(content=mutate_bytes(rng, case.content))


# --- EXIF -------------------------------------------------------------------------------------------------

EXIF_TAGS = (0x0112, 0x0112, 0x010F, 0x0100, 0x0101, 0x8769, 0x8825, 0x927C, 0xA005, 0x0201, 0x0202, 0x02BC, 0x9286)


def exif_block(rng: Random) -> bytes:
    """A small TIFF with an orientation that is valid, of an odd type or out of range, among other entries."""
    order = rng.choice("<>")
    entries = []
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        tag = rng.choice((*EXIF_TAGS, rng.getrandbits(16)))
        if tag == 0x0112 and rng.random() < 0.6:
            entries.append(struct.pack(order + "HHIHH", tag, 3, 1, rng.randrange(1, 9), 0))
        else:
            kind = rng.choice((1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, number(rng, 16)))
            entries.append(struct.pack(order + "HHII", tag, kind, number(rng, 32), number(rng, 32)))
    count = len(entries) if rng.random() < 0.8 else number(rng, 16)
    following = rng.choice((0, 0, 0, 8, number(rng, 32)))  # 8: the directory itself
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", rng.choice((8, 8, 8, number(rng, 32))))
    block = head + struct.pack(order + "H", count) + b"".join(entries) + struct.pack(order + "I", following)
    return mutate_bytes(rng, block + rng.randbytes(40)) if rng.random() < 0.3 else block + rng.randbytes(40)


def xmp(rng: Random) -> bytes:
    value = rng.choice((*map(str, range(10)), "x", "", "6" * 50))
    where = rng.choice((f'tiff:Orientation="{value}"', f"<tiff:Orientation>{value}</tiff:Orientation>"))
    return f'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf {where} /></x:xmpmeta>'.encode()


def with_exif(rng: Random) -> Case:
    """A JPEG, PNG, WebP or TIFF with random metadata."""
    block = exif_block(rng)
    suffix = rng.choice((".jpg", ".png", ".webp", ".tif"))
    if suffix == ".jpg":
        segments = [(0xE1, b"Exif\0\0" + block)] if rng.random() < 0.9 else []
        if rng.random() < 0.3:
            segments.append((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(rng)))
        first, *others = jpeg_segments(valid_jpeg(rng))
        return Case(join_jpeg([first, *segments, *others]), suffix)
    if suffix == ".png":
        chunks = png_chunks(valid_png(rng))
        at = rng.randrange(1, len(chunks))  # before or after the pixels
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(rng)
        chunks[at:at] = [(b"eXIf", block)] if rng.random() < 0.8 else [(b"iTXt", text)]
        return Case(join_png(chunks), suffix)
    if suffix == ".webp":
        return Case(saved(picture(rng), "WEBP", exif=block, xmp=xmp(rng)), suffix)
    exif = Image.Exif()
    exif[0x0112] = rng.choice((*range(1, 9), number(rng, 16)))
    return Case(saved(picture(rng), "TIFF", exif=exif), suffix)


# --- JPEG -------------------------------------------------------------------------------------------------


def jpeg_segments(content: bytes) -> list[tuple[int, bytes]]:
    """(marker, payload) of each segment; that of SOS holds the compressed data up to the next marker."""
    segments, at = [(0xD8, b"")], 2
    while at < len(content):
        marker = content[at + 1]
        if marker == 0xD9:
            segments.append((marker, b""))
            break
        size = int.from_bytes(content[at + 2 : at + 4])
        end = at + 2 + size
        if marker == 0xDA:
            while not (content[end] == 0xFF and content[end + 1] not in (0, *range(0xD0, 0xD8))):
                end += 1
        segments.append((marker, content[at + 4 : end]))
        at = end
    return segments


def join_jpeg(segments: list[tuple[int, bytes]]) -> bytes:
    parts = []
    for marker, payload in segments:
        header = bytes((0xFF, marker))
        if marker == 0xDA:
            size = 6 + 2 * payload[0] if payload else 2
            parts.append(header + size.to_bytes(2) + payload)
        elif marker in (0xD8, 0xD9):
            parts.append(header)
        else:
            parts.append(header + (len(payload) + 2 & 0xFFFF).to_bytes(2) + payload)
    return b"".join(parts)


def jpeg_markers(rng: Random) -> Case:
    segments = jpeg_segments(valid_jpeg(rng))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1, len(segments))
        marker, payload = segments[at]
        how = rng.randrange(9)
        if how == 0:
            segments.pop(at)
        elif how == 1:
            segments.insert(rng.randrange(1, len(segments)), segments[at])
        elif how == 2:
            other = rng.randrange(1, len(segments))
            segments[at], segments[other] = segments[other], segments[at]
        elif how == 3:
            adobe = b"Adobe\0\x64\0\0\0\0" + bytes([rng.randrange(4)])
            size = rng.choice((0, 1, 20, 60000))
            content = rng.choice((adobe, b"ICC_PROFILE\0\1\1" + rng.randbytes(size), b"MPF\0" + rng.randbytes(size)))
            segments.insert(rng.randrange(1, len(segments)), (rng.choice((0xEE, 0xE2, 0xE0, 0xFE)), content))
        elif how == 4 and payload:
            segments[at] = marker, mutate_bytes(rng, payload)
        elif how == 5:
            segments[at] = rng.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0, 0xFE, rng.getrandbits(8))), payload
        elif how in (6, 7):
            segments = [(m, change_frame(rng, p) if m in (0xC0, 0xC2) else p) for m, p in segments]
        else:
            interval = struct.pack(">H", number(rng, 16))
            segments.insert(rng.randrange(1, len(segments)), (0xDD, interval))
        if len(segments) < 2:
            break
    content = join_jpeg(segments)
    return Case(content + rng.randbytes(rng.choice((0, 0, 0, 100))), ".jpg")


def change_frame(rng: Random, frame: bytes) -> bytes:
    """Change precision, size, sampling factors or components of a SOF segment."""
    data = bytearray(frame)
    if len(data) < 9:
        return frame
    how = rng.randrange(5)
    if how == 0:
        data[0] = rng.choice((0, 2, 8, 12, 16, 255))
    elif how == 1:
        data[1:5] = struct.pack(">HH", number(rng, 16), number(rng, 16))
    elif how == 2:  # a small change of the size: too many or too few blocks
        height, width = struct.unpack(">HH", data[1:5])
        data[1:5] = struct.pack(">HH", max(0, height + rng.randrange(-9, 10)), max(0, width + rng.randrange(-9, 10)))
    elif how == 3:
        component = rng.randrange(len(data[6:]) // 3 or 1)
        data[7 + 3 * component : 8 + 3 * component] = bytes([16 * rng.randrange(5) + rng.randrange(5)])
    else:
        data[rng.randrange(5, len(data))] = rng.getrandbits(8)
    return bytes(data)


# --- PNG --------------------------------------------------------------------------------------------------


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    return chunks


def join_png(chunks: list[tuple[bytes, bytes]], wrong_checksum: int = -1) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for position, (name, data) in enumerate(chunks):
        checksum = zlib.crc32(name + data) ^ (position == wrong_checksum)
        parts.append(len(data).to_bytes(4) + name + data + checksum.to_bytes(4))
    return b"".join(parts)


def png_chunk_mutations(rng: Random) -> Case:
    chunks = png_chunks(valid_png(rng))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(chunks))
        name, data = chunks[at]
        how = rng.randrange(9)
        if how == 0:
            chunks.pop(at)
        elif how == 1:
            chunks.insert(at, (name, data))
        elif how == 2:
            other = rng.randrange(len(chunks))
            chunks[at], chunks[other] = chunks[other], chunks[at]
        elif how == 3:
            chunks[at] = name, mutate_bytes(rng, data)
        elif how == 4:
            chunks[at] = rng.choice((b"IDAT", b"PLTE", b"IEND", b"fdAT", b"teXt", rng.randbytes(4))), data
        elif how == 5 and len(chunks[0][1]) >= 13:
            header = bytearray(chunks[0][1])
            if rng.random() < 0.5:
                header[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            else:
                header[0:8] = struct.pack(">II", number(rng, 32), number(rng, rng.choice((8, 32))))
            chunks[0] = chunks[0][0], bytes(header)
        else:
            chunks.insert(rng.randrange(1, len(chunks) + 1), extra_png_chunk(rng))
        if not chunks:
            break
    wrong = rng.randrange(len(chunks) + 1) if rng.random() < 0.15 else -1
    return Case(join_png(chunks, wrong) + rng.randbytes(rng.choice((0, 0, 0, 50))), ".png")


def extra_png_chunk(rng: Random) -> tuple[bytes, bytes]:
    size = rng.choice((0, 1, 3, 6, 50, 300_000, 1_200_000))
    packed = zlib.compress(bytes(size * rng.choice((1, 1, 100))))
    return rng.choice((
        (b"tEXt", b"Comment\0" + b"x" * size), (b"zTXt", b"Comment\0\0" + packed), (b"iCCP", b"icc\0\0" + packed),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed), (b"tRNS", rng.randbytes(min(size, 300))),
        (b"gAMA", rng.randbytes(min(size, 5))), (b"cHRM", rng.randbytes(min(size, 40))), (b"sRGB", b""),
        (b"pHYs", rng.randbytes(min(size, 9))), (b"sBIT", rng.randbytes(min(size, 4))), (b"eXIf", exif_block(rng)),
        (b"acTL", rng.randbytes(8)), (b"fcTL", rng.randbytes(26)), (b"fdAT", rng.randbytes(20)),
        (b"PLTE", rng.randbytes(3 * min(size, 300))), (b"bKGD", rng.randbytes(min(size, 6))), (b"iCCP", b""),
    ))  # fmt: skip


# --- TIFF and WebP ----------------------------------------------------------------------------------------


def tiff_tags(rng: Random) -> Case:
    """Change entries of the first directory: tag, type, count or value."""
    data = bytearray(valid_tiff(rng))
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43 or data[3] == 43
    width, head = (20, 8) if big else (12, 2)
    start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    entries = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = start + head + width * rng.randrange(entries)
        how = rng.randrange(5)
        if how == 0:
            struct.pack_into(order + "H", data, at, rng.choice((0x0112, 0x0100, 0x0103, 0x0111, number(rng, 16))))
        elif how == 1:
            struct.pack_into(order + "H", data, at + 2, rng.choice((*range(14), number(rng, 16))))
        elif how == 2:
            struct.pack_into(order + "I", data, at + 4, number(rng, 32))
        elif how == 3:
            struct.pack_into(order + "I", data, at + width - 4, number(rng, 32))
        else:
            struct.pack_into(order + "H", data, at + (12 if big else 8), number(rng, 16))
    return Case(bytes(data), ".tif")


def webp_chunks(rng: Random) -> Case:
    content = saved(picture(rng), "WEBP", exif=exif_block(rng)) if rng.random() < 0.5 else valid_webp(rng)
    chunks, at = [], 12
    while at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        chunks.append((content[at : at + 4], content[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(chunks))
        name, data = chunks[at]
        how = rng.randrange(6)
        if how == 0 and len(chunks) > 1:
            chunks.pop(at)
        elif how == 1:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
        elif how == 2:
            chunks[at] = name, mutate_bytes(rng, data)
        elif how == 3:
            chunks[at] = rng.choice((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"EXIF", b"ANMF", rng.randbytes(4))), data
        elif how == 4 and data:
            chunks[at] = name, bytes([data[0] ^ 1 << rng.randrange(8)]) + data[1:]
        else:
            chunks.insert(rng.randrange(len(chunks) + 1), (b"EXIF", exif_block(rng)))
    body = b"".join(name + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2) for name, data in chunks)
    size = len(body) + 4 if rng.random() < 0.8 else number(rng, 32)
    return Case(b"RIFF" + size.to_bytes(4, "little") + b"WEBP" + body, ".webp")


# --- containers -------------------------------------------------------------------------------------------


def tar_headers(rng: Random) -> Case:
    """A WebDataset shard whose headers, or bytes anywhere, are changed."""
    buffer, headers = io.BytesIO(), []
    kind = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    folder = "a" * rng.choice((0, 0, 90 if kind == tarfile.USTAR_FORMAT else 150))
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for row in range(ROWS):
            key = f"{folder}/{row:04}" if folder else f"{row:04}"
            for suffix, content in ((".cls", str(row % 3).encode()), (".jpg", valid_jpeg(rng))):
                headers.append(archive.offset)
                info = tarfile.TarInfo(key + suffix)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    if rng.random() < 0.4:
        return Case(mutate_bytes(rng, bytes(data)), ".tar", ROWS, False)
    checks_renewed = rng.random() < 0.7
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(headers)
        start, size = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8)))
        if start == 124:
            octal = f"{number(rng, 33):011o}\0".encode()
            value = rng.choice(
                (octal, b"-0000000001\0", b"\x80" + number(rng, 32).to_bytes(11), b"\xff" * 12, b"9" * 12)
            )
        elif start == 156:
            value = rng.choice((*(bytes([letter]) for letter in b"0123456789LKxgSDVM\0"), rng.randbytes(1)))
        else:
            value = mutate_bytes(rng, bytes(data[at + start : at + start + size])).ljust(size, b"\0")
        data[at + start : at + start + size] = value[:size]
        if not checks_renewed:
            break
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    return Case(bytes(data), ".tar", ROWS, checks_renewed)


def parquet_file(rng: Random) -> Case:
    """A Hugging Face parquet file with bytes changed in its footer or its pages."""
    import pyarrow
    from pyarrow import parquet

    images: list[object] = [valid_jpeg(rng) for _ in range(ROWS)]
    if rng.random() < 0.6:
        images = [{"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(images)]
    labels = [row % 3 for row in range(ROWS)]
    buffer = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"image": images, "label": labels}), buffer, row_group_size=rng.choice((3, ROWS)),
        compression=rng.choice(("none", "snappy", "zstd", "gzip")), use_dictionary=rng.random() < 0.5,
        write_page_checksum=rng.random() < 0.5,
    )  # fmt: skip
    content = buffer.getvalue()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    start = rng.choice((0, footer, footer))
    return Case(mutate_bytes(rng, content, start), ".parquet", ROWS, False)


CSV_PIECES = (
    *(
        '"',
        "'",
        ",",
        ";",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\0",
        "\x1a",
        "\\",
        "=",
        "é",
        "\ufeff",
        "\u2028",
        "\ud83d\ude00",
        " ",
        "\v",
    ),
    *("path", "label", "split", "train", "-1", "1e309", "nan", "../", "/", ".", "\x85"),
)
CSV_PATHS = ("/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/kmsg", ".", "..", "/", "a" * 5000, "0.jpg/", "~/0.jpg")


def csv_text(rng: Random) -> Case:
    header = rng.choice(("path,label", "path,label,split", "label,path", "path", "file_name,label", "image;label"))
    separator = ";" if ";" in header else ","
    lines = [header]
    for row in range(ROWS):
        cells = {"label": f"class{row % 3}", "split": rng.choice(("train", "val", "test", "dev"))}
        path = rng.choice(CSV_PATHS) if rng.random() < 0.02 else f"{row}.jpg"
        lines.append(separator.join(cells.get(name, path) for name in header.split(separator)))
    text = rng.choice(("\n", "\r\n")).join(lines) + "\n"
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(CSV_PIECES) * rng.choice((1, 1, 1, 2, 200_000))
        text = text[:at] + piece + text[at + rng.choice((0, 0, 1, 10)) :]
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    content = text.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace")
    return Case(mutate_bytes(rng, content) if rng.random() < 0.3 else content, ".csv", 0)


KINDS: dict[str, Callable[[Random], Case]] = {
    "exif": with_exif,
    "jpeg": jpeg_markers,
    "png": png_chunk_mutations,
    "tiff": tiff_tags,
    "webp": webp_chunks,
    "bytes": whole_file,
    "tar": tar_headers,
    "parquet": parquet_file,
    "csv": csv_text,
}
