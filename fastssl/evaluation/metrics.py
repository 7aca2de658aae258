"""What a classifier's logits on a test set come to: accuracies, calibration, confusion; and how sure these are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy

ECE_BINS = 15  # arXiv 1706.04599; torchmetrics' default
TOP = 5
RESAMPLES = 1000
LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
CHUNK_ROWS = 1 << 13  # test samples whose logits are looked at at a time: 64 MB with 1,000 classes


@dataclass(frozen=True)
class ClassificationResult:
    """How well a classifier does on M test samples."""

    metrics: dict[str, float]  # shares from 0 to 1, but `nll` in nats
    intervals: dict[str, tuple[float, float]]  # 95 % intervals of the metrics, bootstrap over test samples
    confusion_KK: np.ndarray  # int64 counts: rows the truth, columns the guess
    label_K: np.ndarray  # int64: every class of the classifier or of the test set, ascending


def classification_metrics(
    logits: ArrayLike | Tensor, labels: ArrayLike | Tensor, classes: ArrayLike | Tensor, *, seed: int = 0
) -> ClassificationResult:
    """The figures of logits (M, C) for labels (M,); classes (C,), ascending, says which labels the columns are.

    accuracy: top-1; of equal logits the first column's class is the guess. accuracy_top5, where there are more than 5
    classes: fewer than 5 columns have a larger logit, or an equal one further left. accuracy_macro: the mean over the
    classes in the test set of the share of each that is guessed. ece: expected calibration error of the guess's
    probability, 15 bins of equal width. nll: mean of -log probability of the truth.

    A label without a column is an error in all but nll, which leaves it out: no probability was ever assigned to it.
    """
    class_C, label_M = as_numpy(classes), as_numpy(labels)
    logits_MC = logits.detach() if isinstance(logits, Tensor) else np.asarray(logits)
    per_sample = [
        _per_sample(as_numpy(logits_MC[first : first + CHUNK_ROWS]), label_M[first : first + CHUNK_ROWS], class_C)
        for first in range(0, len(label_M), CHUNK_ROWS)
    ]
    guess_M, rank_M, confidence_M, nll_M = map(np.concatenate, zip(*per_sample, strict=True))

    present_K, class_M = np.unique(label_M, return_inverse=True)
    right_M = rank_M == 0
    columns = {
        "accuracy": right_M, "accuracy_top5": rank_M < TOP, "accuracy_macro": right_M, "ece": right_M, "nll": nll_M
    }  # fmt: skip
    if len(class_C) <= TOP:
        del columns["accuracy_top5"]
    bin_M = np.clip(np.ceil(confidence_M * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)

    def compute(rows) -> dict[str, float]:
        found = {}
        for name, column in columns.items():
            values = column[rows]
            if name == "accuracy_macro":
                found[name] = _mean_of_means(values, class_M[rows], len(present_K))
            elif name == "ece":
                gap = confidence_M[rows] - values  # summed over a bin: its size times (confidence - accuracy)
                found[name] = np.abs(np.bincount(bin_M[rows], gap, ECE_BINS)).sum() / len(values)
            else:
                found[name] = np.nanmean(values)
        return {name: float(value) for name, value in found.items()}

    if np.isnan(nll_M).all():
        del columns["nll"]
    resampled = bootstrap_intervals(len(label_M), compute, seed)
    classes_K = np.union1d(class_C, present_K)
    pair_M = np.searchsorted(classes_K, label_M) * len(classes_K) + np.searchsorted(classes_K, guess_M)
    confusion_KK = np.bincount(pair_M, minlength=len(classes_K) ** 2).reshape(len(classes_K), -1)
    return ClassificationResult(compute(slice(None)), resampled, confusion_KK, classes_K)


def _per_sample(logits_BC: np.ndarray, label_B: np.ndarray, class_C: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each sample the guessed label, the rank of the truth (C if it has no column), the guess's probability, the nll
    (NaN if it has no column)."""
    logits_BC = logits_BC.astype(np.float64)
    guess_B = logits_BC.argmax(axis=1)
    top_B = logits_BC.max(axis=1)
    log_sum_B = top_B + np.log(np.exp(logits_BC - top_B[:, None]).sum(axis=1))
    column_B = np.minimum(np.searchsorted(class_C, label_B), len(class_C) - 1)
    known_B = class_C[column_B] == label_B
    truth_B = np.take_along_axis(logits_BC, column_B[:, None], axis=1)
    before = np.arange(len(class_C)) < column_B[:, None]
    rank_B = ((logits_BC > truth_B) | ((logits_BC == truth_B) & before)).sum(axis=1)
    return (
        class_C[guess_B],
        np.where(known_B, rank_B, len(class_C)),
        np.exp(top_B - log_sum_B),
        np.where(known_B, log_sum_B - truth_B[:, 0], np.nan),
    )


def _mean_of_means(values: np.ndarray, class_M: np.ndarray, count: int) -> float:
    """Over the classes that are there."""
    size_K = np.bincount(class_M, minlength=count)
    return float((np.bincount(class_M, values, count)[size_K > 0] / size_K[size_K > 0]).mean())


def bootstrap_intervals(samples: int, compute, seed: int) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `compute(rows)`, over rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [compute(rng.integers(samples, size=samples)) for _ in range(RESAMPLES)]
    # nanpercentile: in a tiny test set, a draw may hold no sample with a probability
    columns = {name: [figures[name] for figures in drawn] for name in drawn[0]}
    return {name: tuple(np.nanpercentile(values, LEVEL).tolist()) for name, values in columns.items()}


def accuracy_interval(correct_M: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of M times right or wrong: there, a draw is binomial."""
    drawn = np.random.default_rng(seed).binomial(len(correct_M), correct_M.mean(), 10 * RESAMPLES) / len(correct_M)
    low, high = np.percentile(drawn, LEVEL)
    return float(low), float(high)
