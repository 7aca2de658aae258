"""From a trained encoder to numbers: features of a .beton, then classifiers that see nothing else.

`features.py` extracts and caches, `runs.py` finds the data of a run, `splits.py` draws samples,
`knn.py` and `linear.py` classify, `probe.py` does so during training, `results.py` shows and keeps.
Functions take numpy arrays or torch tensors; accuracies are shares from 0 to 1.
"""

from fastssl.evaluation.features import (
    Features,
    cached_features,
    clean_features,
    extract_features,
)
from fastssl.evaluation.knn import evaluate_knn, few_label_knn, knn_accuracies, knn_accuracy
from fastssl.evaluation.linear import (
    LinearResult,
    evaluate_linear,
    few_label_linear,
    linear_accuracy,
)
from fastssl.evaluation.results import result_table

__all__ = [
    "Features",
    "LinearResult",
    "cached_features",
    "clean_features",
    "evaluate_knn",
    "evaluate_linear",
    "extract_features",
    "few_label_knn",
    "few_label_linear",
    "knn_accuracies",
    "knn_accuracy",
    "linear_accuracy",
    "result_table",
]
