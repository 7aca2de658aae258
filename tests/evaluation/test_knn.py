"""The weighted kNN against a per-sample oracle in plain Python and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastssl.evaluation import knn, knn_accuracy, knn_predictions

LABELS = np.array([2, 3, 7, 11])  # neither from zero nor without gaps


def blobs(count, *, seed, dim=16, spread=1.5):
    """Overlapping classes, so that k, the weights and the temperature all change some decisions."""
    center = np.random.default_rng(0).normal(size=(len(LABELS), dim))
    rng = np.random.default_rng(seed)
    cls = rng.integers(len(LABELS), size=count)
    return (center[cls] + spread * rng.normal(size=(count, dim))).astype(np.float32), LABELS[cls]


def oracle(train_x, train_y, query, k, temperature):
    """The class of one sample, as the protocol is written, in float64.

    All weights have the factor exp(-1 / temperature), which changes no decision and keeps small temperatures finite.
    """

    def cosine(a, b):
        dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
        return dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))

    similarity = [cosine(query, x) for x in train_x]
    nearest = sorted(range(len(train_x)), key=lambda i: -similarity[i])[:k]
    votes = {}
    for i in nearest:
        votes[train_y[i]] = votes.get(train_y[i], 0.0) + math.exp((similarity[i] - 1) / temperature)
    return max(sorted(votes), key=votes.get)


# Random floats: no two similarities or votes are closer than float32 can tell, so all must agree.
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_a_brute_force_oracle(temperature):
    train_x, train_y = blobs(120, seed=1)
    test_x, _ = blobs(60, seed=2)
    found = knn_predictions(train_x, train_y, test_x, ks=(1, 5, 20, 120), temperatures=(temperature,))
    for (k, _), guess in found.items():
        expected = [oracle(train_x, train_y, query, k, temperature) for query in test_x]
        assert guess.tolist() == expected, k


@pytest.mark.parametrize("k", [1, 20, 200])
def test_equals_scikit_learn_with_the_same_weights(k):
    train_x, train_y = blobs(1000, seed=3)
    test_x, test_y = blobs(500, seed=4)
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(train_x.astype(np.float64), train_y)
    (guess,) = knn_predictions(train_x, train_y, test_x, ks=(k,), temperatures=(0.07,)).values()
    np.testing.assert_array_equal(guess, reference.predict(test_x.astype(np.float64)))
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=k) == pytest.approx(
        reference.score(test_x.astype(np.float64), test_y)
    )


def test_one_near_neighbor_outweighs_two_far_ones():
    angle = np.array([0.1, 0.9, 0.9])
    bank = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    query = np.array([[3.0, 0.0]])  # its length must not matter
    assert knn_accuracy(bank, np.array([5, 8, 8]), query, [5], k=3, temperature=0.07) == 1.0
    # A high temperature makes the votes equal, and the majority wins.
    assert knn_accuracy(bank, np.array([5, 8, 8]), query, [8], k=3, temperature=100.0) == 1.0


def test_all_ks_and_temperatures_in_one_pass_equal_one_at_a_time_in_chunks(monkeypatch):
    train_x, train_y = blobs(300, seed=5)
    test_x, _ = blobs(101, seed=6)
    ks, temperatures, told = (200, 1, 20), (0.05, 1.0), []
    together = knn_predictions(train_x, train_y, test_x, ks=ks, temperatures=temperatures, advance=told.append)
    assert len({tuple(guess.tolist()) for guess in together.values()}) > 3 and told == [300]
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 64 * 7)  # 7 test samples at a time, 3 at the end
    monkeypatch.setattr(knn, "BANK_ROWS", 64)  # fewer than the largest k
    for k in ks:
        for temperature in temperatures:
            alone = knn_predictions(train_x, train_y, test_x, ks=(k,), temperatures=(temperature,))
            assert torch.equal(alone[k, temperature], together[k, temperature]), (k, temperature)


def test_the_bank_may_be_a_memory_map(tmp_path):
    train_x, train_y = blobs(300, seed=5)
    test_x, test_y = blobs(101, seed=6)
    np.save(tmp_path / "bank.npy", train_x)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert knn_accuracy(mapped, train_y, test_x, test_y) == knn_accuracy(train_x, train_y, test_x, test_y)


def test_nearly_parallel_features_are_told_apart():
    """Cosines within 1e-7 of 1, as early in training: in float32 all of them are ties."""
    train_x, train_y = blobs(300, seed=14)
    test_x, _ = blobs(50, seed=15)
    train_x, test_x = (np.float32(100) + np.float32(0.01) * x for x in (train_x, test_x))
    found = knn_predictions(train_x, train_y, test_x, ks=(20, 200), temperatures=(1e-7,))
    assert found[20, 1e-7].tolist() == [oracle(train_x, train_y, query, 20, 1e-7) for query in test_x]


def test_arrays_and_tensors_of_any_float_type_are_accepted():
    train_x, train_y = blobs(300, seed=7)
    test_x, test_y = blobs(100, seed=8)
    expected = knn_accuracy(train_x, train_y, test_x, test_y)
    tensors = [torch.from_numpy(a) for a in (train_x, train_y, test_x, test_y)]
    assert knn_accuracy(*tensors) == expected
    assert knn_accuracy(train_x.astype(np.float64), train_y, tensors[2], test_y.astype(np.int32)) == expected
    # Half precision moves similarities by 1e-3: a few of 100 close calls may fall otherwise.
    half = knn_accuracy(tensors[0].half(), tensors[1], tensors[2].half(), tensors[3])
    assert half == pytest.approx(expected, abs=0.03)


def test_with_a_k_above_the_bank_all_samples_vote():
    (train_x, train_y), (test_x, _) = blobs(30, seed=9), blobs(100, seed=10)
    found = knn_predictions(train_x, train_y, test_x, ks=(30, 1000), temperatures=(0.07,))
    assert torch.equal(found[30, 0.07], found[1000, 0.07])


def test_equal_votes_go_to_the_smallest_label():
    bank = np.array([[1.0, 1.0], [1.0, -1.0]])
    for labels in ([4, 9], [9, 4]):
        assert knn_accuracy(bank, np.array(labels), np.array([[1.0, 0.0]]), [4], k=2) == 1.0


def test_an_unseen_class_is_an_error_and_a_tiny_temperature_does_not_overflow():
    train_x, train_y = blobs(200, seed=11)
    assert knn_accuracy(train_x, train_y, train_x, np.full(200, 99)) == 0.0
    # Here exp(similarity / T) itself is infinite in float32; the nearest sample decides alone.
    assert knn_accuracy(train_x, train_y, train_x, train_y, temperature=1e-3) == 1.0
