"""Whether what a run says of its uncertainty is true: `fastssl eval uncertainty`.

    figures.py      does it predict a wrong nearest neighbour, a wrong guess; is a classifier calibrated
    corruptions.py  images made worse at five strengths, and what the encoder makes of them
    command.py      the evaluation of a run
    pictures.py     its curves, and the most and the least certain images

The uncertainty of an image is one number, the larger the less certain: the mean over dimensions of sigma, or where the
encoder gives none, how far away the training images are.
"""

from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS, corrupt
from fastssl.evaluation.uncertainty.evaluate import evaluate_uncertainty
from fastssl.evaluation.uncertainty.measures import (
    aurc,
    e_aurc,
    fit_temperature,
    nearest_is_wrong,
    neighbour_distance,
    r_auroc,
    risk_coverage,
    strength_correlation,
)

__all__ = [
    "CORRUPTIONS",
    "aurc",
    "e_aurc",
    "corrupt",
    "evaluate_uncertainty",
    "fit_temperature",
    "nearest_is_wrong",
    "neighbour_distance",
    "r_auroc",
    "risk_coverage",
    "strength_correlation",
]
