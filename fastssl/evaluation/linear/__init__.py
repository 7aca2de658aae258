"""Linear classifiers on frozen features, by three protocols. None of them is ever shown a test set.

reference.py   the published code's: one rate, one schedule, nothing chosen
sweep.py       many rates and weight decays at once, chosen on held-out training images
lbfgs.py       logistic regression to its optimum, the penalty chosen on held-out training images
few_labels.py  a few labels a class, for the demo
classifier.py  what they give
batches.py     features that need not fit into memory
command.py     the evaluation of a run
"""

from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit
from fastssl.evaluation.linear.evaluate import PROTOCOLS, Protocol, evaluate_linear, fit_and_score, linear_settings
from fastssl.evaluation.linear.few_labels import few_label_linear
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.linear.reference import SCHEDULES, fit_reference
from fastssl.evaluation.linear.sweep import fit_sweep

__all__ = [
    "PROTOCOLS",
    "SCHEDULES",
    "LinearFit",
    "LinearClassifier",
    "Protocol",
    "evaluate_linear",
    "few_label_linear",
    "fit_and_score",
    "fit_lbfgs",
    "fit_reference",
    "fit_sweep",
    "linear_settings",
]
