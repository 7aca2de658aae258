"""A small reader of MATLAB 5 files, which some data sets publish their labels or images in.

The format is that of "MAT-File Format" (MathWorks), level 5, which MATLAB saves by -v6 and, with
its variables packed, by -v7. After 128 bytes of header come the variables, one element each; an
element is a tag (type, size) and its data, filled up to 8 bytes; a variable is an element of
elements: flags, dimensions, name, values. This reads numbers, texts, structs and cells in either
byte order; what it does not read (sparse, complex, objects, version 7.3) it says.

Whatever a file claims about itself is held against the bytes that are there: a damaged one raises
ValueError with one sentence, where scipy's reader may crash.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

HEADER = 128
INT8, UINT8, INT32, UINT32, MATRIX, COMPRESSED, UTF8 = 1, 2, 5, 6, 14, 15, 16  # element types
STORED = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"
}  # fmt: skip
ENCODED = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}

CELL, STRUCT, TEXT, OPAQUE = 1, 2, 4, 17  # classes of variables
NUMBERS = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"
}  # fmt: skip
UNREAD = {3: "an object", 5: "a sparse array", 16: "a function", OPAQUE: "an object"}
COMPLEX = 0x0800  # in the flags

PIECE = 1 << 13  # bytes that are unpacked at a time
MOST_BYTES = 1 << 28  # in a variable, unless the caller allows more
MOST_PARTS = 1_000_000  # arrays within a variable
DEEPEST = 16  # structs within structs

Value = np.ndarray | list  # of a struct array a list of dicts, of a cell array one of values


class Head(NamedTuple):
    """What a variable says before its values."""

    kind: int
    flags: int
    shape: tuple[int, ...]
    name: str


def read_mat(path: Path, names: Iterable[str], most: int = MOST_BYTES) -> dict[str, Value]:
    """The variables `names` of the file at `path`; the others are skipped.

    Numbers have the type of the variable's class (logical: uint8), texts are an array of strings
    without the last dimension, both as scipy.io.loadmat(mat_dtype=True) gives them. A struct array
    is a list of dicts, a cell array a list, both in the order of the file: first index first.
    A variable of more than `most` bytes is refused.
    """
    try:
        with open(path, "rb") as file:
            return read_variables(file, names, most)
    except (ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a MATLAB 5 file ({error}): download it again, or save it again with -v7."
        ) from error


def read_variables(file: BinaryIO, names: Iterable[str], most: int = MOST_BYTES) -> dict[str, Value]:
    """The same of an open file. Its ValueError, or zlib.error, only says what is wrong with it."""
    names = list(names)
    order = byte_order(file.read(HEADER + 512))
    end = file.seek(0, os.SEEK_END)
    start, found = HEADER, {}
    while set(names) - set(found) and start + 8 <= end:
        file.seek(start)
        kind, size = struct.unpack(f"{order}II", file.read(8))
        start += 8 + size
        if start > end:
            raise ValueError("it ends early")
        reader = Reader(Unpacked(file, size) if kind == COMPRESSED else file, order, most)
        if kind == COMPRESSED:
            kind, size = struct.unpack(f"{order}II", reader.take(8, 8))
        if kind != MATRIX:
            raise ValueError(f"it has an element of type {kind} in place of a variable")
        inner_end = reader.place + size
        head = reader.head(inner_end)
        if head.name not in names or head.name in found:
            continue
        if size > most:
            raise ValueError(f"it has {size:,} bytes of {head.name}, and {most:,} are the most")
        found[head.name] = reader.values(head, inner_end)
        reader.take(inner_end - reader.place, inner_end)
        if isinstance(reader.file, Unpacked):
            reader.file.check_end()
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    return found


def whole_numbers(path: Path, name: str, value: Value, lowest: int, highest: int) -> np.ndarray:
    """`value` as one row of int64, each from `lowest` to `highest`."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "uif":
        fits = (value >= lowest) & (value <= highest) & (value == np.floor(value))
        if fits.all():
            return value.astype(np.int64).reshape(-1, order="F")
    raise ValueError(f"{path} does not hold whole numbers from {lowest:,} to {highest:,} as {name}: download it again.")


def byte_order(header: bytes) -> str:
    """< or >, from the first bytes of a file."""
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    version = struct.unpack(f"{order}H", header[124:126])[0] if order else 0
    signature = b"\x89HDF\r\n\x1a\n"
    if version == 0x0200 or signature in (header[:8], header[512:520]):
        raise ValueError("it is HDF5, that is version 7.3")
    if version != 0x0100:
        raise ValueError("it is empty" if not header else "it has another head")
    return order


