"""The leg `storage`: how fast the file's images come from the disk, and how much of the file is in memory already.

Reading is what the decoder does to a mapped file: every page of an image touched, images in random order, by the
loader's number of threads.
"""

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from fastssl.loading.kernels import take
from fastssl.loading.samples import Samples

PAGE = mmap.PAGESIZE
MOST_BYTES = 1 << 26  # read in a window; with a hard disk's 1 MB/s of random reads, that is a minute
MOST_SECONDS = 2.0
STILL_CACHED = 0.2  # share of an evicted piece that says that it was not evicted
MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@numba.njit(nogil=True)
def _touch(file, start_B, size_B, counter):
    """One byte of every page of the samples that are left to take; the sum is there so that nothing is left out."""
    total = 0
    b = take(counter)
    while b < len(start_B):
        for at in range(start_B[b], start_B[b] + size_B[b], PAGE):
            total += file[at]
        total += file[start_B[b] + size_B[b] - 1]
        b = take(counter)
    return total


class Storage:
    """Reads pieces of a file cold, then warm. A window evicts at most MOST_BYTES from the page cache and reads them
    back. Of what another process or another mapping of this one has mapped, Linux evicts nothing."""

    def __init__(self, samples: Samples, rows: np.ndarray, workers: int):
        self.samples, self.workers = samples, workers
        self.rows = rows[np.argsort(samples.start_N[rows])]
        self.cached_before = share_in_page_cache(samples.file)
        self.random = np.random.default_rng(0)
        self.cold: list[float] = []  # bytes/s
        self.warm: list[float] = []
        self.seconds_an_image: list[float] = []
        self.stays_cached = False

    def measure(self) -> None:
        """One window; to be taken before another mapping of the file in this process has touched it."""
        rows = self._piece()
        bytes_read = int(self.samples.size_N[rows].sum())
        if not self.stays_cached:
            self._evict(rows)
        if not self.stays_cached:
            seconds = self._read(rows)
            self.cold.append(bytes_read / seconds)
            self.seconds_an_image.append(seconds / len(rows))
        self._read(rows)
        self.warm.append(bytes_read / self._read(rows))

    def _piece(self) -> np.ndarray:
        """Rows that lie beside each other in the file, in random order: large pages leave the cache whole or not."""
        most = min(MOST_BYTES, self.cold[-1] * MOST_SECONDS) if self.cold else MOST_BYTES  # of a slow disk, less
        starts = self.samples.start_N[self.rows]
        last_begin = max(0, len(starts) - 1 - int(np.searchsorted(starts[-1] - starts[::-1], most)))
        begin = int(self.random.integers(last_begin + 1))
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + most)))
        return self.random.permutation(self.rows[begin:end])

    def _read(self, rows: np.ndarray) -> float:
        samples = self.samples
        nothing = np.zeros(0, np.int64)
        _touch(samples.file, nothing, nothing, np.zeros(1, np.int64))  # compiled
        work = _touch, samples.file, samples.start_N[rows], samples.size_N[rows], np.zeros(1, np.int64)
        with ThreadPoolExecutor(self.workers) as pool:
            start = time.perf_counter()
            for thread in [pool.submit(*work) for _ in range(self.workers)]:
                thread.result()
            return time.perf_counter() - start

    def _evict(self, rows: np.ndarray) -> None:
        samples = self.samples
        address = samples.file.ctypes.data
        first = int(samples.start_N[rows].min()) // PAGE * PAGE
        end = -(-int((samples.start_N[rows] + samples.size_N[rows]).max()) // PAGE) * PAGE
        _libc.madvise(address + first, end - first, MADV_DONTNEED)  # mapped pages stay in the cache
        with open(samples.path, "rb") as file:
            os.posix_fadvise(file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)
        still = share_in_page_cache(samples.file[first : min(end, len(samples.file))])
        self.stays_cached = still is None or still > STILL_CACHED


def share_in_page_cache(mapped: np.ndarray) -> float | None:
    """Of a mapped file, or of a piece of it, 0 to 1. None where the system does not say."""
    first = mapped.ctypes.data // PAGE * PAGE
    pages_N = np.zeros(-(-(mapped.ctypes.data + mapped.nbytes - first) // PAGE), np.uint8)
    if _libc.mincore(first, len(pages_N) * PAGE, pages_N.ctypes.data) != 0:
        return None
    return float((pages_N & 1).mean())
