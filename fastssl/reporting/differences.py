"""Whether a variant differs from its baseline by more than the noise of seeds and of test images.

Both variants are measured on the same test images, and with the same seeds where they share some. So differences are
taken image by image and seed by seed, and what both have in common, such as a hard image, does not count as noise.

The squared standard error of a mean difference is the variance over seeds / seeds + the variance over images / images.
A bootstrap that resamples pairs of both has the same error in its limit, but percentiles over three seeds would be too
narrow. So the interval is that of Student's t, with the degrees of freedom of Satterthwaite (1946). In
simulations, equal variants are then called different in 5 to 7 % of the cases.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.95  # of intervals; differences count where the p-value is below 1 - LEVEL


class Difference(NamedTuple):
    """The mean over seeds of variant - baseline."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, of no difference
    seeds: int  # pairs
    images: int  # test images whose outcomes were compared; 0: only the seeds' values were


def mean_difference(values_S2: np.ndarray, images_P: Sequence[np.ndarray]) -> Difference | None:
    """Compare two variants with the same seeds.

    Args:
        values_S2: the metric of both variants for each seed.
        images_P: for each kind of images, such as ID and OOD, float (images,): the difference that each image
            contributes, as a mean over the seeds. The metric's difference is the mean over images, added over kinds.

    Returns None for fewer than two seeds: the noise of training is then unknown.
    """
    seeds = len(values_S2)
    if seeds < 2:
        return None
    difference_S = values_S2[:, 0] - values_S2[:, 1]
    # Variances of the mean, and their degrees of freedom.
    noise = [(difference_S.var(ddof=1) / seeds, seeds - 1)]
    noise += [(image_M.var(ddof=1) / len(image_M), len(image_M) - 1) for image_M in images_P if len(image_M) > 1]
    variance = sum(part for part, _ in noise)
    mean = float(difference_S.mean())
    images = sum(len(image_M) for image_M in images_P)
    if variance == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, seeds, images)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in noise)
    error = math.sqrt(variance)
    reach = float(student_t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(student_t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p, seeds, images)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm, 1979), in their order.

    Reporting every adjusted value below 5 % reports any false difference in at most 5 % of such tables.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def placements(id_N: np.ndarray, ood_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what each ID and each OOD image contributes to the AUROC of scores, (N,) and (M,); the mean of both is it.

    An ID image's is the share of OOD images with a larger score, equal ones by half (DeLong, DeLong and
    Clarke-Pearson, 1988).
    """

    def share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
        ordered = np.sort(others)
        below = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
        return below / (2 * len(others))

    return 1 - share_below(id_N, ood_M), share_below(ood_M, id_N)
