"""The three linear protocols against torch.optim and scikit-learn, features in files, and splits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from fastssl.common.errors import UserError
from fastssl.evaluation import arrays, fit_lbfgs, fit_reference, fit_sweep
from fastssl.evaluation.arrays import ShuffledBatches, mean_and_std
from fastssl.evaluation.linear import SCHEDULES, lbfgs, sweep
from fastssl.evaluation.linear.sweep import SgdSettings, train_stacked
from fastssl.evaluation.splits import balanced_subsets, stratified_holdout

LABELS = np.array([1, 4, 6])


def gaussians(count, *, seed, distance=1.0, dim=20):
    """Three classes with a common, badly scaled covariance: no classifier beats a linear one."""
    shape = np.random.default_rng(0)
    center = distance * shape.normal(size=(len(LABELS), dim)) / np.sqrt(2)
    mix = shape.normal(size=(dim, dim)) * np.geomspace(0.01, 100, dim)
    rng = np.random.default_rng(seed)
    cls = rng.integers(len(LABELS), size=count)
    return ((center[cls] + rng.normal(size=(count, dim))) @ mix + 3).astype(np.float32), LABELS[cls]


def accuracy(fitted, x, y):
    return float((fitted.classifier.class_C[fitted.classifier.logits(x).argmax(1)].numpy() == y).mean())


def weights(fitted):
    return torch.cat([fitted.classifier.weight_CD, fitted.classifier.bias_C[:, None]], dim=1)


# --- features in chunks and batches ------------------------------------------------------------------


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of 64 rows of 8 float32 numbers, read in blocks of 8."""
    monkeypatch.setattr(arrays, "GROUP_BYTES", {"cpu": 64 * 8 * 4})
    monkeypatch.setattr(arrays, "BLOCK_ROWS", 8)


def test_every_row_comes_once_per_epoch_in_a_new_order(small_groups):
    x = np.arange(300 * 8, dtype=np.float32).reshape(300, 8)
    rows = np.flatnonzero(np.arange(300) % 7)
    made = ShuffledBatches(x, rows, 16, seed=1, device="cpu")
    epochs = [list(made.epoch()) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(made) and [len(r) for r, _ in epoch[:-1]] == [16] * (len(made) - 1)
        seen = np.concatenate([r for r, _ in epoch])
        assert sorted(seen) == rows.tolist() and seen.tolist() != rows.tolist()
        for r, x_BD in epoch:
            np.testing.assert_array_equal(x_BD, x[r.numpy()])
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])
    again = list(ShuffledBatches(x, rows, 16, seed=1, device="cpu").epoch())
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(again, epochs[0], strict=True))


class Watched:
    """A memory map that records how many rows are read at a time."""

    def __init__(self, mapped):
        self.mapped, self.shape, self.largest = mapped, mapped.shape, 0

    def __len__(self):
        return len(self.mapped)

    def __getitem__(self, rows):
        part = self.mapped[rows]
        self.largest = max(self.largest, len(part))
        return part


FITS = {
    "sweep": lambda features, y: fit_sweep(features, y, epochs=2, lrs=(0.1, 1.0)),
    "lbfgs": lambda features, y: fit_lbfgs(features, y, penalties=(1e-1, 1e-2)),
    "reference": lambda features, y: fit_reference(features, y, schedule="flowers102"),
}


@pytest.mark.parametrize("protocol", FITS)
def test_a_memory_map_is_read_in_groups_and_gives_the_same_numbers(protocol, small_groups, tmp_path):
    """Bit for bit the same classifiers, with at most one group in memory."""
    x, y = gaussians(500, seed=1, dim=8)
    x = x.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = Watched(np.load(tmp_path / "x.npy", mmap_mode="r"))
    ours, theirs = FITS[protocol](mapped, y), FITS[protocol](x, y)
    assert torch.equal(weights(ours), weights(theirs)) and ours.candidates == theirs.candidates
    assert torch.equal(ours.classifier.logits(mapped), theirs.classifier.logits(x))
    assert 0 < mapped.largest <= 128  # a group of 64 rows of float32 are 128 of float16


