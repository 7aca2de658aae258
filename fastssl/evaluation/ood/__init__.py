"""Out-of-distribution detection: scores of images, how well they separate data sets, and the evaluation of a run.

detectors.py    the detectors by name: label_free.py, label_based.py; base.py is what they share
gaussians.py    covariances in float64; nearest.py the k-th nearest by several distances
separation.py   AUROC and others of two sets of scores, with resamples
suites.py       the data sets of an evaluation, OpenOOD's among them
command.py      the evaluation of a run; pictures.py, table.py what is shown of it
"""

from fastssl.evaluation.ood.base import Detector
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, LABEL_FREE, detector
from fastssl.evaluation.ood.evaluate import evaluate_ood
from fastssl.evaluation.ood.separation import metrics
from fastssl.evaluation.ood.suites import SUITES, Sets, find_sets
from fastssl.evaluation.ood.table import ood_summary_table, ood_table

__all__ = [
    "DETECTORS",
    "LABEL_BASED",
    "LABEL_FREE",
    "SUITES",
    "Detector",
    "Sets",
    "detector",
    "evaluate_ood",
    "find_sets",
    "metrics",
    "ood_summary_table",
    "ood_table",
]
