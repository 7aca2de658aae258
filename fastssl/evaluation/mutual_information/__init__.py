"""Mutual information of what a network computes, in nats: lower bounds by critics, and bounds from a known q(z|x).

`estimators.py` has the five estimators, of the critic in `critic.py`; `known_q.py` the bounds of a stochastic
embedding. `command.py` is `fastssl eval mi`, `table.py` and `pictures.py` what it shows.
"""

from fastssl.evaluation.mutual_information.estimators import ESTIMATORS, Estimate, estimate
from fastssl.evaluation.mutual_information.evaluate import evaluate_mi
from fastssl.evaluation.mutual_information.known_q import Sandwich, rate, sandwich
from fastssl.evaluation.mutual_information.table import mi_summary_table, mi_table

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "Sandwich",
    "estimate",
    "evaluate_mi",
    "mi_summary_table",
    "mi_table",
    "rate",
    "sandwich",
]
