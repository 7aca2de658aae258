"""Evaluate a trained encoder: classifiers on frozen features, fine-tuning, OOD detection, uncertainty, MI.

runs.py      the encoder of a run, and the images that are fitted and tested on; foreign.py: weights from elsewhere
features.py  features of a .beton, cached
knn.py, linear/          classifiers on frozen features
finetune.py, transfer.py   fine-tuning, also on few labels; transfer to other data sets
ood/, uncertainty/, mutual_information/
probe.py     kNN accuracy during training
metrics.py   metrics of logits; splits.py: held-out samples; arrays.py: arrays that need not fit into memory
results.py, tables.py, plots.py   the JSON file of a result, tables, plots

Functions take numpy arrays or torch tensors. Accuracies are shares from 0 to 1.
"""

from fastssl.evaluation.features import Features, cached_features, compute_features, mean_of_draws
from fastssl.evaluation.finetune import evaluate_semisup
from fastssl.evaluation.foreign import load_foreign_encoder
from fastssl.evaluation.knn import evaluate_knn, knn_accuracy, knn_predictions
from fastssl.evaluation.linear import evaluate_linear, fit_lbfgs, fit_reference, fit_sweep
from fastssl.evaluation.metrics import ClassificationResult, classification_metrics
from fastssl.evaluation.results import EvaluationResult
from fastssl.evaluation.runs import BetonSubset, EvaluationData, RunEncoder, find_evaluation_data, load_run_encoder
from fastssl.evaluation.tables import SummaryRow, result_table, summarize_runs, summary_table, write_summary
from fastssl.evaluation.transfer import evaluate_transfer, find_target
from fastssl.evaluation.uncertainty import evaluate_uncertainty

__all__ = [
    "BetonSubset", "ClassificationResult", "EvaluationData", "EvaluationResult", "Features", "RunEncoder", "SummaryRow",
    "cached_features", "classification_metrics", "compute_features", "evaluate_knn", "evaluate_linear",
    "evaluate_semisup", "evaluate_transfer", "evaluate_uncertainty", "find_evaluation_data", "find_target", "fit_lbfgs",
    "fit_reference", "fit_sweep", "knn_accuracy", "knn_predictions", "load_foreign_encoder", "load_run_encoder",
    "mean_of_draws", "result_table", "summarize_runs", "summary_table", "write_summary",
]  # fmt: skip
