"""Verify a .beton: decode every image and compare it with the checksum that its build recorded."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton import jpeg
from fastssl.beton.format import FIELD, HEADER, JPG, manifest_path
from fastssl.beton.pool import Pool, worker_pool
from fastssl.beton.read import BetonInfo, all_names, data_checksum, has_names, read_header, read_names, read_samples
from fastssl.beton.shards import files_of, is_set, set_manifest_path
from fastssl.common.errors import UserError
from fastssl.common.system import resolve_workers
from fastssl.common.terminal import Advance, count_of, printable, progress

SAMPLES_PER_TASK = 256  # few enough that the progress moves


@dataclass(frozen=True)
class Fault:
    """A damaged sample."""

    path: Path  # of the file
    position: int  # in the file
    index: int | None  # None if the file has no indices
    name: str  # "" if the file has no names
    problem: str

    def __str__(self) -> str:
        index = "" if self.index is None else f", index {self.index}"
        name = f", {printable(self.name)}" if self.name else ""
        return f"sample {self.position}{index}{name}: {self.problem}"


class Verification(NamedTuple):
    """The result of `verify`."""

    path: Path  # of a set, its pattern
    samples: int
    without_checksums: list[Path]  # files that have none
    damaged_tables: list[Path]  # files whose metadata does not match its checksum
    faults: list[Fault]
    of_other_builds: list[Path] = []  # shards that are not those of the set's manifest

    def lines(self) -> Iterator[str]:
        """Yield a line for each fault, and a note for each file without checksums."""
        is_set = any(each.path != self.path for each in self.faults) or set(self.damaged_tables) - {self.path}
        for path in self.of_other_builds:
            yield f"{path.name}: has other checksums than {set_manifest_path(self.path).name} states for it"
        for path in self.damaged_tables:
            where = f"{path.name}: " if is_set else ""
            yield f"{where}metadata table: does not match its checksum; labels, indices or sizes are wrong"
        for fault in self.faults:
            yield (f"{fault.path.name}: " if is_set else "") + str(fault)
        for path in self.without_checksums:
            yield (
                f"There are no checksums for {path}: stock FFCV or an older version built it. "
                "Decoding alone does not detect a changed pixel."
            )

    def verdict(self) -> str:
        """Return a sentence for a sound file. Raises UserError if the file is damaged."""
        if self.faults or self.damaged_tables or self.of_other_builds:
            others = count_of(len(self.of_other_builds), "shard")
            damaged = [f"{others} of another build"] if self.of_other_builds else []
            damaged += ["its metadata table"] if self.damaged_tables else []
            damaged += [f"{len(self.faults):,} of {self.samples:,} samples"] if self.faults else []
            raise UserError(
                f"{self.path} is damaged: {' and '.join(damaged)}",
                hint="copy it again from a sound copy, or delete it and build it again",
            )
        matching = "" if self.without_checksums else " and match their checksums"
        return f"All {self.samples:,} samples decode{matching}."


def verify(path: str | Path, workers: int | None = None) -> Verification:
    """Decode every image with the loader's decoder, and compare all bytes with their checksums.

    Memory does not grow with the images; about 100 bytes of metadata are held per sample.

    Args:
        path: a .beton file, or a set of shards.
        workers: number of processes; None: one for each core.
    """
    path = Path(path)
    whole = read_header(path)
    without_checksums, damaged_tables, of_other_builds = [], [], []
    of_set = (
        {file["name"]: file["checksum"] for file in (whole.manifest or {}).get("files", ())} if is_set(path) else {}
    )
    faults: list[Fault] = []
    with (
        worker_pool(resolve_workers(workers)) as pool,
        progress("verifying", whole.num_samples) as advance,
    ):
        for file in files_of(path):
            info = read_header(file) if is_set(path) else whole
            if has_names(file):
                for _ in all_names(file):  # raises an error if they cannot be read
                    pass
            crc32_N = _read_checksums(info)
            faults += _find_faults(info, crc32_N, pool, advance)
            if crc32_N is None:
                without_checksums.append(file)
            elif not _is_table_sound(info):
                damaged_tables.append(file)
            if file.name in of_set and of_set[file.name] != data_checksum(info):
                of_other_builds.append(file)
    return Verification(path, whole.num_samples, without_checksums, damaged_tables, faults, of_other_builds)


def _find_faults(info: BetonInfo, crc32_N: np.ndarray | None, pool: Pool, advance: Advance) -> list[Fault]:
    """Return the damaged samples of one file."""
    metadata, image_bytes = read_samples(info.path)
    chunks = (slice(start, start + SAMPLES_PER_TASK) for start in range(0, info.num_samples, SAMPLES_PER_TASK))
    tasks = (
        (
            info.path,
            metadata["image"][chunk],
            image_bytes[chunk],
            None if crc32_N is None else crc32_N[chunk],
        )
        for chunk in chunks
    )
    problems: list[tuple[int, str]] = []
    done = 0
    for chunk_problems in pool.in_order(_check_chunk, tasks):
        problems += [(done + number, problem) for number, problem in enumerate(chunk_problems) if problem]
        size = int(image_bytes[done : done + len(chunk_problems)].sum())
        done += len(chunk_problems)
        advance(len(chunk_problems), size)
    has_indices = info.fields.get("index") == "IntField"
    index_of = {position: int(metadata["index"][position]) for position, _ in problems} if has_indices else {}
    names = read_names(info.path, index_of.values())
    return [
        Fault(info.path, position, index_of.get(position), names.get(index_of.get(position, -1), ""), problem)
        for position, problem in problems
    ]


def _read_checksums(info: BetonInfo) -> np.ndarray | None:
    """Return the CRC-32 of each sample from the manifest, (samples,); None if it has none."""
    checksums = (info.manifest or {}).get("checksums")
    if checksums is None:
        return None
    try:
        content = bytes.fromhex(checksums["samples"])
        is_sound = (len(checksums["samples"]), len(checksums["metadata"])) == (8 * info.num_samples, 8)
        is_sound &= len(content) == 4 * info.num_samples  # fromhex skips blanks
        is_sound &= checksums["algorithm"] == "crc32" and int(checksums["metadata"], 16) >= 0
    except ValueError:
        is_sound = False
    if not is_sound:
        raise UserError(
            f"The checksums in {manifest_path(info.path)} are damaged: they must be crc32, 8 hex digits for each of "
            f"{info.num_samples:,} samples",
            hint="remove 'checksums' to verify by decoding alone, or build the file again",
        )
    return np.frombuffer(content, ">u4")


def _is_table_sound(info: BetonInfo) -> bool:
    """Compare the checksum of the metadata table with the manifest's."""
    assert info.manifest is not None
    with open(info.path, "rb") as file:
        file.seek(HEADER.itemsize + len(info.fields) * FIELD.itemsize)
        return zlib.crc32(file.read(info.metadata_bytes)) == int(info.manifest["checksums"]["metadata"], 16)


