"""Figures of an uncertainty: pure functions of arrays, in float64."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy, as_tensor
from fastssl.evaluation.knn import nearest_neighbors

LARGEST_TEMPERATURE = 100.0  # and 1 / this the smallest that is looked at
TEMPERATURE_TOLERANCE = 1e-6  # of its logarithm


def nearest_is_wrong(
    features: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, device: torch.device | str | None = None
) -> np.ndarray:
    """(M,) bool: whether the nearest other image has another class; 1 - recall@1 is its mean.

    features (M, D), by cosine similarity in float64; labels (M,); two images or more. Of others that are equally near,
    torch.topk's pick counts. The only image of its class is always wrong.
    """
    label_M = as_numpy(labels)
    if len(label_M) < 2:
        raise ValueError("One image alone has no neighbour.")
    _, row_MK = nearest_neighbors(features, features, 2, device=device)
    row_MK = row_MK.cpu().numpy()
    # An image's nearest is itself, but of exact copies another may come first.
    itself_M = row_MK[:, 0] == np.arange(len(label_M))
    return label_M[np.where(itself_M, row_MK[:, 1], row_MK[:, 0])] != label_M


def r_auroc(uncertainty: ArrayLike | Tensor, wrong: ArrayLike | Tensor) -> float:
    """Area under the ROC curve, 0 to 1, of the uncertainty (M,) as a score for `wrong` (M,): how often an image with a
    wrong nearest neighbour is less certain than one with a right one, ties counted half. 0.5 is chance.

    The URL benchmark's R-AUROC (Kirchhof et al., arXiv 2307.03810). NaN where all are right, or all wrong.
    """
    from sklearn.metrics import roc_auc_score  # here, as it takes a second

    wrong_M = as_numpy(wrong)
    if wrong_M.all() or not wrong_M.any():
        return math.nan
    return float(roc_auc_score(wrong_M, as_numpy(uncertainty)))


def risk_coverage(uncertainty: ArrayLike | Tensor, wrong: ArrayLike | Tensor) -> np.ndarray:
    """(M,) float64: the share of wrong guesses, the risk, among the 1, 2, ..., M most certain images.

    The risk-coverage curve of Geifman and El-Yaniv (arXiv 1705.08500); coverage is the place / M. Images that are
    equally certain are taken in random order, and this is the mean over such orders: each counts as their mean. So the
    curve does not depend on the order of the images, and of a constant uncertainty it is flat.
    """
    _, tie_M, size_T = np.unique(as_numpy(uncertainty), return_inverse=True, return_counts=True)
    risk_T = np.bincount(tie_M, as_numpy(wrong)) / size_T
    return np.cumsum(np.repeat(risk_T, size_T)) / np.arange(1, len(tie_M) + 1)


def aurc(uncertainty: ArrayLike | Tensor, wrong: ArrayLike | Tensor) -> float:
    """Area under the risk-coverage curve, 0 to 1, smaller is better: the mean of the risk over the M coverages.

    Geifman et al., arXiv 1805.08206, with ties as `risk_coverage` has them. A constant uncertainty's is the share of
    wrong guesses.
    """
    return float(risk_coverage(uncertainty, wrong).mean())


def e_aurc(uncertainty: ArrayLike | Tensor, wrong: ArrayLike | Tensor) -> float:
    """E-AURC: `aurc` above the least possible one, that of an order which puts all wrong guesses last; 0 is perfect.

    Geifman et al., arXiv 1805.08206; theirs approximates that least one for many images, this is the exact one.
    """
    return aurc(uncertainty, wrong) - aurc(wrong, wrong)


def fit_temperature(logits: ArrayLike | Tensor, labels: ArrayLike | Tensor, classes: ArrayLike | Tensor) -> float:
    """The T > 0 by which held-out logits (M, C) are divided to make their cross-entropy least.

    Temperature scaling (Guo et al., arXiv 1706.04599, section 4.2). classes (C,), ascending, are the labels that the
    columns stand for; labels (M,) are among them. The loss is convex in 1 / T, so its one minimum is found, within
    1 / 100 to 100.
    """
    from scipy.optimize import minimize_scalar  # here, as it takes half a second

    logits_MC = as_tensor(logits).double().cpu()
    target_M = torch.from_numpy(np.searchsorted(as_numpy(classes), as_numpy(labels)))
    furthest = math.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(
        lambda log_t: F.cross_entropy(logits_MC / math.exp(log_t), target_M).item(),
        bounds=(-furthest, furthest), method="bounded", options={"xatol": TEMPERATURE_TOLERANCE},
    )  # fmt: skip
    return math.exp(found.x)


def neighbour_distance(
    bank: ArrayLike | Tensor,
    query: ArrayLike | Tensor,
    k: int,
    *,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda samples: None,
) -> np.ndarray:
    """(M,) float64, 0 to 2: the cosine distance of query (M, D) to its k-th nearest row of the bank (N, D).

    The deep nearest neighbours of Sun et al. (arXiv 2204.06507). A k above N is shortened to it.
    """
    near_MK, _ = nearest_neighbors(bank, query, k, device=device, advance=advance)
    return 1 - near_MK[:, -1].cpu().numpy()


def strength_correlation(uncertainty_NS: ArrayLike | Tensor) -> np.ndarray:
    """(N,) float64, -1 to 1: Spearman's correlation of each image's uncertainty with the strength 0, 1, ..., S - 1 of
    what was done to it. Ties share their mean rank; an uncertainty that does not change has 0.
    """
    from scipy.stats import rankdata

    rank_NS = rankdata(as_numpy(uncertainty_NS), axis=1)
    rank_NS -= rank_NS.mean(axis=1, keepdims=True)
    strength_S = np.arange(rank_NS.shape[1]) - (rank_NS.shape[1] - 1) / 2
    length_N = np.sqrt((rank_NS**2).sum(axis=1) * (strength_S**2).sum())
    return rank_NS @ strength_S / np.where(length_N > 0, length_N, 1)
