"""Out-of-distribution (OOD) detection: scores of images, and how well they separate data sets.

base.py         Detector, the base class, which checks and converts the arrays that a detector needs
label_free.py   detectors that need no labels
label_based.py  detectors that use labels
detectors.py    the table of detectors by name
distances.py    Mahalanobis distance and k-th nearest neighbor, shared by several detectors
layers.py       the intermediate layers of an encoder, cached
jacobian.py     the singular values of its Jacobian, cached
separation.py   AUROC and other metrics of two sets of scores, with bootstrap resamples
suites.py       the data sets of an evaluation, including those of OpenOOD
evaluate.py     `fastssl eval ood`: the evaluation of a run
plots.py        its figures
table.py        its tables

To add a detector:
1. Write a subclass of `Detector` in label_free.py or label_based.py. The parameters of its `_score`, and of its `_fit`
   if it has one, name the arrays that it needs. Its docstring has the formula, the source and "Higher is OOD".
2. Add one line to LABEL_FREE or LABEL_BASED in detectors.py.
3. Compute arrays that only it needs in `detector_arrays` of evaluate.py and in embed/score.py.
4. Add its formula in NumPy for one image to ORACLES in tests/evaluation/test_ood.py, and a row to docs/ood.md.
"""

from fastssl.evaluation.ood.base import Detector, LinearHead
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, LABEL_FREE, OWN_UNCERTAINTY, detector
from fastssl.evaluation.ood.evaluate import evaluate_ood
from fastssl.evaluation.ood.separation import metrics
from fastssl.evaluation.ood.sheet import draw_ood_sheet
from fastssl.evaluation.ood.suites import SUITES, OODSets, find_sets
from fastssl.evaluation.ood.table import ood_summary, ood_summary_table, ood_table, save_ood_table, summarized_detectors

__all__ = [
    "DETECTORS",
    "LABEL_BASED",
    "LABEL_FREE",
    "OWN_UNCERTAINTY",
    "SUITES",
    "Detector",
    "LinearHead",
    "OODSets",
    "detector",
    "draw_ood_sheet",
    "evaluate_ood",
    "find_sets",
    "metrics",
    "ood_summary",
    "ood_summary_table",
    "ood_table",
    "save_ood_table",
    "summarized_detectors",
]
