"""Mutual information of what a network computes, in nats: lower bounds by a critic, and bounds from a known q(z|x)."""

from fastssl.evaluation.mutual_information.estimators import ESTIMATORS, Estimate, estimate

__all__ = ["ESTIMATORS", "Estimate", "estimate"]
