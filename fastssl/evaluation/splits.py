"""Which training samples are used for what: functions of (labels, seed) alone.

So every encoder evaluated on the same data with the same seed gets the same samples.
"""

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.evaluation.arrays import as_numpy

HOLDOUT_SHARE = 0.1  # share of the training set that hyperparameters are chosen on


def balanced_draws(labels: ArrayLike | Tensor, labels_per_class: int, draws: int, seed: int) -> list[np.ndarray]:
    """`draws` independent samples of `labels_per_class` rows of every class, each ascending."""
    label_N = as_numpy(labels)
    class_C, count_C = np.unique(label_N, return_counts=True)
    if count_C.min() < labels_per_class:
        scarce = class_C[count_C.argmin()]
        raise UserError(
            f"Class {scarce} has {count_C.min()} training samples, fewer than the "
            f"{labels_per_class} labels a class asked for: ask for fewer, or give more data."
        )
    picked = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        rows = [rng.choice(np.flatnonzero(label_N == c), labels_per_class, replace=False) for c in class_C]
        picked.append(np.sort(np.concatenate(rows)))
    return picked


def stratified_holdout(labels: ArrayLike | Tensor, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, rows held out), both sorted: `share` of every class is held out.

    At least one sample of a class is held out and at least one is kept; a class of one is kept.
    """
    label_N = as_numpy(labels)
    held = _some_of_every_class(label_N, share, seed, leave=1)
    return np.setdiff1d(np.arange(len(label_N)), held), held


def stratified_share(labels: ArrayLike | Tensor, share: float, seed: int) -> np.ndarray:
    """The rows, sorted, of `share` of every class: at least one sample of each."""
    return _some_of_every_class(as_numpy(labels), share, seed, leave=0)


def _some_of_every_class(label_N: np.ndarray, share: float, seed: int, leave: int) -> np.ndarray:
    """Rows, sorted: a share of each class, one sample or more, but so many that `leave` of them are left."""
    rng = np.random.default_rng(seed)
    picked = []
    for c in np.unique(label_N):
        rows = rng.permutation(np.flatnonzero(label_N == c))
        picked.append(rows[: min(max(1, round(share * len(rows))), len(rows) - leave)])
    return np.sort(np.concatenate(picked))


def holdout_split(label_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, rows to choose on): what linear classifiers are chosen by. UserError where there are none."""
    fit_rows, held_rows = stratified_holdout(label_N, HOLDOUT_SHARE, seed)
    if len(held_rows) == 0:
        raise UserError("A linear classifier is chosen on held-out images, but no class has two: name more images.")
    return fit_rows, held_rows