class Unpacked:
    """The bytes of a compressed element, unpacked as they are read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.inflater = file, size, zlib.decompressobj()

    def read(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size and not self.inflater.eof:
            packed = self.inflater.unconsumed_tail
            if not packed:
                packed = self.file.read(min(self.left, PIECE))
                self.left -= len(packed)
            piece = self.inflater.decompress(packed, size - len(data))
            if not packed and not piece:
                break
            data += piece
        return data

    def check_end(self) -> None:
        """zlib holds its checksum against the bytes once it comes to it."""
        if self.read(1) or not self.inflater.eof:
            raise ValueError("a variable's packed bytes do not end where it does")


class Reader:
    """Takes a variable apart; `end` is always the place where the element that is read ends."""

    def __init__(self, file: BinaryIO | Unpacked, order: str, most: int) -> None:
        self.file, self.order, self.most = file, order, most
        self.place, self.parts = 0, 0

    def take(self, size: int, end: int) -> bytes | bytearray:
        if size > end - self.place:
            raise ValueError("an element is longer than the one that holds it")
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("it ends early")
        self.place += size
        return data

    def element(self, end: int, most: int | None = None) -> tuple[int, bytes | bytearray]:
        """The type and the data of a simple element; the tag of a small one holds its data."""
        tag = self.take(8, end)
        kind, size = struct.unpack(f"{self.order}II", tag)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("a small element has more than 4 bytes")
            return kind, tag[4 : 4 + size]
        if most is not None and size > most:
            raise ValueError(f"an element of a variable's head has {size:,} bytes")
        data = self.take(size, end)
        self.take(min(-size % 8, end - self.place), end)
        return kind, data

    def integers(self, end: int, least: int, most: int) -> tuple[int, ...]:
        kind, data = self.element(end, 4 * most)
        if kind not in (INT32, UINT32) or len(data) % 4 or len(data) < 4 * least:
            raise ValueError("a variable's head is damaged")
        code = "i" if kind == INT32 else "I"
        return struct.unpack(f"{self.order}{len(data) // 4}{code}", data)

    def head(self, end: int) -> Head:
        flags, _ = self.integers(end, 2, 2)
        kind = flags & 0xFF
        shape = (0, 0) if kind == OPAQUE else self.integers(end, 2, 32)
        stored, name = self.element(end, 4096)
        if stored not in (INT8, UINT8, UTF8) or min(shape) < 0:
            raise ValueError("a variable's head is damaged")
        return Head(kind, flags, shape, name.decode("latin-1"))

    def values(self, head: Head, end: int, depth: int = 0) -> Value:
        count = math.prod(head.shape)
        if head.kind in UNREAD or head.flags & COMPLEX:
            what = UNREAD.get(head.kind, "an array of complex numbers")
            raise ValueError(f"it holds {what}, which is not read")
        if head.kind in NUMBERS:
            return self.numbers(head, count, end)
        if head.kind == TEXT:
            return self.texts(head, count, end)
        if head.kind == CELL:
            self.expect_parts(count, end)
            return [self.part(end, depth) for _ in range(count)]
        if head.kind == STRUCT:
            fields = self.fields(end)
            if fields:
                self.expect_parts(count * len(fields), end)
            elif count > 1:
                raise ValueError("it holds structs without fields")
            return [{field: self.part(end, depth) for field in fields} for _ in range(count)]
        raise ValueError(f"it holds a variable of an unknown class, {head.kind}")

    def numbers(self, head: Head, count: int, end: int) -> np.ndarray:
        """Of the head's type, which may be wider than the one that they are stored as."""
        stored, data = self.element(end)
        if stored not in STORED:
            raise ValueError(f"it holds numbers as an element of type {stored}")
        kept, wanted = np.dtype(self.order + STORED[stored]), np.dtype(NUMBERS[head.kind])
        if len(data) != count * kept.itemsize:
            raise ValueError(f"it holds {len(data):,} bytes for an array of {head.shape}")
        if count * wanted.itemsize > self.most:
            raise ValueError(f"an array takes more than {self.most:,} bytes")
        if kept.kind == "f" and not np.can_cast(kept, wanted):
            raise ValueError(f"it holds {wanted} as {kept}")
        numbers = np.frombuffer(data, kept) if count else np.empty(0, kept)
        return numbers.astype(wanted, copy=False).reshape(head.shape, order="F")

    def texts(self, head: Head, count: int, end: int) -> np.ndarray:
        stored, data = self.element(end)
        if stored not in ENCODED:
            raise ValueError(f"it holds text as an element of type {stored}")
        if not count or not data:
            return np.empty(0, "U1")
        codec = ENCODED[stored]
        if codec in ("utf-16", "utf-32"):
            codec += "-le" if self.order == "<" else "-be"
        text = data.decode(codec)
        if count == head.shape[-1] and count == len(text.encode("utf-16-le")) // 2:
            return np.array([text]).reshape(head.shape[:-1])  # MATLAB counts 16 bits as one
        if count != len(text):
            raise ValueError(f"it holds {len(text):,} letters for a text of {head.shape}")
        letters = np.frombuffer(text.encode("utf-32-le"), "<U1").reshape(head.shape, order="F")
        return np.ascontiguousarray(letters).view(f"U{head.shape[-1]}")[..., 0]

    def fields(self, end: int) -> list[str]:
        """A struct's names, each in as many bytes and ended by a zero."""
        (length,) = self.integers(end, 1, 1)
        _, names = self.element(end, 1 << 16)
        if length < 1 or len(names) % length:
            raise ValueError("the names of a struct's fields are damaged")
        parts = (names[start : start + length] for start in range(0, len(names), length))
        return [part.split(b"\0")[0].decode("latin-1") for part in parts]

    def expect_parts(self, count: int, end: int) -> None:
        self.parts += count
        if 8 * count > end - self.place or self.parts > MOST_PARTS:
            raise ValueError(f"it holds {count:,} arrays where there is no room for them")

    def part(self, end: int, depth: int) -> Value:
        """An array within a struct or a cell."""
        kind, size = struct.unpack(f"{self.order}II", self.take(8, end))
        if kind != MATRIX or size > end - self.place or depth == DEEPEST:
            raise ValueError("it holds a damaged struct or cell")
        if not size:
            return np.empty((0, 0))
        inner_end = self.place + size
        value = self.values(self.head(inner_end), inner_end, depth + 1)
        self.take(inner_end - self.place, inner_end)
        return value
