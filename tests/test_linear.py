"""The swept linear classifier and the few-label one, against torch's optimiser and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastssl.evaluation import few_label_linear, linear, linear_accuracy
from fastssl.evaluation.linear import train_heads
from fastssl.evaluation.splits import balanced_draws, stratified_holdout
from fastssl.recipe import UserError

LABELS = np.array([1, 4, 6])


def gaussians(count, *, seed, distance=1.0, dim=20):
    """Three classes with a common, badly scaled covariance: no classifier beats a linear one."""
    shape = np.random.default_rng(0)
    centre = distance * shape.normal(size=(len(LABELS), dim)) / np.sqrt(2)
    mix = shape.normal(size=(dim, dim)) * np.geomspace(0.01, 100, dim)
    rng = np.random.default_rng(seed)
    cls = rng.integers(len(LABELS), size=count)
    return ((centre[cls] + rng.normal(size=(count, dim))) @ mix + 3).astype(np.float32), LABELS[cls]


def test_side_by_side_training_equals_torch_one_by_one():
    x, y = gaussians(70, seed=1)
    lrs, epochs = (0.01, 0.3), 4
    heads = train_heads(torch.from_numpy(x), torch.from_numpy(y), lrs, epochs=epochs, batch_size=16, seed=3)
    inputs = torch.from_numpy((x - x.mean(0)) / x.std(0))
    target = torch.from_numpy(np.searchsorted(LABELS, y))
    for h, lr in enumerate(lrs):
        model = torch.nn.Linear(x.shape[1], len(LABELS))
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 5)  # 70 / 16: 5 batches
        generator = torch.Generator().manual_seed(3)
        for _ in range(epochs):
            for batch in torch.randperm(70, generator=generator).split(16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs[batch]), target[batch]).backward()
                optimizer.step()
                schedule.step()
        expected = torch.cat([model.weight, model.bias[:, None]], dim=1)
        # 20 steps in float32, whose sums are in another order
        torch.testing.assert_close(heads.weight_HCE[h], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("distance", "low", "high"), [(4.0, 0.98, 1.0), (0.5, 0.6, 0.95)])
def test_reaches_logistic_regression(distance, low, high):
    train, test = (
        gaussians(3000, seed=1, distance=distance),
        gaussians(3000, seed=2, distance=distance),
    )
    scale = lambda x: (x - train[0].mean(0)) / train[0].std(0)  # noqa: E731
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(scale(train[0]), train[1]).score(scale(test[0]), test[1])
    assert low <= reference <= high
    result = linear_accuracy(*train, *test, epochs=30)
    # Both are near the best linear rule; two estimates of it differ on under 1% of the samples.
    assert result.accuracy == pytest.approx(reference, abs=0.01)


def test_the_test_set_never_touches_the_choice():
    train, test = gaussians(600, seed=3), gaussians(300, seed=4)
    honest = linear_accuracy(*train, *test, epochs=5)
    poisoned_labels = LABELS[(np.searchsorted(LABELS, test[1]) + 1) % 3]
    for poisoned in (
        (test[0], poisoned_labels),
        (test[0] * 1e3 - 7, test[1]),
        (test[0][:10], test[1][:10]),
    ):
        result = linear_accuracy(*train, *poisoned, epochs=5)
        assert result.lr == honest.lr
        assert result.selection_accuracies == honest.selection_accuracies
        assert torch.equal(result.heads.weight_HCE, honest.heads.weight_HCE)
        assert torch.equal(result.heads.mean_D, honest.heads.mean_D)
        assert result.accuracy != honest.accuracy


def test_the_choice_is_made_on_samples_that_were_not_fitted():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(400, 500)).astype(np.float32), rng.integers(2, size=400)
    result = linear_accuracy(x, y, x, y, epochs=30, lrs=(0.1, 0.5))
    assert result.accuracy > 0.99  # more dimensions than samples: random labels can be learnt by heart
    # 40 held-out coin tosses: 0.5 within three standard deviations of 0.079
    assert max(result.selection_accuracies.values()) < 0.5 + 3 * 0.079
    assert result.held_out == 40
    assert result.selection_accuracy == max(result.selection_accuracies.values())
    assert result.selection_accuracies[result.lr] == result.selection_accuracy


def test_of_equal_rates_the_lower_cross_entropy_wins():
    train, test = gaussians(600, seed=6, distance=20.0), gaussians(100, seed=7, distance=20.0)
    result = linear_accuracy(*train, *test, epochs=2, lrs=(1e-3, 1e-2, 1e-1))
    assert set(result.selection_accuracies.values()) == {1.0}
    assert result.lr == 1e-1  # with classes so far apart, the largest margin


def test_scale_and_dead_features_do_not_matter():
    train, test = gaussians(600, seed=8), gaussians(300, seed=9)
    plain = linear_accuracy(*train, *test, epochs=5)
    other = [np.concatenate([256 * x, np.full((len(x), 2), 3.3, np.float32)], axis=1) for x in (train[0], test[0])]
    scaled = linear_accuracy(other[0], train[1], other[1], test[1], epochs=5)
    assert scaled.lr == plain.lr
    assert scaled.accuracy == pytest.approx(plain.accuracy, abs=1e-6)


def test_an_unseen_class_is_an_error_and_tensors_are_taken():
    train, test = gaussians(300, seed=10), gaussians(100, seed=11)
    plain = linear_accuracy(*train, *test, epochs=3)
    assert linear_accuracy(*map(torch.from_numpy, (*train, *test)), epochs=3).accuracy == plain.accuracy
    unseen = np.where(np.arange(100) < 50, 99, test[1])
    assert linear_accuracy(*train, test[0], unseen, epochs=3).accuracy <= 0.5


def test_evaluating_in_chunks_changes_nothing(monkeypatch):
    train, test = gaussians(300, seed=12), gaussians(101, seed=13)
    heads = train_heads(*map(torch.from_numpy, train), (0.01, 0.1), epochs=2, batch_size=64, seed=0)
    whole = heads.evaluate(*map(torch.from_numpy, test))
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 21 * 10)
    chunked = heads.evaluate(*map(torch.from_numpy, test))
    assert chunked[0] == whole[0]
    assert chunked[1] == pytest.approx(whole[1], rel=1e-6)


def test_a_training_set_of_single_samples_is_refused():
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="no class has two"):
        linear_accuracy(x, np.arange(4), x, np.arange(4))


def test_the_holdout_takes_a_tenth_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [1000, 50, 2, 1])
    np.random.default_rng(0).shuffle(labels)
    fit, held = stratified_holdout(labels, 0.1, seed=0)
    assert sorted([*fit, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=4).tolist() == [100, 5, 1, 0]
    assert np.array_equal(held, stratified_holdout(torch.from_numpy(labels), 0.1, seed=0)[1])
    assert not np.array_equal(held, stratified_holdout(labels, 0.1, seed=1)[1])


def test_draws_are_balanced_reproducible_and_different():
    labels = np.random.default_rng(0).choice(LABELS, 300)
    draws = balanced_draws(labels, 10, 5, 0)
    for rows in draws:
        assert len(set(rows)) == 30
        assert [(labels[rows] == c).sum() for c in LABELS] == [10, 10, 10]
    assert len({rows.tobytes() for rows in draws}) == 5
    again = balanced_draws(torch.from_numpy(labels), 10, 3, 0)  # fewer draws: the same first ones
    assert all(np.array_equal(a, b) for a, b in zip(draws[:3], again, strict=True))
    assert not np.array_equal(draws[0], balanced_draws(labels, 10, 1, 1)[0])
    with pytest.raises(UserError, match="fewer than the 500 labels"):
        balanced_draws(labels, 500, 1, 0)


def test_few_labels_is_scikit_learn_on_the_drawn_samples():
    train, test = gaussians(500, seed=14), gaussians(200, seed=15)
    found = few_label_linear(*train, *test, labels_per_class=10, draws=3, seed=2)
    scale = lambda x: (x - train[0].mean(0)) / train[0].std(0)  # noqa: E731
    for rows, accuracy in zip(balanced_draws(train[1], 10, 3, 2), found, strict=True):
        reference = LogisticRegression(C=1.0, max_iter=1000).fit(scale(train[0])[rows], train[1][rows])
        # float32 features scaled twice: one of 200 test samples may sit on the border
        assert accuracy == pytest.approx(reference.score(scale(test[0]), test[1]), abs=0.005)
    assert found == few_label_linear(*map(torch.from_numpy, (*train, *test)), draws=3, seed=2)
