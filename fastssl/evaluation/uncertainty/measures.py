"""Measures of an uncertainty: pure functions of arrays, in float64."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from fastssl.evaluation.arrays import Array, Device, as_labels, as_numpy, as_tensor
from fastssl.evaluation.knn import nearest_neighbors

MAX_TEMPERATURE = 100.0  # temperatures are searched between 1 / this and this
TEMPERATURE_TOLERANCE = 1e-6  # of the logarithm of the temperature


def nearest_is_wrong(features: Array, labels: Array, *, device: Device | None = None) -> np.ndarray:
    """Return (M,) bool: whether the nearest other image has another class. The mean is 1 - recall@1.

    The nearest image has the largest cosine similarity of features (M, D), in float64; ties are resolved by torch.topk.
    The only image of a class is always wrong.

    Raises:
        ValueError: if there are fewer than two images, or one has no label.
    """
    label_M = as_labels(labels)
    if len(label_M) < 2:
        raise ValueError("A single image has no neighbor.")
    row_MK = nearest_neighbors(features, features, 2, device=device)[1].cpu().numpy()
    # The nearest image is usually the image itself, but an exact copy may come before it.
    is_itself_M = row_MK[:, 0] == np.arange(len(label_M))
    return label_M[np.where(is_itself_M, row_MK[:, 1], row_MK[:, 0])] != label_M


def r_auroc(uncertainty: Array, wrong: Array) -> float:
    """Return the AUROC, 0 to 1, of the uncertainty (M,) as a score for `wrong` (M,); ties count half, 0.5 is chance.

    With `nearest_is_wrong`, this is R-AUROC of the URL benchmark (Kirchhof et al., arXiv 2307.03810): how often an
    image with a wrong nearest neighbor is more uncertain than one with a right one. NaN if all are right or all wrong.
    """
    # Imported here because it takes a second.
    from sklearn.metrics import roc_auc_score

    wrong_M = as_numpy(wrong)
    if wrong_M.all() or not wrong_M.any():
        return math.nan
    return float(roc_auc_score(wrong_M, as_numpy(uncertainty)))


def risk_coverage(uncertainty: Array, wrong: Array) -> np.ndarray:
    """Return (M,): the share of wrong predictions (the risk) among the 1, 2, ..., M least uncertain images.

    The risk-coverage curve of Geifman and El-Yaniv (arXiv 1705.08500). Images with equal uncertainty count with their
    mean, which is the expected curve over random orders of ties. So the curve does not depend on the order of the
    images, and it is constant for a constant uncertainty.
    """
    _, tie_M, size_T = np.unique(as_numpy(uncertainty), return_inverse=True, return_counts=True)
    risk_T = np.bincount(tie_M, as_numpy(wrong)) / size_T
    return np.cumsum(np.repeat(risk_T, size_T)) / np.arange(1, len(tie_M) + 1)


def aurc(uncertainty: Array, wrong: Array) -> float:
    """Return the area under the risk-coverage curve, 0 to 1, smaller is better (Geifman et al., arXiv 1805.08206).

    It is the mean of the risk over all M coverages. `aurc(wrong, wrong)` is the smallest possible area, with all wrong
    predictions last; the area of a constant uncertainty is the error rate.
    """
    return float(risk_coverage(uncertainty, wrong).mean())


def fit_temperature(logits: Array, labels: Array, classes: Array) -> float:
    """Return the temperature by which held-out logits (M, C) must be divided to minimize their cross-entropy.

    Temperature scaling (Guo et al., arXiv 1706.04599, section 4.2). The loss is convex in 1 / T, so it has one minimum,
    which is searched between 1 / 100 and 100.

    Args:
        logits: (M, C).
        labels: (M,), each one of the classes.
        classes: (C,), ascending: the labels of the columns.
    """
    # Imported here because it takes half a second.
    from scipy.optimize import minimize_scalar

    logits_MC = as_tensor(logits).double().cpu()
    target_M = torch.from_numpy(np.searchsorted(as_numpy(classes), as_numpy(labels)))
    limit = math.log(MAX_TEMPERATURE)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits_MC / math.exp(log_temperature), target_M).item()

    options = {"xatol": TEMPERATURE_TOLERANCE}
    return math.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options=options).x)


def neighbor_distance(
    bank: Array,
    query: Array,
    k: int,
    *,
    device: Device | None = None,
    advance: Callable[[int], object] = lambda samples: None,
) -> np.ndarray:
    """Return (M,), 0 to 2: the cosine distance of query (M, D) to its k-th nearest row of the bank (N, D).

    The deep nearest neighbors of Sun et al. (arXiv 2204.06507). If k > N, the distance to the furthest row.
    """
    similarity_MK, _ = nearest_neighbors(bank, query, k, device=device, advance=advance)
    return 1 - similarity_MK[:, -1].cpu().numpy()


def strength_correlation(uncertainty_NS: Array) -> np.ndarray:
    """Return (N,), -1 to 1: Spearman's correlation of each image's uncertainty with the strength 0, ..., S - 1.

    Ties share their mean rank. A constant uncertainty has correlation 0.
    """
    from scipy.stats import rankdata

    rank_NS = rankdata(as_numpy(uncertainty_NS), axis=1)
    rank_NS -= rank_NS.mean(axis=1, keepdims=True)
    strength_S = np.arange(rank_NS.shape[1]) - (rank_NS.shape[1] - 1) / 2
    length_N = np.sqrt((rank_NS**2).sum(axis=1) * (strength_S**2).sum())
    return rank_NS @ strength_S / np.where(length_N > 0, length_N, 1)
