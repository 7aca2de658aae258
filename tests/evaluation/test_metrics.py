"""Classification metrics against scikit-learn and torchmetrics, and their intervals against theory."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from fastssl.evaluation import metrics
from fastssl.evaluation.metrics import accuracy_interval, classification_metrics


def random_data(seed, samples=700, classes=12, skew=True):
    """Logits that are right about half the time; classes of very different sizes, each with samples."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, classes + 1) ** 2.0 if skew else np.ones(classes)
    label = np.concatenate([np.arange(classes), rng.choice(classes, samples - classes, p=share / share.sum())])
    logits = rng.normal(size=(samples, classes)).astype(np.float32)
    logits[np.arange(samples), label] += rng.normal(1.5, 1, samples).astype(np.float32)
    return logits, label


# Everything is computed in float64 here and there; torchmetrics computes in float32.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("skew", [True, False])
def test_equals_scikit_learn_and_torchmetrics(seed, skew):
    logits, label = random_data(seed, skew=skew)
    classes = np.arange(12)
    found = classification_metrics(logits, label, classes).metrics
    guess, probability = logits.argmax(axis=1), torch.from_numpy(logits).double().softmax(dim=1).numpy()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(label, guess), abs=1e-12)
    assert found["accuracy_top5"] == pytest.approx(sk.top_k_accuracy_score(label, logits, k=5), abs=1e-12)
    assert found["accuracy_macro"] == pytest.approx(sk.balanced_accuracy_score(label, guess), abs=1e-12)
    assert found["nll"] == pytest.approx(sk.log_loss(label, probability), abs=1e-9)

    ours = [torch.from_numpy(x) for x in (probability, label)]
    assert found["ece"] == pytest.approx(
        multiclass_calibration_error(*ours, num_classes=12, n_bins=15, norm="l1").item(), abs=1e-6
    )
    assert found["accuracy_macro"] == pytest.approx(
        multiclass_accuracy(*ours, num_classes=12, average="macro").item(), abs=1e-6
    )
    scores = classification_metrics(torch.from_numpy(logits), torch.from_numpy(label), classes)
    assert scores.metrics == found
    np.testing.assert_array_equal(scores.confusion_KK, sk.confusion_matrix(label, guess))


def test_columns_may_have_any_labels_and_chunks_change_nothing(monkeypatch):
    logits, label = random_data(5)
    names = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37])
    plain = classification_metrics(logits, label, np.arange(12))
    named = classification_metrics(logits, names[label], names)
    assert plain.metrics == named.metrics and plain.intervals == named.intervals
    np.testing.assert_array_equal(named.label_K, names)
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 50)
    assert classification_metrics(logits, label, np.arange(12)).metrics == plain.metrics


def test_a_class_without_a_column_is_an_error_but_not_in_nll():
    logits, label = random_data(6, classes=4)
    foreign = np.concatenate([label, [9, 9]])
    logits = np.concatenate([logits, logits[:2]])
    known, all_ = (classification_metrics(logits[:n], foreign[:n], np.arange(4)) for n in (700, 702))
    assert "accuracy_top5" not in known.metrics
    assert all_.metrics["accuracy"] == pytest.approx(known.metrics["accuracy"] * 700 / 702)
    assert all_.metrics["accuracy_macro"] == pytest.approx(known.metrics["accuracy_macro"] * 4 / 5)
    assert all_.metrics["nll"] == pytest.approx(known.metrics["nll"])
    assert all_.confusion_KK.sum() == 702 and all_.confusion_KK[4].sum() == 2 and all_.confusion_KK[:, 4].sum() == 0
    only = classification_metrics(logits[-2:], foreign[-2:], np.arange(4))
    assert only.metrics["accuracy"] == 0 and "nll" not in only.metrics and "nll" not in only.intervals


def test_of_equal_logits_the_first_columns_are_guessed():
    logits = np.zeros((3, 8))
    found = classification_metrics(logits, np.array([0, 4, 5]), np.arange(8)).metrics
    assert found["accuracy"] == pytest.approx(1 / 3) and found["accuracy_top5"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(np.log(8))


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_bin():
    """As in arXiv 1706.04599: bins (0, 1/15], (1/15, 2/15], ... Ten guesses at 3/15, three right; two above, wrong."""
    share = np.array([0.2] * 10 + [0.21] * 2)
    probability = np.stack([share, *[(1 - share) / 8] * 8], axis=1)
    label = np.array([0] * 3 + [1] * 9)
    found = classification_metrics(np.log(probability), label, np.arange(9)).metrics["ece"]
    assert found == pytest.approx((10 * abs(0.3 - 0.2) + 2 * abs(0 - 0.21)) / 12, abs=1e-9)


def test_a_class_that_a_resample_misses_does_not_count_in_macro_accuracy():
    """One of fifty samples has class 1. All are right, with it and without it."""
    logits = np.zeros((50, 2))
    logits[:, 0], logits[-1] = 1, (0, 1)
    label = np.array([0] * 49 + [1])
    assert classification_metrics(logits, label, np.arange(2)).intervals["accuracy_macro"] == (1.0, 1.0)


def test_huge_logits_stay_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    found = classification_metrics(logits, np.array([0, 0]), np.arange(2)).metrics
    assert found["nll"] == pytest.approx(1e4) and found["ece"] == pytest.approx(0.5)


def test_intervals_are_those_of_the_bootstrap():
    """That of a share is binomial, with a Monte Carlo error of about 1.5 steps for a percentile of 1,000 resamples."""
    logits, label = random_data(7)
    scores = classification_metrics(logits, label, np.arange(12), seed=3)
    accuracy = scores.metrics["accuracy"]
    exact = np.array(stats.binom(700, accuracy).ppf([0.025, 0.975])) / 700
    np.testing.assert_allclose(scores.intervals["accuracy"], exact, atol=4 / 700)
    np.testing.assert_allclose(accuracy_interval(logits.argmax(axis=1) == label), exact, atol=2 / 700)
    for name, (low, high) in scores.intervals.items():
        assert low < scores.metrics[name] < high or name == "ece", name  # resampling adds to a calibration error
    assert classification_metrics(logits, label, np.arange(12), seed=3).intervals == scores.intervals
    assert classification_metrics(logits, label, np.arange(12), seed=4).intervals != scores.intervals
    # The loss's is close to the normal one, mean +- 1.96 standard errors.
    probability = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    loss = -probability[np.arange(700), label]
    half = 1.96 * loss.std() / np.sqrt(700)
    np.testing.assert_allclose(scores.intervals["nll"], [loss.mean() - half, loss.mean() + half], atol=0.15 * half)
