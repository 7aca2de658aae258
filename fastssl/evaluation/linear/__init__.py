"""Linear classifiers on frozen features, by three protocols. None of them ever receives a test set.

sweep.py       many learning rates and weight decays in parallel, the best chosen on held-out training samples
reference.py   the protocol of the published code: one learning rate, one schedule, nothing chosen
lbfgs.py       logistic regression to its optimum, the penalty chosen on held-out training samples
classifier.py  what all three return
evaluate.py    `fastssl eval linear`: one protocol on the features of a run
"""

from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit
from fastssl.evaluation.linear.evaluate import PROTOCOLS, Protocol, evaluate_linear, fit_and_test, linear_settings
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.linear.reference import SCHEDULES, fit_reference
from fastssl.evaluation.linear.sweep import fit_sweep

__all__ = [
    "PROTOCOLS", "SCHEDULES", "LinearClassifier", "LinearFit", "Protocol", "evaluate_linear", "fit_and_test",
    "fit_lbfgs", "fit_reference", "fit_sweep", "linear_settings",
]  # fmt: skip
