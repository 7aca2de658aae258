"""The order of an epoch's samples: a function of (seed, epoch), the same for every number of processes."""

from typing import Literal

import numpy as np

from fastssl.common.randomness import PAGE_ORDER, permutation

Order = Literal["random", "quasi_random", "sequential"]
PAGES_AT_ONCE = 32  # of 8 MB as build-beton writes them: samples are mixed over 256 MB of the file


def epoch_order(order: Order, seed: int, epoch: int, page_N: np.ndarray) -> np.ndarray:
    """(N,) positions 0 to N - 1 in the order in which an epoch visits the samples.

    page_N: the page of the file that each sample lies in. "random" shuffles all samples.
    "quasi_random", for a file that does not fit into memory, shuffles the pages, then the samples of
    every PAGES_AT_ONCE pages: each part of the file is read once, in large pieces, and a batch
    still mixes samples of many pages. "sequential" is the file's own order in every epoch.
    """
    if order == "sequential":
        return np.arange(len(page_N))
    shuffled = permutation(seed, epoch, len(page_N)).numpy()
    if order == "random":
        return shuffled
    pages, page_N = np.unique(page_N, return_inverse=True)
    place_of_page = permutation(seed, epoch, len(pages), PAGE_ORDER).numpy()
    window_N = place_of_page[page_N] // PAGES_AT_ONCE
    return shuffled[np.argsort(window_N[shuffled], kind="stable")]
