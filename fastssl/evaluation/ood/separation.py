"""Metrics of how well scores separate data sets, with bootstrap intervals. Only the order of the scores counts."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, NotRequired

import numba
import numpy as np
from pydantic import AfterValidator
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from typing_extensions import TypedDict

from fastssl.common.schema import Finite
from fastssl.evaluation.arrays import Advance, Array, as_numpy
from fastssl.evaluation.metrics import LEVEL, RESAMPLES
from fastssl.evaluation.ood.detectors import LABEL_BASED
from fastssl.evaluation.results import Interval

METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_ood_positive", "fpr95_id_positive")
TPR = 0.95
MIN_INVERTED = 30  # images per set: with fewer, resamples vary too little to call a detector significantly inverted
SUMMARIZED = ("auroc", "fpr95_id_positive")  # metrics, of the means over near and over far sets, in tables of runs


def _check_metrics(values: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError unless every metric is there. For files from elsewhere."""
    if missing := set(METRICS) - values.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    return values


class SeparationResult(TypedDict):
    """How well a detector separates one OOD set from the ID images, or the mean over several sets."""

    metrics: Annotated[dict[str, Finite], AfterValidator(_check_metrics)]  # of METRICS
    intervals: Annotated[dict[str, Interval], AfterValidator(_check_metrics)]
    inverted: bool  # the interval of AUROC is below 0.5: the opposite direction of the score would have been right


class DetectorResult(TypedDict):
    labels: bool  # whether the detector uses labels
    norm_correlation: Finite  # Spearman's, of the score with the length of h, over ID images
    sets: dict[str, SeparationResult]
    near: NotRequired[SeparationResult]  # mean over the near sets
    far: NotRequired[SeparationResult]


class Comparison(TypedDict):
    detectors: dict[str, DetectorResult]
    metrics: dict[str, float]  # such as "energy near auroc"
    intervals: dict[str, list[float]]


def metrics(id_scores: Array, ood_scores: Array) -> dict[str, float]:
    """Compute metrics, 0 to 1, of the scores (N,) of in-distribution images and (M,) of others, higher meaning OOD.

    They are computed by scikit-learn from the ranks of the scores, so a monotonic transformation does not change them.

        metrics([0.1, 0.2], [0.3, 0.15])["auroc"]  # 0.75

    Returns:
        auroc: the probability that an OOD image scores higher than an ID image; ties count half.
        aupr_in, aupr_out: average precision with ID or OOD as the positive class; chance is its share of all images.
        fpr95_ood_positive: share of ID images predicted as OOD at the threshold that detects 95 % of the OOD images.
        fpr95_id_positive: share of OOD images predicted as ID at the threshold that accepts 95 % of the ID images,
            which OpenOOD calls FPR@95.

    Raises:
        ValueError: if a score is NaN or a set is empty.
    """
    id_level_N, ood_level_M = levels(id_scores, ood_scores)
    level = np.r_[id_level_N, ood_level_M]
    is_ood = np.arange(len(level)) >= len(id_level_N)
    return {
        "auroc": float(roc_auc_score(is_ood, level)),
        "aupr_in": float(average_precision_score(~is_ood, -level)),
        "aupr_out": float(average_precision_score(is_ood, level)),
        "fpr95_ood_positive": _fpr95(is_ood, level),
        "fpr95_id_positive": _fpr95(~is_ood, -level),
    }


def _fpr95(positive: np.ndarray, score: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= TPR)])


