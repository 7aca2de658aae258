"""Whether a .beton is sound: every image decoded and compared with the checksum its build left."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton import jpeg
from fastssl.beton.format import FIELD, HEADER, RAW
from fastssl.beton.partial_build import manifest_path
from fastssl.beton.pool import worker_pool
from fastssl.beton.read import BetonInfo, read_header, read_names, read_samples
from fastssl.common.errors import UserError
from fastssl.common.system import resolve_workers
from fastssl.common.terminal import printable, progress

CHECKED_AT_ONCE = 256  # samples handed to a worker: little to send, and progress that moves


class Fault(NamedTuple):
    """A sample that is not as it was written. `name` is "" where names or indices are missing."""

    position: int  # in the file
    index: int | None
    name: str
    what: str

    def __str__(self) -> str:
        index = "" if self.index is None else f", index {self.index}"
        name = f", {printable(self.name)}" if self.name else ""
        return f"sample {self.position}{index}{name}: {self.what}"


class Verification(NamedTuple):
    """What `verify` found. Without checksums `is_table_sound` is True: nothing speaks against it."""

    path: Path
    samples: int
    has_checksums: bool
    is_table_sound: bool
    faults: list[Fault]

    def lines(self) -> Iterator[str]:
        """What was found, a line each."""
        if not self.is_table_sound:
            yield "metadata table: does not match its checksum; labels, indices or sizes are wrong"
        yield from map(str, self.faults)
        if not self.has_checksums:
            yield (
                f"There are no checksums for {self.path}: stock FFCV or an older version built it. "
                "Decoding alone does not see a pixel that has changed."
            )

    def verdict(self) -> str:
        """That all is well in one sentence; UserError where it is not."""
        if self.faults or not self.is_table_sound:
            bad = [] if self.is_table_sound else ["its metadata table"]
            bad += [f"{len(self.faults):,} of {self.samples:,} samples"] if self.faults else []
            raise UserError(
                f"{self.path} is damaged: {' and '.join(bad)}; copy it again from where it was "
                "sound, or delete it and build it again."
            )
        matching = " and match their checksums" if self.has_checksums else ""
        return f"All {self.samples:,} samples decode{matching}."


class _Checksums(NamedTuple):
    metadata: int
    samples: np.ndarray  # uint32 (samples,)


def verify(path: str | Path, workers: int | None = None) -> Verification:
    """Decode every image with the loader's decoder and compare all bytes with their checksums.

    A worker process for each core unless `workers` says otherwise. Memory does not grow with the
    images; of each sample some 100 bytes of metadata are held.
    """
    info = read_header(path)
    checksums = _read_checksums(info)
    metadata, image_bytes = read_samples(path)
    image = metadata["image"]
    is_table_sound = checksums is None or checksums.metadata == _table_crc32(info, metadata.nbytes)

    def task(start: int) -> tuple:
        chunk = slice(start, start + CHECKED_AT_ONCE)
        columns = [image[name][chunk] for name in ("data_ptr", "mode", "height", "width")]
        expected = checksums.samples[chunk] if checksums else None
        return info.path, start, image_bytes[chunk], *columns, expected

    found: list[tuple[int, str]] = []
    tasks = (task(start) for start in range(0, len(image), CHECKED_AT_ONCE))
    with (
        worker_pool(resolve_workers(workers)) as pool,
        progress("verifying", len(image)) as advance,
    ):
        for count, size, faults in pool.in_order(_check_chunk, tasks):
            found += faults
            advance(count, size)

    positions = [position for position, _ in found]
    indices = metadata["index"][positions] if info.fields.get("index") == "IntField" else None
    names = read_names(info.path, [] if indices is None else indices)
    faults = []
    for number, (position, what) in enumerate(found):
        index = None if indices is None else int(indices[number])
        faults.append(Fault(position, index, names.get(index, ""), what))
    return Verification(info.path, len(image), checksums is not None, is_table_sound, faults)


def _read_checksums(info: BetonInfo) -> _Checksums | None:
    """Those of the manifest, None where it has none."""
    checksums = (info.manifest or {}).get("checksums")
    if checksums is None:
        return None
    try:
        if checksums["algorithm"] != "crc32":
            raise ValueError
        metadata, samples = (_from_hex(checksums[name]) for name in ("metadata", "samples"))
        if (len(metadata), len(samples)) != (1, info.num_samples):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The checksums in {manifest_path(info.path)} are damaged: they must be crc32, 8 hex "
            f"digits for each of {info.num_samples:,} samples; take 'checksums' out of it to "
            "verify by decoding alone, or build the file again."
        ) from error
    return _Checksums(int(metadata[0]), samples)


def _from_hex(text: str) -> np.ndarray:
    """8 hex digits a number, nothing between them; uint32."""
    content = bytes.fromhex(text)
    if len(text) != 2 * len(content):  # fromhex passes over blanks
        raise ValueError
    return np.frombuffer(content, ">u4").astype(np.uint32)


def _table_crc32(info: BetonInfo, size: int) -> int:
    """Of the metadata table's bytes as they are in the file."""
    with open(info.path, "rb") as file:
        file.seek(HEADER.itemsize + len(info.fields) * FIELD.itemsize)
        return zlib.crc32(file.read(size))


def _check_chunk(
    path: Path,
    first: int,
    sizes: np.ndarray,
    starts: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    checksums: np.ndarray | None,
) -> tuple[int, int, list[tuple[int, str]]]:
    """Check the samples from position `first` on; all arrays (samples,), sizes in bytes.

    Gives their number, their bytes, and for each bad one its position and what is wrong. A worker
    process runs this; it reads one sample at a time.
    """
    faults = []
    with open(path, "rb", buffering=0) as file:
        for number, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist())):
            try:
                content = os.pread(file.fileno(), size, start)
            except OSError as error:  # the disk, not the file
                faults.append((first + number, f"cannot be read: {error.strerror}"))
                continue
            wrong = _decoding_fault(content, size, int(modes[number]), int(heights[number]), int(widths[number]))
            if checksums is not None and zlib.crc32(content) != checksums[number]:
                wrong = "does not match its checksum" + (f", and {wrong}" if wrong else ", but decodes")
            if wrong:
                faults.append((first + number, wrong))
    return len(sizes), int(sizes.sum()), faults


def _decoding_fault(content: bytes, size: int, mode: int, height: int, width: int) -> str:
    """What is wrong with an image as stored, "" where nothing is; sides in px as in the metadata."""
    if len(content) != size:
        return "the file ends within it"
    if mode == RAW:
        return "" if size == 3 * height * width else f"{size:,} bytes are not {height} x {width} pixels"
    try:
        stated = jpeg.read_size(content)
        if stated != (height, width):  # before decoding: a damaged header may state any size
            return "is {} x {} px, by its metadata {} x {} px".format(*stated, height, width)
        warning = jpeg.check(content)
    except ValueError as error:
        return f"does not decode: {error}"
    return f"decodes with a warning: {warning}" if warning else ""
