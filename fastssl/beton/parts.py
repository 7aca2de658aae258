"""The files of a .beton: one, or the shards of a set, mapped into one range of addresses."""

import bisect
import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.format import align
from fastssl.beton.shards import files_of, is_set
from fastssl.common.errors import UserError
from fastssl.common.files import open_regular
from fastssl.common.system import most_mappings, used_mappings

SPARE_MAPPINGS = 5_000  # for threads, libraries and arrays: without any, the next allocation fails
MAP_FIXED = 0x10  # of <sys/mman.h>
MADV_RANDOM = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class FilePart(NamedTuple):
    """One file of a set, or the only one."""

    path: Path
    start: int  # its first byte, where the files of the set follow each other
    size: int  # bytes
    identity: tuple[int, ...]  # see `file_identity`

    @property
    def mtime_ns(self) -> int:
        return self.identity[-1]


def file_identity(stat: os.stat_result) -> tuple[int, ...]:
    """What differs once a file has been written again or replaced by another one."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def file_parts(path: Path, files: Sequence[Path] | None = None) -> tuple[FilePart, ...]:
    """Return the files of a set in their order, each with the byte at which it begins in `map_file`.

    Each begins at a multiple of FFCV's page size, so no page of the set holds data of two files.

    files: those of the set that are meant; None: all.

    Raises UserError if one is not there: a name among them may be a link to a file that is away.
    """
    parts = []
    start = 0
    for file in files_of(path) if files is None else files:
        try:
            stat = os.stat(file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror})", hint="copy it again, or what it links to"
            ) from error
        parts.append(FilePart(file, start, stat.st_size, file_identity(stat)))
        start = align(start + stat.st_size)
    return tuple(parts)


def require_unchanged(part: FilePart) -> None:
    """Raise UserError if a file has been written again, replaced or deleted since the `FilePart` was made."""
    try:
        is_same = file_identity(os.stat(part.path)) == part.identity
    except OSError:
        is_same = False
    if not is_same:
        raise UserError(f"{part.path} has changed since it was opened", hint="start again")


def part_at(parts: Sequence[FilePart], position: int) -> FilePart:
    """Return the file that a byte of `map_file` belongs to."""
    return parts[bisect.bisect_right(parts, position, key=lambda part: part.start) - 1]


def map_file(path: Path, files: Sequence[Path] | None = None) -> np.ndarray:
    """Return the bytes of a file, mapped: they are read from the disk when they are used.

    Of a set, those of all files: each begins at its `FilePart.start`. Nothing may be read between two files.

    files: those of the set that are meant; None: all.
    """
    parts = file_parts(path, files) if is_set(path) else ()
    try:
        if parts:
            return _map_one_after_the_other(path, parts)
        # numba dispatches slowly on a memmap.
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        error.__traceback__ = None  # it holds what was mapped, and this needs memory
        size = sum(part.size for part in parts or file_parts(path))
        raise UserError(
            f"{path} has {size / 1e9:,.1f} GB, more than the limit on the address space of a "
            "process leaves (a mapped file takes address space, not memory)",
            hint="raise the limit: ulimit -v; on Grid Engine h_vmem",
        ) from error


def _map_one_after_the_other(path: Path, parts: Sequence[FilePart]) -> np.ndarray:
    """Map files into one range of addresses, so that all that reads one mapped file reads a set too."""
    _require_mappings(path, len(parts))
    total = parts[-1].start + parts[-1].size
    # Its pages are replaced by those of the files; it gives all of them back when the array is deleted.
    region = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    content = np.frombuffer(region, np.uint8)
    # A file is mapped up to the next one, beyond its end: what is between them needs no mapping of its own.
    for part, end in zip(parts, [*(part.start for part in parts[1:]), total]):
        with open_regular(part.path) as file:
            address, size, fixed = content.ctypes.data + part.start, end - part.start, mmap.MAP_SHARED | MAP_FIXED
            if _libc.mmap(address, size, mmap.PROT_READ, fixed, file.fileno(), 0) != address:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(part.path))
    return content


def _require_mappings(path: Path, count: int) -> None:
    """Raise UserError if Linux does not let this process have so many more ranges of addresses."""
    limit, used = most_mappings(), used_mappings()
    if used + count + SPARE_MAPPINGS > limit:
        # A run opens a set twice: for the probe, or when node-local shards have moved.
        needed = used + 2 * count + SPARE_MAPPINGS
        raise UserError(
            f"{path} has {count:,} files, and this process, which has {used:,} ranges of addresses, may have {limit:,} "
            "(vm.max_map_count)",
            hint=f"raise the limit as root: sysctl -w vm.max_map_count={needed}; or build the set in fewer shards",
        )


def read_single_pages(mapped: np.ndarray, start: int, end: int) -> None:
    """Let the system read one page at a time of these bytes of a mapped file, and not 128 KB around it."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    # A system that does not know the advice reads more than it needs.
    _libc.madvise(mapped.ctypes.data + first, end - first, MADV_RANDOM)
