"""Files of images with many channels, as other programs write them: TIFF stacks, TIFFs of many bands, .npy arrays."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def values(seed: int, shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    """Random values over the whole range of an integer type; in [0, 1) for floats."""
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return generator.random(shape).astype(kind)
    return generator.integers(0, min(np.iinfo(kind).max, 65535) + 1, shape).astype(kind)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def stack(pages: list[np.ndarray]) -> bytes:
    """A TIFF with one page for each array (H, W)."""
    images = [Image.fromarray(page) for page in pages]
    buffer = io.BytesIO()
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


def bands(
    pixels_HWN: np.ndarray,
    *,
    planar: bool = False,
    deflate: bool = False,
    tile: int | None = None,
    rows: int | None = None,
    differences: bool = False,
    order: str = "<",
    more: dict[int, int] | None = None,
) -> bytes:
    """A TIFF of one page with N bands per pixel, in strips of `rows` or in tiles of `tile` x `tile` px.

    more: other values of tags.
    """
    height, width, count = pixels_HWN.shape
    dtype = pixels_HWN.dtype.newbyteorder(order)
    block_height, block_width = (tile, tile) if tile else (rows or height, width)
    padded = np.zeros((-(-height // block_height) * block_height, -(-width // block_width) * block_width, count), dtype)
    padded[:height, :width] = pixels_HWN
    parts = []
    for plane in np.split(padded, count, axis=2) if planar else [padded]:
        for top in range(0, height, block_height):
            for left in range(0, width, block_width):
                last = None if tile else min(top + block_height, height)
                block = plane[top : top + block_height, left : left + block_width][: last and last - top]
                if differences:
                    block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1])).astype(dtype)
                part = np.ascontiguousarray(block).tobytes()
                parts.append(zlib.compress(part) if deflate else part)
    kind = {"u": 1, "i": 2, "f": 3}[pixels_HWN.dtype.kind]
    tags = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8 * dtype.itemsize] * count), 259: (3, [8 if deflate else 1]),
        262: (3, [1]), 277: (3, [count]), 284: (3, [2 if planar else 1]), 317: (3, [2 if differences else 1]),
        338: (3, [0] * (count - 1)), 339: (3, [kind] * count),
    }  # fmt: skip
    sizes = [len(part) for part in parts]
    if tile:
        tags |= {322: (4, [tile]), 323: (4, [tile]), 324: (4, sizes), 325: (4, sizes)}
    else:
        tags |= {273: (4, sizes), 278: (4, [block_height]), 279: (4, sizes)}
    tags |= {tag: (4, [value]) for tag, value in (more or {}).items()}
    tags = {tag: entry for tag, entry in sorted(tags.items()) if entry[1]}
    position = 8 + 2 + 12 * len(tags) + 4
    lengths = [(4 if type_ == 4 else 2) * len(numbers) for type_, numbers in tags.values()]
    data = position + sum(length for length in lengths if length > 4)
    starts = (data + np.cumsum([0, *sizes[:-1]])).tolist()
    tags[324 if tile else 273] = (4, starts)
    entries, outside = b"", b""
    for tag, (type_, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{'HI'[type_ == 4]}", *numbers)
        entries += struct.pack(f"{order}HHI", tag, type_, len(numbers))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", position + len(outside))
            outside += packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + outside + b"".join(parts)


def write_images(folder: Path, channels: int, count: int, side: int = 40) -> None:
    """Images of two classes, dark and bright, in folders c0 and c1 and in several formats."""
    for label in range(2):
        for number in range(count):
            path = folder / f"c{label}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            smooth = np.asarray(
                Image.fromarray(values(1000 * label + number, (4, 4))).resize(
                    (side, side + 8), Image.Resampling.BICUBIC
                )
            ).astype(int)
            image = np.stack([np.roll(smooth, 3 * channel, 0) for channel in range(channels)], 2)
            image = (image // 2 + 100 * label).astype(np.uint8)
            deep = image.astype(np.uint16) << 8
            if channels == 1:
                if number % 3 == 0:
                    Image.fromarray(deep[..., 0]).save(path.with_suffix(".png"))
                elif number % 3 == 1:
                    Image.fromarray(image[..., 0]).save(path.with_suffix(".tif"))
                else:
                    path.with_suffix(".npy").write_bytes(npy(deep[..., 0]))
            elif number % 4 == 0:
                path.with_suffix(".tif").write_bytes(stack(list(np.moveaxis(image, 2, 0))))
            elif number % 4 == 1:
                path.with_suffix(".tiff").write_bytes(stack(list(np.moveaxis(deep, 2, 0))))
            elif number % 4 == 2:
                path.with_suffix(".tif").write_bytes(bands(image))
            else:
                path.with_suffix(".npy").write_bytes(npy(deep))
