"""The accuracies that the demo shows."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fastssl.demo import DRAWS, LABELS_PER_CLASS, few_label_accuracy
from fastssl.evaluation import Features, knn_accuracy
from fastssl.evaluation.splits import balanced_subsets


def test_few_label_accuracy_use_the_drawn_samples_only():
    rng = np.random.default_rng(0)
    labels = np.array([1, 4, 6])
    center = rng.normal(size=(3, 20))

    def features(count):
        class_N = rng.integers(3, size=count)
        h = ((center[class_N] + rng.normal(size=(count, 20))) * np.geomspace(0.01, 100, 20)).astype(np.float32)
        return Features(h, labels[class_N], np.arange(count))

    train, val = features(500), features(200)
    knn, linear = few_label_accuracy(train, val)
    subsets = balanced_subsets(train.label, LABELS_PER_CLASS, DRAWS, 0)
    each = [knn_accuracy(train.h[rows], train.label[rows], val.h, val.label) for rows in subsets]
    assert knn == pytest.approx(np.mean(each)) and len(set(each)) > 1
    x, x_val = ((x - train.h.mean(0)) / train.h.std(0) for x in (train.h, val.h))
    fits = [LogisticRegression(C=1.0, max_iter=1000).fit(x[rows], train.label[rows]) for rows in subsets]
    # float32 features standardized in another way: one of 200 test samples may sit on the border
    assert linear == pytest.approx(np.mean([fit.score(x_val, val.label) for fit in fits]), abs=0.005)
