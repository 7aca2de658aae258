"""Metrics of a classifier from its logits on a test set: accuracies, calibration, confusion, with intervals."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from fastssl.evaluation.arrays import Array, as_labels, as_numpy

ECE_BINS = 15  # arXiv 1706.04599; the default of torchmetrics
TOP = 5
RESAMPLES = 1000
LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
CHUNK_ROWS = 1 << 13  # test samples whose logits are in float64 at a time: 64 MB with 1,000 classes

Rows: TypeAlias = np.ndarray | slice
Interval: TypeAlias = tuple[float, float]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class ClassificationResult:
    """How well a classifier does on M test samples."""

    metrics: dict[str, float]  # shares from 0 to 1, but `nll` in nats
    intervals: dict[str, Interval]  # 95 % intervals of the metrics, bootstrap over test samples
    confusion_KK: np.ndarray  # int64 counts: rows the truth, columns the guess
    label_K: np.ndarray  # int64: every class of the classifier or of the test set, ascending
    chance: dict[str, float]  # the metrics of a guess that knows nothing about the image, as far as they are defined
    correct_M: np.ndarray  # bool: whether the most likely class is right


def classification_metrics(logits: Array, labels: Array, classes: Array, *, seed: int = 0) -> ClassificationResult:
    """Compare logits with labels.

    A label without a column counts as an error, but not in nll: no probability was assigned to it.

    Args:
        logits: (M, C).
        labels: (M,) integers from 0 on.
        classes: (C,) the label of each column, ascending.
        seed: of the bootstrap.

    Returns:
        The result, with these metrics:
        accuracy: top-1. Of equal logits the first column is the guess.
        accuracy_top5: fewer than 5 columns have a larger logit, or an equal one further left. With C > 5 only.
        accuracy_macro: the mean over the classes of the test set of their accuracies.
        ece: expected calibration error of the probability of the guess, 15 bins of equal width.
        nll: mean of -log probability of the truth.
    """
    class_C, label_M = as_numpy(classes), as_labels(labels)
    logits_MC = logits.detach() if isinstance(logits, Tensor) else np.asarray(logits)
    chunks = [
        _test_samples(as_numpy(logits_MC[first : first + CHUNK_ROWS]), label_M[first : first + CHUNK_ROWS], class_C)
        for first in range(0, len(label_M), CHUNK_ROWS)
    ]
    guess_M, rank_M, confidence_M, nll_M = (np.concatenate(column) for column in zip(*chunks, strict=True))
    present_K, class_index_M = np.unique(label_M, return_inverse=True)
    correct_M = rank_M == 0
    bin_M = np.clip(np.ceil(confidence_M * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    any_nll = not np.isnan(nll_M).all()

    def compute(rows: Rows) -> dict[str, float]:
        correct_R, index_R = correct_M[rows], class_index_M[rows]
        metrics = {"accuracy": correct_R.mean()}
        if len(class_C) > TOP:
            metrics["accuracy_top5"] = (rank_M[rows] < TOP).mean()
        # A resample may miss a class, which then does not count.
        size_K = np.bincount(index_R, minlength=len(present_K))
        correct_K = np.bincount(index_R, correct_R, len(present_K))
        metrics["accuracy_macro"] = (correct_K[size_K > 0] / size_K[size_K > 0]).mean()
        # The sum of (confidence - correct) in a bin is its size times its gap between confidence and accuracy.
        gap_bins = np.bincount(bin_M[rows], confidence_M[rows] - correct_R, ECE_BINS)
        metrics["ece"] = np.abs(gap_bins).sum() / len(correct_R)
        if any_nll:
            metrics["nll"] = np.nanmean(nll_M[rows])
        return {name: float(value) for name, value in metrics.items()}

    intervals = bootstrap_intervals(len(label_M), compute, seed)
    label_K = np.union1d(class_C, present_K)
    pair_M = np.searchsorted(label_K, label_M) * len(label_K) + np.searchsorted(label_K, guess_M)
    confusion_KK = np.bincount(pair_M, minlength=len(label_K) ** 2).reshape(len(label_K), -1)
    metrics = compute(slice(None))
    chance = {name: value for name, value in chance_levels(label_M).items() if name in metrics}
    return ClassificationResult(metrics, intervals, confusion_KK, label_K, chance, correct_M)


def chance_levels(labels: Array) -> dict[str, float]:
    """Return the metrics, on these test labels, of a guess that knows the shares of the classes but not the image.

    Accuracies: the most frequent class is guessed, or the five most frequent ones. nll: probabilities are the shares of
    the classes. recall_at_1: the nearest neighbor is any other image.
    """
    size_K = np.sort(np.unique(as_labels(labels), return_counts=True)[1])[::-1]
    samples = int(size_K.sum())
    share_K = size_K / samples
    return {
        "accuracy": float(share_K[0]),
        "accuracy_top5": float(share_K[:TOP].sum()),
        "accuracy_macro": 1 / len(share_K),
        "nll": float(-(share_K * np.log(share_K)).sum()),
        "recall_at_1": float((share_K * (size_K - 1)).sum() / max(1, samples - 1)),
    }


def _test_samples(logits_BC: np.ndarray, label_B: np.ndarray, class_C: np.ndarray) -> tuple[np.ndarray, ...]:
    """(B,) guessed labels, ranks of the true column from 0 (C without one), probabilities of the guess, nll or NaN."""
    logits_BC = logits_BC.astype(np.float64)
    max_B = logits_BC.max(axis=1)
    log_sum_B = max_B + np.log(np.exp(logits_BC - max_B[:, None]).sum(axis=1))
    column_B = np.minimum(np.searchsorted(class_C, label_B), len(class_C) - 1)
    has_column_B = class_C[column_B] == label_B
    truth_B1 = np.take_along_axis(logits_BC, column_B[:, None], axis=1)
    further_left_BC = np.arange(len(class_C)) < column_B[:, None]
    rank_B = ((logits_BC > truth_B1) | ((logits_BC == truth_B1) & further_left_BC)).sum(axis=1)
    rank_B = np.where(has_column_B, rank_B, len(class_C))
    nll_B = np.where(has_column_B, log_sum_B - truth_B1[:, 0], np.nan)
    return class_C[logits_BC.argmax(axis=1)], rank_B, np.exp(max_B - log_sum_B), nll_B


def bootstrap_intervals(
    samples: int, compute: Callable[[np.ndarray], dict[Name, float]], seed: int
) -> dict[Name, Interval]:
    """95 % percentile intervals of `compute(rows)` over 1,000 draws of `samples` rows with replacement."""
    rng = np.random.default_rng(seed)
    resampled = [compute(rng.integers(samples, size=samples)) for _ in range(RESAMPLES)]
    intervals = {}
    for name in resampled[0]:
        # A resample of a tiny test set may hold no sample with an nll. It is left out.
        low, high = np.nanpercentile([metrics[name] for metrics in resampled], LEVEL)
        intervals[name] = (float(low), float(high))
    return intervals


def accuracy_interval(correct_M: np.ndarray, seed: int = 0) -> Interval:
    """95 % bootstrap interval of an accuracy. The number of correct samples in a resample is binomial."""
    resampled = np.random.default_rng(seed).binomial(len(correct_M), correct_M.mean(), 10 * RESAMPLES) / len(correct_M)
    low, high = np.percentile(resampled, LEVEL)
    return float(low), float(high)
