"""Which samples of a file a loader uses, and in what order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastssl.beton import mapped, read_header, read_index_list
from fastssl.common.randomness import KEYED_LIMIT, KEYED_ORDER, PAGE_ORDER, permutation
from fastssl.loading.keyed_order import KeyedPermutation, KeyedWindows
from fastssl.loading.samples import Indices, Samples

Order = Literal["random", "quasi_random", "sequential"]
WINDOW_PAGES = 32  # of 8 MB in files of build-beton: quasi_random mixes the samples of 256 MB of the file
LIMIT_SEED = 0  # `limit` draws the same samples for every seed of a run


@dataclass(frozen=True)
class Count:
    """0 to count - 1 in this order, without memory."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position_B: np.ndarray) -> np.ndarray:
        return position_B


@dataclass(frozen=True)
class Drawn:
    """The rows at `count` positions of a draw, from position `first` of it on, without memory."""

    rows: Indices
    drawn: Indices
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position_B: np.ndarray) -> np.ndarray:
        return self.rows[self.drawn[self.first + position_B]]


def _numbers(count: int) -> Indices:
    return np.arange(count) if count <= mapped.MOST_IN_MEMORY else Count(count)


def _shuffled(seed: int, epoch: int, count: int, purpose_if_keyed: int) -> Indices:
    if count <= mapped.MOST_IN_MEMORY:
        return permutation(seed, epoch, count).numpy()
    return KeyedPermutation(count, seed, epoch, purpose_if_keyed)


@dataclass(frozen=True)
class SampleSelection:
    """The samples of a file that a loader uses; by default all of them."""

    subset: str | Path | None = None  # only those of this list (see fastssl.beton.read_index_list)
    limit: int | None = None  # at most this many of them, drawn at random
    skip: int = 0  # without this many at the beginning of that draw

    def rows(self, samples: Samples) -> Indices:
        """The M rows of the selected samples, in the file's order: int64 (M,), or computed if they are too many.

        More than `mapped.MOST_IN_MEMORY` that `limit` and `skip` leave are in the order of the draw.
        """
        row_N = _numbers(len(samples))
        if self.subset is not None:
            row_N = _rows_of(samples, read_index_list(samples.path, self.subset))
        if self.skip or (self.limit is not None and self.limit < len(row_N)):
            drawn = _shuffled(LIMIT_SEED, 0, len(row_N), KEYED_LIMIT)
            left = max(0, len(row_N) - self.skip)
            count = left if self.limit is None else min(left, self.limit)
            if count > mapped.MOST_IN_MEMORY:
                return Drawn(row_N, drawn, self.skip, count)
            row_N = row_N[np.sort(drawn[np.arange(self.skip, self.skip + count)])]
        return row_N

    def labels(self, path: str | Path) -> np.ndarray:
        """(M,) int64: the labels of the selected samples, -1 where there is none, without a loader."""
        samples = Samples.read(read_header(path))
        return samples.column("label", self.rows(samples))

    def count(self, path: str | Path) -> int:
        """The number of selected samples, without a loader."""
        listed = read_header(path).num_samples if self.subset is None else len(read_index_list(path, self.subset))
        left = max(0, listed - self.skip)
        return left if self.limit is None else min(left, self.limit)


def _rows_of(samples: Samples, index_L: np.ndarray) -> np.ndarray:
    """(M,) int64: the rows of the samples with these indices, in the file's order."""
    found = []
    first = 0
    for index_n in samples.index_pieces():
        found.append(first + np.flatnonzero(np.isin(index_n, index_L)))
        first += len(index_n)
    return np.concatenate(found)


def epoch_order(order: Order, seed: int, epoch: int, samples: Samples, rows: Indices) -> Indices:
    """Positions 0 to N - 1 of the selected `rows` in the order in which an epoch visits them, int64 (N,).

    The order is a function of (seed, epoch), the same for every number of processes. "random" shuffles all samples.
    "quasi_random", for a file that does not fit into memory, shuffles the pages, then the samples of every WINDOW_PAGES
    pages: each part of the file is read once, in large pieces, and a batch still mixes samples of many pages.
    "sequential" is the file's own order in every epoch.

    More than `mapped.MOST_IN_MEMORY` positions are computed when they are asked for, by another permutation of the same
    kind, in which a page is as many neighbors as a page holds on average.
    """
    count = len(rows)
    if order == "sequential":
        return _numbers(count)
    if order == "random":
        return _shuffled(seed, epoch, count, KEYED_ORDER)
    if count <= mapped.MOST_IN_MEMORY:
        return shuffled_pages(seed, epoch, samples.page(rows))
    block = max(1, samples.rows_of_a_page * count // len(samples))
    return KeyedWindows(count, block, WINDOW_PAGES, seed, epoch)


def shuffled_pages(seed: int, epoch: int, page_N: np.ndarray) -> np.ndarray:
    """(N,) positions 0 to N - 1: pages are shuffled, then the samples in every WINDOW_PAGES pages.

    page_N: the page of the file that contains each sample.
    """
    shuffled_N = permutation(seed, epoch, len(page_N)).numpy()
    pages, page_N = np.unique(page_N, return_inverse=True)
    position_of_page = permutation(seed, epoch, len(pages), PAGE_ORDER).numpy()
    # A stable sort by window keeps the random order within each window.
    window_N = position_of_page[page_N] // WINDOW_PAGES
    return shuffled_N[np.argsort(window_N[shuffled_N], kind="stable")]
