"""Which samples of a file a loader uses, and in what order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastssl.beton import read_header, read_index_list
from fastssl.common.randomness import PAGE_ORDER, permutation
from fastssl.loading.samples import Samples

Order = Literal["random", "quasi_random", "sequential"]
WINDOW_PAGES = 32  # of 8 MB in files of build-beton: quasi_random mixes the samples of 256 MB of the file
LIMIT_SEED = 0  # `limit` draws the same samples for every seed of a run


@dataclass(frozen=True)
class SampleSelection:
    """The samples of a file that a loader uses; by default all of them."""

    subset: str | Path | None = None  # only those of this list (see fastssl.beton.read_index_list)
    limit: int | None = None  # at most this many of them, drawn at random
    skip: int = 0  # without this many at the beginning of that draw

    def rows(self, samples: Samples) -> np.ndarray:
        """(M,) int64: the rows of the selected samples, in the file's order."""
        row_N = np.arange(len(samples.index_N))
        if self.subset is not None:
            row_N = np.flatnonzero(np.isin(samples.index_N, read_index_list(samples.path, self.subset)))
        if self.skip or (self.limit is not None and self.limit < len(row_N)):
            drawn = permutation(LIMIT_SEED, 0, len(row_N)).numpy()
            row_N = row_N[np.sort(drawn[self.skip :][: self.limit])]
        return row_N

    def labels(self, path: str | Path) -> np.ndarray:
        """(M,) int64: the labels of the selected samples, -1 where there is none, without a loader."""
        samples = Samples.read(read_header(path))
        return samples.label_N[self.rows(samples)]

    def count(self, path: str | Path) -> int:
        """The number of selected samples, without a loader."""
        listed = read_header(path).num_samples if self.subset is None else len(read_index_list(path, self.subset))
        left = max(0, listed - self.skip)
        return left if self.limit is None else min(left, self.limit)


def epoch_order(order: Order, seed: int, epoch: int, page_N: np.ndarray) -> np.ndarray:
    """(N,) positions 0 to N - 1 in the order in which an epoch visits the samples.

    The order is a function of (seed, epoch), the same for every number of processes. "random" shuffles all samples.
    "quasi_random", for a file that does not fit into memory, shuffles the pages, then the samples of every WINDOW_PAGES
    pages: each part of the file is read once, in large pieces, and a batch still mixes samples of many pages.
    "sequential" is the file's own order in every epoch.

    page_N: the page of the file that contains each sample.
    """
    if order == "sequential":
        return np.arange(len(page_N))
    shuffled_N = permutation(seed, epoch, len(page_N)).numpy()
    if order == "random":
        return shuffled_N
    pages, page_N = np.unique(page_N, return_inverse=True)
    position_of_page = permutation(seed, epoch, len(pages), PAGE_ORDER).numpy()
    # A stable sort by window keeps the random order within each window.
    window_N = position_of_page[page_N] // WINDOW_PAGES
    return shuffled_N[np.argsort(window_N[shuffled_N], kind="stable")]
