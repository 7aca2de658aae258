"""Logistic regression from a few labels a class: nothing is chosen, as there is nothing to choose on."""

from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy
from fastssl.evaluation.splits import balanced_draws

FEW_LABEL_C = 1.0


def few_label_linear(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    labels_per_class: int = 10,
    draws: int = 5,
    seed: int = 0,
) -> list[float]:
    """Test accuracy, 0 to 1, of logistic regression on each of several draws of few labels a class.

    A split of so few samples is too small to choose anything on, so nothing is chosen: it is
    scikit-learn's LogisticRegression with its default C = 1, as in few-shot work (Tian et al.,
    arXiv 2003.11539), on features standardised by mean and deviation of all training features,
    which need no labels. (With 10 labels of each of 8 digits, C from 0.1 to 100 moves the accuracy
    by up to 2 points on standardised features, by up to 14 on features of length 1.) The draws
    depend on labels and seed alone, so they are the same for every encoder.
    """
    # Here, as it takes 1.3 s to import: training's probe needs nothing of it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(as_numpy(train_features))
    train_ND, test_ND = (scaler.transform(as_numpy(x)) for x in (train_features, test_features))
    label_N, test_label_N = as_numpy(train_labels), as_numpy(test_labels)
    accuracies = []
    for rows in balanced_draws(label_N, labels_per_class, draws, seed):
        classifier = LogisticRegression(C=FEW_LABEL_C, max_iter=1000).fit(train_ND[rows], label_N[rows])
        accuracies.append(float(classifier.score(test_ND, test_label_N)))
    return accuracies
