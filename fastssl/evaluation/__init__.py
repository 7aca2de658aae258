"""From a trained encoder to numbers: features of a .beton, then classifiers that see nothing else; or fine-tuning.

`runs.py` finds encoder and data of a run, `features.py` extracts and caches, `splits.py` draws samples. `knn.py` and
`linear/` classify frozen features, `finetune.py` trains the encoder too, for `semisup.py` and `transfer.py`.
`metrics.py` turns logits into figures, `results.py` keeps and shows them; `probe.py` looks on during training.
Functions take numpy arrays or torch tensors; accuracies are shares from 0 to 1.
"""

from fastssl.evaluation.features import Features, cached_features, compute_features, mean_of_draws
from fastssl.evaluation.knn import evaluate_knn, knn_accuracy, knn_predictions
from fastssl.evaluation.linear import evaluate_linear, fit_lbfgs, fit_reference, fit_sweep
from fastssl.evaluation.metrics import ClassificationResult, classification_metrics
from fastssl.evaluation.results import EvaluationResult
from fastssl.evaluation.runs import BetonSubset, EvaluationData, RunEncoder, find_evaluation_data, load_run_encoder
from fastssl.evaluation.semisup import evaluate_semisup
from fastssl.evaluation.tables import SummaryRow, result_table, summarize_runs, summary_table, write_summary
from fastssl.evaluation.transfer import evaluate_transfer, find_target
from fastssl.evaluation.uncertainty import evaluate_uncertainty

__all__ = [
    "BetonSubset",
    "EvaluationData",
    "EvaluationResult",
    "RunEncoder",
    "SummaryRow",
    "Features",
    "ClassificationResult",
    "cached_features",
    "classification_metrics",
    "compute_features",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_semisup",
    "evaluate_transfer",
    "evaluate_uncertainty",
    "load_run_encoder",
    "find_evaluation_data",
    "find_target",
    "fit_lbfgs",
    "fit_reference",
    "fit_sweep",
    "knn_accuracy",
    "knn_predictions",
    "mean_of_draws",
    "result_table",
    "summarize_runs",
    "summary_table",
    "write_summary",
]
