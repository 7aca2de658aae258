"""Read the images of a resident set that are stored as a batch holds them (pixels, blocks), at the speed of the disk.

Threads that touch the pages of a mapped file wait for each piece that the system reads around a page: 0.5 GB/s from a
disk that `dd` reads at 2 GB/s. Reading large pieces to their place reaches 1.8 GB/s, and spares the page faults.
"""

import contextlib
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastssl.beton.parts import FilePart, file_identity, part_at
from fastssl.common.errors import UserError
from fastssl.common.files import open_regular
from fastssl.loading.decoding import Buffers
from fastssl.loading.samples import Indices, Samples

PIECE = 1 << 26  # bytes that a thread reads at a time: with 16 MB a disk was a third slower
THREADS = 4  # more than a disk needs; of each, a file in the page cache is copied at 5 GB/s


class Piece(NamedTuple):
    """Images in host memory."""

    row_B: np.ndarray  # int64: their rows of the file
    image: Tensor  # uint8 (B, H, W, C), or (B, bytes) of blocks


class StartedPiece(NamedTuple):
    """A piece that a thread reads."""

    piece: Piece
    thread: Future[None]


def read_pieces(
    samples: Samples, row_N: Indices, image_shape: tuple[int, ...], workers: int, buffers: Buffers
) -> Iterator[Piece]:
    """Yield the images of these rows in their order, while threads read the next ones.

    Raises:
        UserError: the file cannot be read, or is not the one any more that was checked.
    """
    threads = min(workers, THREADS)
    count = max(1, PIECE // math.prod(image_shape))
    started: deque[StartedPiece] = deque()
    with ThreadPoolExecutor(threads, "fastssl-read") as pool:
        for first in range(0, len(row_N), count):
            row_B = row_N[np.arange(first, min(first + count, len(row_N)))]
            image = buffers.take((len(row_B), *image_shape))
            started.append(StartedPiece(Piece(row_B, image), pool.submit(_read, samples, row_B, image.numpy())))
            if len(started) > threads:
                yield _finish(started.popleft(), samples)
        while started:
            yield _finish(started.popleft(), samples)


def pieces_bytes(workers: int, set_bytes: int) -> int:
    """Bytes of host memory that `read_pieces` takes at most, for a caller that holds two pieces at a time."""
    return min(set_bytes, (min(workers, THREADS) + 2) * PIECE)


def _finish(started: StartedPiece, samples: Samples) -> Piece:
    try:
        started.thread.result()
    except OSError as error:
        raise UserError(
            f"{samples.path} cannot be read ({error.strerror})", hint="check the disk, and run the same command again"
        ) from error
    return started.piece


def _read(samples: Samples, row_B: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with the stored bytes of these rows. Neighbors in the file are read at once."""
    start_B = samples.column("start", row_B)
    size = out[0].nbytes
    new_starts = np.flatnonzero(np.diff(start_B) != size) + 1
    limits = [0, *new_starts.tolist(), len(row_B)]
    part: FilePart | None = None
    with contextlib.ExitStack() as stack:
        for first, end in zip(limits, limits[1:]):
            position = int(start_B[first])
            if part is None or not part.start <= position < part.start + part.size:
                part = part_at(samples.parts, position)
                stack.close()
                file = stack.enter_context(open_regular(part.path))
                # The positions are those of the file that was mapped when its tables were checked.
                if file_identity(os.fstat(file.fileno())) != part.identity:
                    raise UserError(f"{part.path} has changed since it was opened", hint="start again")
            position -= part.start
            rest = out[first:end].reshape(-1).data
            while len(rest):
                done = os.preadv(file.fileno(), [rest], position)
                if done == 0:
                    raise UserError(f"{part.path} has changed since it was opened", hint="start again")
                position += done
                rest = rest[done:]
