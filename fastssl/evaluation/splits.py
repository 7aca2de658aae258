"""Which samples are fitted on, and which are held out: functions of labels and seed alone.

So all encoders that are evaluated on the same data with the same seed get the same samples.
"""

import numpy as np

from fastssl.common.errors import UserError
from fastssl.evaluation.arrays import Array, as_labels

HOLDOUT_SHARE = 0.1  # of the training set, to choose hyperparameters on


def balanced_subsets(labels: Array, labels_per_class: int, count: int, seed: int) -> list[np.ndarray]:
    """Draw `count` independent subsets with `labels_per_class` rows of every class, each sorted."""
    label_N = as_labels(labels)
    class_C, count_C = np.unique(label_N, return_counts=True)
    if count_C.min() < labels_per_class:
        raise UserError(
            f"Class {class_C[count_C.argmin()]} has {count_C.min()} training samples, fewer than the "
            f"{labels_per_class} labels per class that are needed",
            hint="use fewer labels per class, or give more data",
        )
    subsets = []
    for draw in range(count):
        rng = np.random.default_rng([seed, draw])
        rows = [rng.choice(np.flatnonzero(label_N == c), labels_per_class, replace=False) for c in class_C]
        subsets.append(np.sort(np.concatenate(rows)))
    return subsets


def stratified_share(labels: Array, share: float, seed: int, leave: int = 0) -> np.ndarray:
    """The sorted rows of `share` of every class: at least one sample, unless fewer than `leave` would be left."""
    label_N = as_labels(labels)
    rng = np.random.default_rng(seed)
    picked = []
    for c in np.unique(label_N):
        rows = rng.permutation(np.flatnonzero(label_N == c))
        picked.append(rows[: min(max(1, round(share * len(rows))), len(rows) - leave)])
    return np.sort(np.concatenate(picked))


def stratified_holdout(labels: Array, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit on, held-out rows), both sorted: `share` of every class is held out.

    At least one sample of a class is held out and at least one is not. The only sample of a class is not held out.
    """
    held_rows = stratified_share(labels, share, seed, leave=1)
    return np.setdiff1d(np.arange(len(labels)), held_rows), held_rows


def holdout_split(label_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`stratified_holdout` of a tenth, on which linear classifiers are chosen. UserError if nothing can be held out."""
    fit_rows, held_rows = stratified_holdout(label_N, HOLDOUT_SHARE, seed)
    if len(held_rows) == 0:
        raise UserError(
            "A linear classifier is chosen on held-out images, but no class has two", hint="name more images"
        )
    return fit_rows, held_rows