def test_chunks_are_smaller_with_many_classes(small_groups):
    x = np.zeros((300, 8), np.float32)
    assert [len(part) for part in arrays.read_in_chunks(x, np.arange(60), "cpu")] == [32, 28]
    assert {len(part) for part in arrays.read_in_chunks(x, np.arange(60), "cpu", classes=64)} == {4}


@pytest.mark.parametrize("protocol", FITS)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_features_of_the_caller_do_not_change(protocol, kind):
    """Chunks are changed in place, so those of float64 features must be copies."""
    x, y = gaussians(100, seed=2)
    features = kind(x.astype(np.float64))
    FITS[protocol](features, y).classifier.logits(features)
    np.testing.assert_array_equal(features, x)


LIMITED = """
import resource, sys
import numpy as np
from fastssl.evaluation import fit_lbfgs, fit_sweep
from fastssl.evaluation import arrays
from fastssl.evaluation.linear import sweep

arrays.GROUP_BYTES, sweep.CHUNK_ELEMENTS = {"cpu": 1 << 24}, 1 << 22
mapped, label = np.load(sys.argv[1], mmap_mode="r"), np.arange(1 << 19) % 2
fit_sweep(np.ones((256, 8), np.float32), label[:256], epochs=1)  # what the first call allocates for good
fit_lbfgs(np.ones((256, 8), np.float32), label[:256], penalties=(1.0,))
held = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (256 << 20), resource.RLIM_INFINITY))
fitted = fit_sweep(mapped, label, epochs=1, lrs=(0.1,)), fit_lbfgs(mapped, label, penalties=(1.0,))
print([one.classifier.logits(mapped[: 1 << 16]).shape for one in fitted])
try:
    np.array(mapped)
except MemoryError:
    print("limited")
"""