def _check_chunk(path: Path, image: np.ndarray, image_bytes: np.ndarray, crc32_N: np.ndarray | None) -> list[str]:
    """Return what is wrong with each sample of a chunk, "" if nothing is. A worker process runs this.

    `image` holds the format.IMAGE of the samples.
    """
    problems = []
    with open(path, "rb", buffering=0) as file:
        for number, (row, size) in enumerate(zip(image, image_bytes.tolist())):
            try:
                content = os.pread(file.fileno(), size, int(row["data_ptr"]))
            except OSError as error:  # the disk, not the file
                problems.append(f"cannot be read: {error.strerror}")
                continue
            problem = _decoding_problem(content, size, row)
            if crc32_N is not None and zlib.crc32(content) != crc32_N[number]:
                problem = "does not match its checksum" + (f", and {problem}" if problem else ", but decodes")
            problems.append(problem)
    return problems


def _decoding_problem(content: bytes, size: int, row: np.void) -> str:
    """Return what is wrong with a stored image of `size` bytes, "" if nothing is; `row` is its format.IMAGE."""
    height, width = int(row["height"]), int(row["width"])
    if len(content) != size:
        return "the file ends within it"
    if row["mode"] != JPG:  # any bytes are pixels or blocks, and read_samples has compared their number
        return ""
    try:
        stated = jpeg.read_size(content)
        if stated != (height, width):  # checked before decoding, because a damaged header may state any size
            return f"is {stated[0]} x {stated[1]} px, by its metadata {height} x {width} px"
        warning = jpeg.check(content)
    except ValueError as error:
        return f"does not decode: {error}"
    return f"decodes with a warning: {warning}" if warning else ""
