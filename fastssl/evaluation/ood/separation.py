"""How well a score tells two sets of images apart; and how sure that is. Only the order of the scores counts."""

import numba
import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy
from fastssl.evaluation.metrics import RESAMPLES

METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_ood_positive", "fpr95_id_positive")
TPR = 0.95


def metrics(id_scores: ArrayLike | Tensor, ood_scores: ArrayLike | Tensor) -> dict[str, float]:
    """Shares from 0 to 1, of scores (N,) of in-distribution images and (M,) of others; a higher score means OOD.

    auroc: the probability that an OOD image scores higher than an ID one, ties counted half. aupr_in, aupr_out: average
    precision with ID, or OOD, as what is to be found; chance is that one's share of all images. fpr95_ood_positive: of
    the thresholds that find at least 95 % of the OOD images, the smallest share of ID images called OOD.
    fpr95_id_positive: of those that keep at least 95 % of the ID images, the smallest share of OOD images kept: what
    OpenOOD calls FPR@95.

    By scikit-learn, on the ranks of the scores, so that no monotone rescaling changes a digit. Raises ValueError where
    a score is NaN or a set is empty.
    """
    id_level_N, ood_level_M = levels(id_scores, ood_scores)
    is_ood = np.r_[np.zeros(len(id_level_N), bool), np.ones(len(ood_level_M), bool)]
    level = np.r_[id_level_N, ood_level_M]
    found = (
        roc_auc_score(is_ood, level),
        average_precision_score(~is_ood, -level),
        average_precision_score(is_ood, level),
        _fpr(is_ood, level),
        _fpr(~is_ood, -level),
    )
    return dict(zip(METRICS, map(float, found)))


def _fpr(positive, score) -> float:
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    return fpr[np.argmax(tpr >= TPR)]


def levels(id_scores: ArrayLike | Tensor, ood_scores: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The scores' places among all distinct ones, from 0: int64 of the same shapes."""
    id_N, ood_M = as_numpy(id_scores), as_numpy(ood_scores)
    for name, scores in (("ID", id_N), ("OOD", ood_M)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} scores must be one number an image, of one image or more, not {scores.shape}.")
        if np.isnan(scores).any():
            raise ValueError(f"{np.isnan(scores).sum()} of the {len(scores)} {name} scores are NaN.")
    level = np.unique(np.r_[id_N, ood_M], return_inverse=True)[1]
    return level[: len(id_N)], level[len(id_N) :]


def resample(images: int, seed: int | list[int]) -> np.ndarray:
    """(RESAMPLES, images) int32: rows drawn with replacement, for `bootstrap_metrics`."""
    return np.random.default_rng(seed).integers(images, size=(RESAMPLES, images), dtype=np.int32)


def bootstrap_metrics(
    id_scores: ArrayLike, ood_scores: ArrayLike, id_rows_RN: np.ndarray, ood_rows_RM: np.ndarray
) -> dict[str, np.ndarray]:
    """{name: (R,)}: what `metrics` gives of each of R resamples, both sets resampled (`resample`).

    With the same rows of the ID images for several OOD sets, the mean of their (R,) is that of a mean over sets.
    """
    id_level_N, ood_level_M = levels(id_scores, ood_scores)
    top = int(max(id_level_N.max(), ood_level_M.max())) + 1
    return dict(zip(METRICS, _bootstrap(id_level_N, ood_level_M, id_rows_RN, ood_rows_RM, top).T))


# Compiled: 1,000 resamples of 10,000 + 10,000 scores take 0.1 s; scikit-learn takes 10 ms for each.
@numba.njit(error_model="numpy")
def _bootstrap(id_level_N, ood_level_M, id_rows_RN, ood_rows_RM, top):
    found = np.empty((len(id_rows_RN), 5))
    for r in range(len(id_rows_RN)):
        id_count, ood_count = np.zeros(top, np.int64), np.zeros(top, np.int64)
        for row in id_rows_RN[r]:
            id_count[id_level_N[row]] += 1
        for row in ood_rows_RM[r]:
            ood_count[ood_level_M[row]] += 1
        n, m = id_rows_RN.shape[1], ood_rows_RM.shape[1]
        auroc = aupr_in = aupr_out = 0.0
        fpr_id = fpr_ood = -1.0
        id_below = ood_below = 0
        for level in range(top):  # upwards: what is at or below the level is called ID
            auroc += ood_count[level] * (id_below + 0.5 * id_count[level])
            id_below += id_count[level]
            ood_below += ood_count[level]
            if id_count[level] > 0:
                aupr_in += id_count[level] * id_below / (id_below + ood_below)
            if fpr_id < 0 and id_below / n >= TPR:
                fpr_id = ood_below / m
        id_above = ood_above = 0
        for level in range(top - 1, -1, -1):  # downwards: what is at or above the level is called OOD
            id_above += id_count[level]
            ood_above += ood_count[level]
            if ood_count[level] > 0:
                aupr_out += ood_count[level] * ood_above / (id_above + ood_above)
            if fpr_ood < 0 and ood_above / m >= TPR:
                fpr_ood = id_above / n
        found[r] = auroc / (n * m), aupr_in / n, aupr_out / m, fpr_ood, fpr_id
    return found
