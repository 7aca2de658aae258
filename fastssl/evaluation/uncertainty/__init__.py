"""How well the uncertainty of an encoder predicts mistakes and damaged images: `fastssl eval uncertainty`.

measures.py     wrong nearest neighbors, risk-coverage curves, temperature scaling, correlation with strength
corruptions.py  corrupts images at five strengths, and embeds them
evaluate.py     the evaluation of a run
plots.py        its figures: curves, and the images with the least and the greatest uncertainty

The uncertainty of an image is one number: the mean of sigma over dimensions or, for a deterministic encoder, the
distance to the training images.
"""

from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS, corrupt
from fastssl.evaluation.uncertainty.evaluate import evaluate_uncertainty
from fastssl.evaluation.uncertainty.measures import (
    aurc,
    fit_temperature,
    nearest_is_wrong,
    neighbor_distance,
    r_auroc,
    risk_coverage,
    strength_correlation,
)

__all__ = [
    "CORRUPTIONS",
    "aurc",
    "corrupt",
    "evaluate_uncertainty",
    "fit_temperature",
    "nearest_is_wrong",
    "neighbor_distance",
    "r_auroc",
    "risk_coverage",
    "strength_correlation",
]
