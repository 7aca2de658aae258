"""The stage `storage`: how fast the file's images come from the disk, and how much of the file is in memory already.

It reads as the decoder does: threads touch every page of a mapped file, image by image in random order.
"""

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from fastssl.common.distributed import world_size
from fastssl.loading.kernels import take
from fastssl.loading.samples import Indices, Samples
from fastssl.profiling.profile import Measurement, Rate, StageResult

PAGE = mmap.PAGESIZE
MAX_BYTES = 1 << 26  # read per window; at a hard disk's 1 MB/s of random reads this takes a minute
MAX_SECONDS = 2.0
MOST_ROWS = 1 << 18  # of a very large set: at 3 KB an image, pieces of 64 MB seldom overlap
STILL_CACHED = 0.2  # if this share of an evicted piece is still in memory, the system did not evict it
MADV_DONTNEED = 4  # of <sys/mman.h>
LARGEST_COUNTED = 1 << 38  # bytes: one byte in memory for each of their pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@numba.njit(nogil=True)
def _touch(file: np.ndarray, start_B: np.ndarray, size_B: np.ndarray, counter: np.ndarray) -> int:
    """Read one byte of every page of the samples that no thread has taken. The sum keeps the reads from being
    optimized away."""
    total = 0
    b = take(counter)
    while b < len(start_B):
        for at in range(start_B[b], start_B[b] + size_B[b], PAGE):
            total += file[at]
        total += file[start_B[b] + size_B[b] - 1]
        b = take(counter)
    return total


class StorageStage:
    """Reads pieces of a file, first evicted from the page cache ("cold"), then cached ("warm").

    Linux does not evict pages that another process, or another mapping in this process, has mapped.
    """

    def __init__(self, samples: Samples, rows: Indices, workers: int):
        self.samples, self.workers = samples, workers
        # Of a very large set, neighbors from the middle of the file: pieces of them are read.
        count = min(len(rows), MOST_ROWS) if samples.is_mapped else len(rows)
        row_N = rows[np.arange(count) + (len(rows) - count) // 2]
        self.rows = row_N[np.argsort(samples.column("start", row_N))]
        self.cached_before = share_in_page_cache(samples.file)
        self.random = np.random.default_rng(0)
        self.cold: list[float] = []  # bytes per second, one value per window
        self.warm: list[float] = []
        self.cold_seconds: list[float] = []  # per image
        self.stays_cached = False

    def measure(self) -> None:
        """Time one window. Call it before another mapping of the file in this process is read."""
        rows = self._piece()
        bytes_read = int(self.samples.column("size", rows).sum())
        if not self.stays_cached:
            self._evict(rows)
        if not self.stays_cached:
            seconds = self._read(rows)
            self.cold.append(bytes_read / seconds)
            self.cold_seconds.append(seconds / len(rows))
        self._read(rows)
        self.warm.append(bytes_read / self._read(rows))

    def result(self) -> StageResult:
        result = StageResult(missing="Linux keeps the file's pages in memory, so nothing can be read from the disk.")
        if self.cold:
            rates = Rate.of([world_size() / seconds for seconds in self.cold_seconds])
            result = StageResult(images_per_second=rates, cpu_seconds=Measurement.of([0.0] * len(self.cold)))
            result.cold_bytes_per_second = Rate.of(self.cold)
        result.warm_bytes_per_second = Rate.of(self.warm)
        return result

    def _piece(self) -> np.ndarray:
        """Return rows that are neighbors in the file, in random order: large pages leave the cache only as a whole."""
        limit = float(MAX_BYTES)
        if self.cold:  # a slow disk gets a smaller piece
            limit = min(limit, self.cold[-1] * MAX_SECONDS)
        starts = self.samples.column("start", self.rows)
        last_begin = max(0, len(starts) - 1 - int(np.searchsorted(starts[-1] - starts[::-1], limit)))
        begin = int(self.random.integers(last_begin + 1))
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + limit)))
        return self.random.permutation(self.rows[begin:end])

    def _read(self, rows: np.ndarray) -> float:
        """Return the seconds that the threads take to read these samples."""
        samples, counter, nothing = self.samples, np.zeros(1, np.int64), np.zeros(0, np.int64)
        _touch(samples.file, nothing, nothing, counter.copy())  # compiles outside the measured time
        arguments = (samples.file, samples.column("start", rows), samples.column("size", rows), counter)
        with ThreadPoolExecutor(self.workers) as pool:
            start = time.perf_counter()
            for thread in [pool.submit(_touch, *arguments) for _ in range(self.workers)]:
                thread.result()
            return time.perf_counter() - start

    def _evict(self, rows: np.ndarray) -> None:
        samples = self.samples
        start_N, size_N = samples.column("start", rows), samples.column("size", rows)
        first = int(start_N.min()) // PAGE * PAGE
        end = -(-int((start_N + size_N).max()) // PAGE) * PAGE
        # Mapped pages stay in the page cache, so this mapping lets go of them first.
        _libc.madvise(samples.file.ctypes.data + first, end - first, MADV_DONTNEED)
        for part in samples.parts:
            start, stop = max(first, part.start) - part.start, min(end, part.start + part.size) - part.start
            if start < stop:
                with open(part.path, "rb") as file:
                    os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
        still = share_in_page_cache(samples.file[first : min(end, len(samples.file))])
        self.stays_cached = still is None or still > STILL_CACHED


def mean_size(samples: Samples, rows: Indices) -> float:
    """Return the mean of the stored bytes per image, of a very large set that of MOST_ROWS images all over it."""
    count = min(len(rows), MOST_ROWS) if samples.is_mapped else len(rows)
    return float(samples.column("size", rows[np.arange(count) * len(rows) // count]).mean())


def share_in_page_cache(mapped: np.ndarray) -> float | None:
    """Return the share (0 to 1) of a mapped file, or of a piece of it, that is in memory; None if it is unknown.

    Of more than LARGEST_COUNTED bytes, it is that of 64 pieces all over them.
    """
    if mapped.nbytes > LARGEST_COUNTED:
        size = LARGEST_COUNTED // 64
        pieces = [mapped[first : first + size] for first in np.linspace(0, mapped.nbytes - size, 64).astype(int)]
        shares = [share for piece in pieces if (share := share_in_page_cache(piece)) is not None]
        return float(np.mean(shares)) if shares else None
    first = mapped.ctypes.data // PAGE * PAGE
    pages_N = np.zeros(-(-(mapped.ctypes.data + mapped.nbytes - first) // PAGE), np.uint8)
    if _libc.mincore(first, len(pages_N) * PAGE, pages_N.ctypes.data) != 0:
        return None
    return float((pages_N & 1).mean())