def levels(id_scores: Array, ood_scores: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of the scores among all distinct scores, from 0: int64 of the same shapes."""
    id_N = as_numpy(id_scores)
    ood_M = as_numpy(ood_scores)
    for name, scores in (("ID", id_N), ("OOD", ood_M)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} scores must have shape (N,) with N > 0, not {scores.shape}.")
        if np.isnan(scores).any():
            raise ValueError(f"{np.isnan(scores).sum()} of the {len(scores)} {name} scores are NaN.")
    level = np.unique(np.r_[id_N, ood_M], return_inverse=True)[1]
    return level[: len(id_N)], level[len(id_N) :]


def resample(images: int, seed: int | list[int]) -> np.ndarray:
    """Draw rows with replacement for `bootstrap_metrics`: (RESAMPLES, images) int32."""
    return np.random.default_rng(seed).integers(images, size=(RESAMPLES, images), dtype=np.int32)


def bootstrap_metrics(
    id_scores: Array, ood_scores: Array, id_rows_RN: np.ndarray, ood_rows_RM: np.ndarray
) -> dict[str, np.ndarray]:
    """Return `metrics` of R resamples of both sets (`resample`), each (R,).

    With the same rows of the ID images for several OOD sets, means over sets can be computed per resample.
    """
    id_level_N, ood_level_M = levels(id_scores, ood_scores)
    count = int(max(id_level_N.max(), ood_level_M.max())) + 1
    return dict(zip(METRICS, _bootstrap(id_level_N, ood_level_M, id_rows_RN, ood_rows_RM, count).T))


def compare(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    groups: Mapping[str, Sequence[str]],
    id_norm_N: np.ndarray,
    seed: int,
    advance: Advance = lambda detectors: None,
) -> Comparison:
    """Compute the metrics of each detector on each OOD set, and their means over the sets of each group.

    scores: detector -> set -> scores, with the set "id" of N in-distribution images; NaN where an image has none.
    groups: "near" and "far" -> names of the OOD sets. id_norm_N: lengths of the features of the ID images.
    advance: called after each detector.
    """
    others = [other for group in groups.values() for other in group]
    # Detectors with scores of the same images share their resamples.
    draw = lru_cache(maxsize=2 * (1 + len(others)))(lambda images, number: resample(images, [seed, number]))
    comparison: Comparison = {"detectors": {}, "metrics": {}, "intervals": {}}
    for name, score_of_all in scores.items():
        score = without_missing(score_of_all)
        images = {part: len(found) for part, found in score.items()}
        norm_N = id_norm_N[~np.isnan(score_of_all["id"])]
        id_rows_RN = draw(images["id"], 0)
        ood_rows = {other: draw(images[other], 1 + i) for i, other in enumerate(others)}
        exact = {other: metrics(score["id"], score[other]) for other in others}
        resampled = {
            other: bootstrap_metrics(score["id"], score[other], id_rows_RN, ood_rows[other]) for other in others
        }
        constant = np.ptp(score["id"]) == 0 or np.ptp(norm_N) == 0
        row: DetectorResult = {
            "labels": name in LABEL_BASED,
            "norm_correlation": 0.0 if constant else float(spearmanr(score["id"], norm_N).statistic),
            "sets": {other: mean_over_sets([other], exact, resampled, images) for other in others},
        }
        for group, sets in groups.items():
            if sets:
                row[group] = mean = mean_over_sets(sets, exact, resampled, images)  # type: ignore[literal-required]
                for key in SUMMARIZED:
                    comparison["metrics"][f"{name} {group} {key}"] = mean["metrics"][key]
                    comparison["intervals"][f"{name} {group} {key}"] = mean["intervals"][key]
        comparison["detectors"][name] = row
        advance(1)
    return comparison


def without_missing(score: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out images that have no score, which is NaN, from the scores of each set."""
    return {part: found[~np.isnan(found)] for part, found in score.items()}


def mean_over_sets(
    sets: Sequence[str],
    exact: Mapping[str, Mapping[str, float]],
    resampled: Mapping[str, Mapping[str, np.ndarray]],
    images: Mapping[str, int],
) -> SeparationResult:
    """Average the metrics and the resampled metrics of some sets, and compute the intervals of the means."""
    means = {key: float(np.mean([exact[name][key] for name in sets])) for key in METRICS}
    mean_R = {key: np.mean([resampled[name][key] for name in sets], axis=0) for key in METRICS}
    intervals = {key: np.percentile(values_R, LEVEL).tolist() for key, values_R in mean_R.items()}
    inverted = intervals["auroc"][1] < 0.5 and min(images[name] for name in ("id", *sets)) >= MIN_INVERTED
    return {"metrics": means, "intervals": intervals, "inverted": inverted}


# Compiled: 1,000 resamples of 10,000 + 10,000 scores take 0.1 s; scikit-learn takes 10 ms per resample.
@numba.njit(error_model="numpy")
def _bootstrap(
    id_level_N: np.ndarray, ood_level_M: np.ndarray, id_rows_RN: np.ndarray, ood_rows_RM: np.ndarray, levels: int
) -> np.ndarray:
    metrics_R5 = np.empty((len(id_rows_RN), 5))
    for r in range(len(id_rows_RN)):
        id_count, ood_count = np.zeros(levels, np.int64), np.zeros(levels, np.int64)
        for row in id_rows_RN[r]:
            id_count[id_level_N[row]] += 1
        for row in ood_rows_RM[r]:
            ood_count[ood_level_M[row]] += 1
        n, m = id_rows_RN.shape[1], ood_rows_RM.shape[1]
        auroc = aupr_in = aupr_out = 0.0
        fpr_id = fpr_ood = -1.0
        id_below = ood_below = 0
        for level in range(levels):  # upwards: images at or below the level are predicted as ID
            auroc += ood_count[level] * (id_below + 0.5 * id_count[level])
            id_below += id_count[level]
            ood_below += ood_count[level]
            if id_count[level] > 0:
                aupr_in += id_count[level] * id_below / (id_below + ood_below)
            if fpr_id < 0 and id_below / n >= TPR:
                fpr_id = ood_below / m
        id_above = ood_above = 0
        for level in range(levels - 1, -1, -1):  # downwards: images at or above the level are predicted as OOD
            id_above += id_count[level]
            ood_above += ood_count[level]
            if ood_count[level] > 0:
                aupr_out += ood_count[level] * ood_above / (id_above + ood_above)
            if fpr_ood < 0 and ood_above / m >= TPR:
                fpr_ood = id_above / n
        metrics_R5[r] = auroc / (n * m), aupr_in / n, aupr_out / m, fpr_ood, fpr_id
    return metrics_R5
