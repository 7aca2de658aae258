"""Time the sweep and the logistic regression next to torch.optim and scikit-learn in one run, and features in a file.

    python benchmarks/linear.py [--features RUN/features/train-...] [--out records/linear.md]
    python benchmarks/linear.py --stream FOLDER        # writes 1.3 GB there, and deletes it

Without --features the features are random: 50,000 x 512 in 10 overlapping classes, the shape of CIFAR-10's.
"""

import argparse
import platform
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

from fastssl.evaluation import classification_metrics, fit_lbfgs, fit_sweep
from fastssl.evaluation.arrays import ShuffledBatches
from fastssl.evaluation.features import read_features
from fastssl.evaluation.linear import lbfgs
from fastssl.evaluation.linear.sweep import LEARNING_RATES, SgdSettings, train_stacked

IMAGENET = 1_281_167  # images
T = TypeVar("T")


def random_features(count: int, width: int = 512, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(classes, size=count)
    center = rng.normal(size=(classes, width)) * 0.15
    return np.maximum(center[label] + rng.normal(size=(count, width)), 0).astype(np.float32), label


def timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def one_by_one(x: np.ndarray, y: np.ndarray, lrs, epochs: int, batch_size: int) -> None:
    """Train the classifiers of the sweep one after another with torch.optim.SGD."""
    inputs, target = torch.from_numpy((x - x.mean(0)) / np.maximum(x.std(0), 1e-6)), torch.from_numpy(y)
    for lr in lrs:
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, fused=True)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(inputs[batch]), target[batch]).backward()
                optimizer.step()


def penalized_loss(classifier, x, y, penalty: float) -> float:
    probability = classifier.logits(x).double().softmax(1).numpy()
    return log_loss(y, probability) + penalty / 2 * float(classifier.weight_CD.double().square().sum())


def compare(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, penalty: float) -> Iterator[str]:
    yield f"{len(x):,} x {x.shape[1]} features, {len(set(y.tolist()))} classes:\n"
    swept, seconds = timed(lambda: fit_sweep(x, y))
    pairs = len(swept.candidates)
    _, alone = timed(lambda: fit_sweep(x, y, weight_decays=(0.0,)))
    logits, classes = swept.classifier.logits(x_test), swept.classifier.class_C
    scores, test_seconds = timed(lambda: classification_metrics(logits, y_test, classes))
    yield (
        f"* sweep: {pairs} pairs of rate and decay, 100 epochs, and the chosen one again on all samples: **"
        f"{seconds:.1f} s**; the 13 rates without decay: **{alone:.1f} s**; metrics and intervals of {len(x_test):,} "
        f"test samples {test_seconds:.1f} s (accuracy {100 * scores.metrics['accuracy']:.2f} %)."
    )
    epochs, rows = 3, np.arange(len(x))
    candidates = [SgdSettings(lr, 0.0) for lr in LEARNING_RATES]
    _, together = timed(lambda: train_stacked(x, y, rows, candidates, epochs=epochs, batch_size=1024, seed=0))
    _, apart = timed(lambda: one_by_one(x, y, LEARNING_RATES, epochs, 1024))
    yield (
        f"* the 13 in parallel, {epochs} epochs: {together:.2f} s; one after another by torch.optim.SGD {apart:.2f} "
        f"s: {apart / together:.1f} times as long."
    )
    fitted, seconds = timed(lambda: fit_lbfgs(x, y))
    penalties = len(fitted.candidates)
    yield f"* lbfgs: the path of {penalties} penalties, and the chosen one on all samples: {seconds:.1f} s."
    ours, our_seconds = timed(lambda: fit_lbfgs(x, y, penalties=(penalty,)))
    std = x.std(0, dtype=np.float64)
    scaled = (x - x.mean(0, dtype=np.float64)) / np.where(std > 1e-6 * std.max(), std, 1)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), max_iter=2_000, tol=1e-5)
    _, its_seconds = timed(lambda: oracle.fit(scaled, y))
    expected = log_loss(y, oracle.predict_proba(scaled)) + penalty / 2 * (oracle.coef_**2).sum()
    difference = penalized_loss(ours.classifier, x, y, penalty) - expected
    yield (
        f"* at the one penalty {penalty:g}: mean penalized loss {difference:+.1e} from scikit-learn's {expected:.6f} "
        f"(tol {oracle.tol:g}); {our_seconds:.1f} s for two fits (on nine tenths, then on all samples), scikit-learn "
        f"{its_seconds:.1f} s for one."
    )