@pytest.mark.slow
def test_a_file_larger_than_the_memory_limit_is_fitted(tmp_path):
    """512 MiB of float16 with groups of 16 MiB, where the kernel allows 256 MiB more: half of the file."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (1 << 19, 512)).flush()  # a hole in a file: zeros
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[torch.Size([65536, 2]), torch.Size([65536, 2])]", "limited"]


def test_mean_and_deviation_in_chunks_equal_numpy(small_groups):
    x = (1e4 + np.random.default_rng(0).normal(size=(1000, 8)) * np.geomspace(1e-2, 1e2, 8)).astype(np.float32)
    x[:, 3] = 5.0
    rows = np.arange(0, 1000, 3)
    mean, std = mean_and_std(x, rows, "cpu")
    expected = x[rows].astype(np.float64)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, np.where(np.arange(8) == 3, 1, expected.std(0)), rtol=1e-6)


# --- sweep ----------------------------------------------------------------------------------------


def test_parallel_training_equals_torch_one_by_one():
    x, y = gaussians(70, seed=1)
    candidates = [SgdSettings(0.01, 0.0), SgdSettings(0.3, 0.0), SgdSettings(0.3, 0.05)]
    rows, epochs = np.arange(5, 70), 4
    heads = train_stacked(x, y, rows, candidates, epochs=epochs, batch_size=16, seed=3)
    inputs = torch.from_numpy((x - x[rows].mean(0)) / x[rows].std(0))
    target = torch.from_numpy(np.searchsorted(LABELS, y))
    for h, (lr, weight_decay) in enumerate(candidates):
        model = torch.nn.Linear(x.shape[1], len(LABELS))
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        groups = [{"params": [model.weight], "weight_decay": weight_decay}, {"params": [model.bias]}]
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 5)  # 65 / 16: 5 batches
        same_order = ShuffledBatches(x, rows, 16, seed=3, device="cpu")
        for _ in range(epochs):
            for batch, _ in same_order.epoch():
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs[batch]), target[batch]).backward()
                optimizer.step()
                schedule.step()
        expected = torch.cat([model.weight, model.bias[:, None]], dim=1)
        # 20 steps in float32, whose sums are in another order
        torch.testing.assert_close(heads.weight_HCE[h], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance, low, high", [(4.0, 0.98, 1.0), (0.5, 0.6, 0.95)])
def test_sweep_and_lbfgs_reach_logistic_regression(distance, low, high):
    train, test = (gaussians(3000, seed=seed, distance=distance) for seed in (1, 2))
    scale = lambda x: (x - train[0].mean(0)) / train[0].std(0)  # noqa: E731
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(scale(train[0]), train[1]).score(scale(test[0]), test[1])
    assert low <= reference <= high
    # All are near the best linear rule; two estimates of it differ on under 1% of the samples.
    assert accuracy(fit_sweep(*train, epochs=30), *test) == pytest.approx(reference, abs=0.01)
    assert accuracy(fit_lbfgs(*train), *test) == pytest.approx(reference, abs=0.01)


def test_candidates_are_tested_on_samples_that_were_not_fitted():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(400, 500)).astype(np.float32), rng.integers(2, size=400)
    for fitted in (fit_sweep(x, y, epochs=30, lrs=(0.1, 0.5)), fit_lbfgs(x, y, penalties=(1e-2, 1e-3))):
        assert accuracy(fitted, x, y) > 0.99  # more dimensions than samples: random labels can be memorized
        # 40 held-out coin tosses: 0.5 within three standard deviations of 0.079
        best = max(fitted.candidates, key=lambda one: (one["accuracy"], -one["nll"]))
        assert best["accuracy"] < 0.5 + 3 * 0.079 and fitted.hyperparameters["held_out"] == 40
        assert all(best[key] == value for key, value in fitted.chosen.items() if key != "converged")


def test_of_equal_candidates_the_lower_cross_entropy_wins():
    train = gaussians(600, seed=6, distance=20.0)
    swept = fit_sweep(*train, epochs=2, lrs=(1e-3, 1e-2, 1e-1), weight_decays=(0.0, 1e-3))
    assert {one["accuracy"] for one in swept.candidates} == {1.0} and len(swept.candidates) == 6
    assert swept.chosen == {"lr": 1e-1, "weight_decay": 0.0}  # with classes so far apart, the largest margin
    regression = fit_lbfgs(*train, penalties=(1.0, 1e-2))
    assert {one["accuracy"] for one in regression.candidates} == {1.0} and regression.chosen["penalty"] == 1e-2


def test_scale_and_dead_features_do_not_matter():
    train, test = gaussians(600, seed=8), gaussians(300, seed=9)
    other = [np.concatenate([256 * x, np.full((len(x), 2), 3.3, np.float32)], axis=1) for x in (train[0], test[0])]
    for fit in (lambda x: fit_sweep(x, train[1], epochs=5), lambda x: fit_lbfgs(x, train[1])):
        plain, scaled = fit(train[0]), fit(other[0])
        assert scaled.chosen == plain.chosen
        assert accuracy(scaled, other[1], test[1]) == pytest.approx(accuracy(plain, *test), abs=0.004)  # one of 300


def test_an_unseen_class_is_an_error_and_tensors_are_accepted():
    train, test = gaussians(300, seed=10), gaussians(100, seed=11)
    for fit in (lambda *data: fit_sweep(*data, epochs=3), fit_reference, fit_lbfgs):
        assert torch.equal(weights(fit(*train)), weights(fit(*map(torch.from_numpy, train))))
    assert accuracy(fit_sweep(*train, epochs=3), test[0], np.where(np.arange(100) < 50, 99, test[1])) <= 0.5


def test_testing_in_chunks_changes_nothing(monkeypatch):
    x, y = gaussians(401, seed=12)
    heads = train_stacked(
        x, y, np.arange(300), [SgdSettings(0.01, 0.0), SgdSettings(0.1, 0.0)], epochs=2, batch_size=64, seed=0
    )
    whole = heads.test(x, y, np.arange(300, 401))
    monkeypatch.setattr(sweep, "CHUNK_ELEMENTS", 21 * 10)
    chunked = heads.test(x, y, np.arange(300, 401))
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    guess = torch.stack([heads.select(h).logits(x[300:]).argmax(1) for h in (0, 1)]).numpy()
    np.testing.assert_allclose([a for a, _ in whole], (LABELS[guess] == y[300:]).mean(1))


@pytest.mark.parametrize("fit", [fit_sweep, fit_lbfgs])
def test_a_training_set_of_single_samples_is_refused(fit):
    with pytest.raises(UserError, match="no class has two"):
        fit(np.eye(4, dtype=np.float32), np.arange(4))


# --- reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_the_reference_protocol_equals_a_plain_loop(normalize, monkeypatch):
    """With one batch, its order only changes the order of float32 sums."""
    monkeypatch.setitem(SCHEDULES, "sun397", SCHEDULES["sun397"]._replace(epochs=12, steps=(4, 8, 11)))
    x, y = gaussians(90, seed=20)
    found = fit_reference(x, y, schedule="sun397", normalize=normalize, seed=5)
    torch.manual_seed(5)
    layer = torch.nn.Linear(20, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=5e-4)
    inputs, target = torch.from_numpy(x), torch.from_numpy(np.searchsorted(LABELS, y))
    if normalize:
        inputs = inputs / inputs.norm(dim=1, keepdim=True)
    for epoch in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.1 ** sum(epoch >= step for step in (4, 8, 11))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(inputs), target).backward()
        optimizer.step()
    torch.testing.assert_close(found.classifier.logits(x), layer(inputs).detach(), rtol=1e-3, atol=1e-4)
    assert found.chosen == {} and found.candidates == [] and found.hyperparameters["batch_size"] == 90


def test_the_reference_schedules_are_the_published_ones():
    assert SCHEDULES["imagenet"] == (100, (30, 60, 90), 512)
    assert SCHEDULES["sun397"] == (50, (16, 32, 48), 256)
    assert SCHEDULES["flowers102"] == (80, (25, 50, 75), 128)


def test_fitting_does_not_change_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit_reference(*gaussians(60, seed=1), schedule="flowers102")
    assert torch.equal(torch.rand(3), expected)


# --- lbfgs ----------------------------------------------------------------------------------------


def penalized_loss(classifier, x, y, penalty):
    probability = classifier.logits(x).double().softmax(1).numpy()
    return log_loss(y, probability) + penalty / 2 * float(classifier.weight_CD.double().square().sum())


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-5])
def test_lbfgs_finds_scikit_learn_s_optimum(penalty):
    """On digits: the mean penalized loss within 1e-5, and the probabilities."""
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    fitted = fit_lbfgs(x, y, penalties=(penalty,))
    std = x.std(0)
    scaled = (x - x.mean(0)) / np.where(std > 1e-6 * std.max(), std, 1)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), max_iter=20_000, tol=1e-8).fit(scaled, y)
    expected = log_loss(y, oracle.predict_proba(scaled)) + penalty / 2 * (oracle.coef_**2).sum()
    assert fitted.chosen == {"penalty": penalty, "converged": True}
    assert penalized_loss(fitted.classifier, x, y, penalty) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(fitted.classifier.logits(x).softmax(1), oracle.predict_proba(scaled), atol=5e-3)


def test_strongly_correlated_features_take_few_evaluations(monkeypatch):
    """Principal axes with deviations from 1e-4 to 1, as in encoders: without them, 1,000 are not enough."""
    rng = np.random.default_rng(0)
    y = rng.integers(5, size=600)
    x = rng.normal(size=(600, 40)) @ (rng.normal(size=(40, 40)) * np.geomspace(1e-4, 1, 40)[:, None]) + np.eye(5, 40)[y]
    calls, evaluate = [], lbfgs.LogisticLoss.__call__
    monkeypatch.setattr(lbfgs.LogisticLoss, "__call__", lambda *args: (calls.append(1), evaluate(*args))[1])
    part = lbfgs.LogisticLoss(x, y, 5, np.arange(600), "cpu")
    _, converged = part.minimize(torch.zeros(5, 41, dtype=torch.float64), 1e-4)
    assert converged and len(calls) < 150


@pytest.mark.parametrize("classes", [3, 300])
def test_lbfgs_stops_near_the_minimum(classes, monkeypatch):
    """Within 1e-6, a tenth of the documented tolerance, for few and for many classes."""
    x, y = gaussians(900, seed=24)
    target = np.searchsorted(LABELS, y) if classes == 3 else np.arange(900) % classes

    def least(gradient):
        monkeypatch.setattr(lbfgs, "MAX_GRADIENT", gradient)
        fitted = fit_lbfgs(x, target, penalties=(1e-2,))
        return penalized_loss(fitted.classifier, x, target, 1e-2)

    assert least(1e-5) == pytest.approx(least(1e-8), abs=1e-6)


def test_the_gradient_equals_finite_differences():
    x, y = gaussians(50, seed=22, dim=6)
    part = lbfgs.LogisticLoss(x, np.searchsorted(LABELS, y), 3, np.arange(5, 50), "cpu")
    flat = np.random.default_rng(0).normal(size=21)
    _, gradient = part(flat, 0.3)
    for i in (0, 10, 20):
        step = 1e-5 * np.eye(21)[i]
        slope = (part(flat + step, 0.3)[0] - part(flat - step, 0.3)[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, rel=1e-6)  # a central difference's error: 1e-9


def test_lbfgs_in_chunks_reaches_the_same_optimum(monkeypatch):
    x, y = gaussians(400, seed=23)
    whole = fit_lbfgs(x, y, penalties=(1e-2,))
    monkeypatch.setattr(arrays, "GROUP_BYTES", {"cpu": 64 * 20 * 8})
    parts = fit_lbfgs(x, y, penalties=(1e-2,))
    # Both stop where the whitened gradient is below 1e-5: by then the weights move in the fifth digit.
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-4)


def test_a_warm_start_reaches_the_optimum_of_a_cold_one():
    x, y = gaussians(400, seed=21)
    path, alone = fit_lbfgs(x, y, penalties=(1.0, 1e-1, 1e-2)), fit_lbfgs(x, y, penalties=(1e-2,))
    assert path.candidates[-1]["nll"] == pytest.approx(alone.candidates[0]["nll"], abs=1e-5)
    assert [one["penalty"] for one in path.candidates] == [1.0, 1e-1, 1e-2]
    assert list(lbfgs.PENALTIES) == sorted(lbfgs.PENALTIES, reverse=True)


def test_a_fit_that_did_not_converge_is_marked(monkeypatch):
    monkeypatch.setattr(lbfgs, "MAX_STEPS", 2)
    fitted = fit_lbfgs(*gaussians(400, seed=21), penalties=(1e-3,))
    assert fitted.chosen["converged"] is False and fitted.candidates[0]["converged"] is False


# --- splits ------------------------------------------------------------------------------------------


def test_the_holdout_takes_a_tenth_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [1000, 50, 2, 1])
    np.random.default_rng(0).shuffle(labels)
    fit, held = stratified_holdout(labels, 0.1, seed=0)
    assert sorted([*fit, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=4).tolist() == [100, 5, 1, 0]
    assert np.array_equal(held, stratified_holdout(torch.from_numpy(labels), 0.1, seed=0)[1])
    assert not np.array_equal(held, stratified_holdout(labels, 0.1, seed=1)[1])


def test_balanced_subsets_are_reproducible_and_different():
    labels = np.random.default_rng(0).choice(LABELS, 300)
    draws = balanced_subsets(labels, 10, 5, 0)
    for rows in draws:
        assert len(set(rows)) == 30
        assert [(labels[rows] == c).sum() for c in LABELS] == [10, 10, 10]
    assert len({rows.tobytes() for rows in draws}) == 5
    again = balanced_subsets(torch.from_numpy(labels), 10, 3, 0)  # fewer draws: the same first ones
    assert all(np.array_equal(a, b) for a, b in zip(draws[:3], again, strict=True))
    assert not np.array_equal(draws[0], balanced_subsets(labels, 10, 1, 1)[0])
    with pytest.raises(UserError, match="fewer than the 500 labels"):
        balanced_subsets(labels, 500, 1, 0)
