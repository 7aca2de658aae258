"""Train classifiers for many learning rates and weight decays in parallel, stacked into one matrix product.

The protocol is that of DINOv2 (arXiv 2304.07193 and its eval/linear.py: 13 rates, SGD with momentum 0.9, cosine decay
to zero) with two differences. Features are standardized, which is the batch norm without parameters before the
classifier of MAE (arXiv 2111.06377, appendix A.1). Rate and decay are chosen on a held-out tenth of the *training* set,
never on the test set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.evaluation.arrays import Advance, Array, Device, ShuffledBatches, as_numpy, mean_and_std, read_rows
from fastssl.evaluation.linear.classifier import Candidate, LinearClassifier, LinearFit, best_candidate
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
WEIGHT_DECAYS = (0.0, 1e-3)
EPOCHS = 100
MOMENTUM = 0.9
LARGEST_BATCH = 1024  # the global batch of DINOv2
CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time when testing candidates: 64 MiB
CONSTANTS = {  # recorded in results
    "optimizer": "sgd", "momentum": MOMENTUM, "largest_batch": LARGEST_BATCH, "epochs": EPOCHS, "lrs": LEARNING_RATES,
    "weight_decays": WEIGHT_DECAYS, "held_out_share": HOLDOUT_SHARE,
}  # fmt: skip


class SgdSettings(NamedTuple):
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class StackedClassifiers:
    """H linear classifiers of C classes on standardized features."""

    class_C: Tensor  # the label of each column, ascending
    mean_D: Tensor
    std_D: Tensor
    weight_HCE: Tensor  # E = D + 1: the last column is the bias

    def inputs(self, x_BD: Tensor) -> Tensor:
        """(B, E): standardized features, and a 1 that the bias multiplies."""
        return F.pad((x_BD - self.mean_D) / self.std_D, (0, 1), value=1.0)

    def logits(self, x_BE: Tensor) -> Tensor:
        """(H, C, B): in this order the softmax over classes runs along contiguous memory."""
        return (self.weight_HCE.flatten(0, 1) @ x_BE.T).unflatten(0, self.weight_HCE.shape[:2])

    def test(self, features_ND: Array, label_N: np.ndarray, rows: np.ndarray) -> list[tuple[float, float]]:
        """(accuracy, mean cross-entropy) of each classifier on some rows. All of their labels must have a column."""
        heads, classes, inputs = self.weight_HCE.shape
        device, step = self.weight_HCE.device, max(1, CHUNK_ELEMENTS // max(heads * classes, inputs))
        correct_H = torch.zeros(heads, dtype=torch.int64, device=device)
        loss_H = torch.zeros(heads, dtype=torch.float64, device=device)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            logits_HCB = self.logits(self.inputs(read_rows(features_ND, part, device).float()))
            target_B = torch.searchsorted(self.class_C, torch.from_numpy(label_N[part]).to(device))
            correct_H += (logits_HCB.argmax(dim=1) == target_B).sum(dim=1)
            log_probability_HB = logits_HCB.log_softmax(dim=1)[:, target_B, torch.arange(len(part), device=device)]
            loss_H -= log_probability_HB.sum(dim=1, dtype=torch.float64)
        return list(zip((correct_H.double() / len(rows)).tolist(), (loss_H / len(rows)).tolist(), strict=True))

    def select(self, head: int) -> LinearClassifier:
        weight_CE = self.weight_HCE[head]
        return LinearClassifier(self.class_C.cpu(), weight_CE[:, :-1], weight_CE[:, -1], self.mean_D, self.std_D)


@torch.inference_mode()
def fit_sweep(
    features: Array,
    labels: Array,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: Device = "cpu",
    advance: Advance = lambda epochs: None,
) -> LinearFit:
    """Train on features (N, D) and labels (N,): every rate and decay on nine tenths of the samples, the best on all.

    The best pair has the highest accuracy on the last tenth (stratified, seeded) and, of equal ones, the lowest
    cross-entropy. `advance(1)` is called after each epoch of both trainings, 2 * epochs times.
    """
    label_N = as_numpy(labels)
    fit_rows, held_rows = holdout_split(label_N, seed)
    batch_size = min(LARGEST_BATCH, max(32, len(label_N) // 40))  # at least 40 steps per epoch
    settings = [SgdSettings(lr, decay) for lr, decay in product(lrs, weight_decays)]
    train = partial(train_stacked, features, label_N, epochs=epochs, seed=seed, device=device, advance=advance)
    tested = train(fit_rows, settings, batch_size=batch_size).test(features, label_N, held_rows)
    candidates: list[Candidate] = [
        {**one._asdict(), "accuracy": accuracy, "nll": nll}
        for one, (accuracy, nll) in zip(settings, tested, strict=True)
    ]
    best = settings[best_candidate(candidates)]
    final = train(np.arange(len(label_N)), [best], batch_size=batch_size)
    hyperparameters = {"batch_size": batch_size, "held_out": len(held_rows)}
    return LinearFit(final.select(0), hyperparameters, best._asdict(), candidates)


@torch.inference_mode()
def train_stacked(
    features_ND: Array,
    label_N: np.ndarray,
    rows: np.ndarray,
    settings: Sequence[SgdSettings],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: Device = "cpu",
    advance: Advance = lambda epochs: None,
) -> StackedClassifiers:
    """Train a classifier for each of the settings by SGD, from zero weights, all on the same batches of the rows.

    The gradient of the cross-entropy is (probabilities - one_hot(target)) * inputs / B. It is written out here, so that
    one matrix product serves all classifiers: torch.optim.SGD, one after another, took 3.9 times as long
    (records/linear.md).
    """
    class_C, target_N = (torch.from_numpy(x).to(device) for x in np.unique(label_N, return_inverse=True))
    mean_D, std_D = (x.float() for x in mean_and_std(features_ND, rows, device))
    weight_HCE = torch.zeros(len(settings), len(class_C), len(mean_D) + 1, device=device)
    stacked = StackedClassifiers(class_C, mean_D, std_D, weight_HCE)

    velocity_KE = torch.zeros_like(weight_HCE.flatten(0, 1))  # K = H * C
    lr_H11, decay_H11 = torch.tensor(settings, device=device).T[:, :, None, None]
    batches = ShuffledBatches(features_ND, rows, batch_size, seed, device)
    steps, step = epochs * len(batches), 0
    any_decay = any(one.weight_decay for one in settings)
    for _ in range(epochs):
        for row_B, x_BD in batches.epoch():
            x_BE = stacked.inputs(x_BD)
            residual_HCB = stacked.logits(x_BE).softmax(dim=1)
            residual_HCB[:, target_N[row_B], torch.arange(len(row_B), device=device)] -= 1
            # velocity = momentum * velocity + gradient + decay * weight; weight -= rate * velocity
            velocity_KE.addmm_(residual_HCB.flatten(0, 1), x_BE.contiguous(), beta=MOMENTUM, alpha=1 / len(row_B))
            if any_decay:
                velocity_KE.view_as(weight_HCE)[..., :-1].add_(decay_H11 * weight_HCE[..., :-1])
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            weight_HCE.addcmul_(lr_H11, velocity_KE.view_as(weight_HCE), value=-cosine)
            step += 1
        advance(1)
    return stacked