class WithoutAxes(lbfgs.LogisticLoss):
    """Plain L-BFGS on standardized features, for comparison."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.axes_EE = torch.eye(len(self.axes_EE), dtype=torch.float64)

    def scale_E(self, penalty: float) -> torch.Tensor:
        return torch.ones_like(self.variance_E)


def evaluations(kind: type[lbfgs.LogisticLoss], x: np.ndarray, y: np.ndarray, penalty: float) -> int:
    """Count the evaluations of the loss from zero weights to the optimum."""
    calls = []

    class Counted(kind):
        def __call__(self, *arguments):
            calls.append(1)
            return super().__call__(*arguments)

    classes, target = np.unique(y, return_inverse=True)
    start = torch.zeros(len(classes), x.shape[1] + 1, dtype=torch.float64)
    _, converged = Counted(x, target, len(classes), np.arange(len(y)), "cpu").minimize(start, penalty)
    assert converged
    return len(calls)


def axes(x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    for penalty in (1e-1, 1e-3, 1e-5):
        along, without = (evaluations(kind, x, y, penalty) for kind in (lbfgs.LogisticLoss, WithoutAxes))
        yield f"* lbfgs on {len(x):,} images at penalty {penalty:g}: {along} evaluations, {without} without the axes."


class PeakMegabytes:
    """The peak of this process's memory above that at the start, sampled every millisecond by a thread.

    Pages of memory-mapped files do not count: the kernel may drop them at any time.
    """

    def __enter__(self):
        self.above, self._done, before = 0.0, threading.Event(), self._own()

        def watch():
            while not self._done.wait(1e-3):
                self.above = max(self.above, self._own() - before)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    @staticmethod
    def _own() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3


def stream(folder: Path) -> Iterator[str]:
    """Read, and train on, one epoch of float16 features in a file, as many as ImageNet has images."""
    path = folder / "imagenet.npy"
    rng, classes = np.random.default_rng(0), 1000
    features = np.lib.format.open_memmap(path, "w+", np.float16, (IMAGENET, 512))
    for first in range(0, IMAGENET, 1 << 16):
        part = features[first : first + (1 << 16)]
        part[:] = rng.standard_normal(part.shape, np.float32)
    features.flush()
    del features
    mapped = np.load(path, mmap_mode="r")
    label = rng.integers(classes, size=IMAGENET)
    try:
        with PeakMegabytes() as reading:
            start = time.perf_counter()
            for _ in ShuffledBatches(mapped, np.arange(IMAGENET), 1024, 0, "cpu").epoch():
                pass
            read_seconds = time.perf_counter() - start
        train = dict(epochs=1, batch_size=1024, seed=0)
        with PeakMegabytes() as training:
            _, seconds = timed(
                lambda: train_stacked(mapped, label, np.arange(IMAGENET), [SgdSettings(0.1, 0.0)], **train)
            )
    finally:
        path.unlink()
    yield (
        f"* {IMAGENET:,} x 512 float16 in a file of {IMAGENET * 1024 / 1e9:.2f} GB: an epoch of batches in random "
        f"order in {read_seconds:.1f} s ({IMAGENET / read_seconds:,.0f} samples/s), with at most {reading.above:.0f} "
        f"MB of additional memory; an epoch of one classifier of {classes:,} classes, standardization "
        f"included, in {seconds:.0f} s, with {training.above:.0f} MB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, nargs=2, metavar=("TRAIN", "VAL"), help="folders in RUN/features")
    parser.add_argument("--penalty", type=float, default=1e-3)
    parser.add_argument("--stream", type=Path)
    parser.add_argument("--out", type=Path, help="append to this record")
    options = parser.parse_args()
    if options.stream:
        lines = stream(options.stream)
    else:
        if options.features:
            train, val = map(read_features, options.features)
            data = np.array(train.h), np.array(train.label), np.array(val.h), np.array(val.label)
        else:
            x, y = random_features(60_000)
            data = x[:50_000], y[:50_000], x[50_000:], y[50_000:]
        lines = chain(compare(*data, options.penalty), axes(data[0][:10_000], data[1][:10_000]))
    text = f"{platform.machine()}, {torch.get_num_threads()} torch threads, torch {torch.__version__}. "
    for line in lines:
        text += line + "\n"
        print(line, flush=True)
    if options.out:
        with open(options.out, "a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
