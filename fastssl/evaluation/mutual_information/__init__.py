"""Mutual information between an image, h and z, in nats: estimates by critics, and bounds for stochastic embeddings.

estimators.py       the estimators js and mine
critic.py           the critic that they train
gaussian_bounds.py  bounds for a stochastic embedding, whose q(z|x) is known
evaluate.py         `fastssl eval mi`: the evaluation of a run, and its self-checks
plots.py, table.py  its figure and its tables
"""

from fastssl.evaluation.mutual_information.estimators import ESTIMATORS, Estimate, estimate
from fastssl.evaluation.mutual_information.evaluate import evaluate_mi
from fastssl.evaluation.mutual_information.gaussian_bounds import PosteriorBounds, posterior_bounds, rate
from fastssl.evaluation.mutual_information.table import mi_summary_table, mi_table, unreliable_quantities

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "PosteriorBounds",
    "estimate",
    "evaluate_mi",
    "mi_summary_table",
    "mi_table",
    "posterior_bounds",
    "rate",
    "unreliable_quantities",
]
