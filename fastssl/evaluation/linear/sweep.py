"""Many learning rates and weight decays at once, side by side as one matrix product.

The protocol is DINOv2's (arXiv 2304.07193 and its eval/linear.py: 13 rates, SGD with momentum 0.9, cosine to zero)
with two differences: features are standardised, which is the parameter-free batch norm before the classifier of MAE
(arXiv 2111.06377, appendix A.1); and rate and decay are chosen on a held-out tenth of the *training* set, never on the
test set.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.arrays import as_numpy
from fastssl.evaluation.linear.batches import Batches, mean_and_std, take
from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
WEIGHT_DECAYS = (0.0, 1e-3)
EPOCHS = 100
MOMENTUM = 0.9
LARGEST_BATCH = 1024  # the global batch of DINOv2
CHUNK_ELEMENTS = 1 << 24  # logits held at a time when choosing: 64 MiB
CONSTANTS = {  # for records
    "optimizer": "sgd", "momentum": MOMENTUM, "largest_batch": LARGEST_BATCH, "epochs": EPOCHS, "lrs": LEARNING_RATES,
    "weight_decays": WEIGHT_DECAYS, "held_out_share": HOLDOUT_SHARE,
}  # fmt: skip


class Candidate(NamedTuple):
    lr: float
    weight_decay: float


class StackedClassifiers(NamedTuple):
    """H linear classifiers of C classes on standardised features."""

    class_C: Tensor  # the labels that the columns stand for, ascending
    mean_D: Tensor
    std_D: Tensor
    weight_HCE: Tensor  # E = D + 1: the last column is the bias

    def inputs(self, x_BD: Tensor) -> Tensor:
        """(B, E): standardised, with a one appended that the bias multiplies."""
        return F.pad((x_BD - self.mean_D) / self.std_D, (0, 1), value=1.0)

    def logits(self, x_BE: Tensor) -> Tensor:
        """(H, C, B): this order lets the softmax over classes run along contiguous memory."""
        return (self.weight_HCE.flatten(0, 1) @ x_BE.T).unflatten(0, self.weight_HCE.shape[:2])

    def evaluate(
        self, features_ND: ArrayLike | Tensor, label_N: np.ndarray, rows: np.ndarray
    ) -> list[tuple[float, float]]:
        """(accuracy, mean cross-entropy) of each head on some rows; all of their labels must have a column."""
        heads, classes, inputs = self.weight_HCE.shape
        device, step = self.weight_HCE.device, max(1, CHUNK_ELEMENTS // max(heads * classes, inputs))
        right_H = loss_H = 0.0
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            logits_HCB = self.logits(self.inputs(take(features_ND, part, device).float()))
            target_B = torch.searchsorted(self.class_C, torch.from_numpy(label_N[part]).to(device))
            right_H += (logits_HCB.argmax(dim=1) == target_B).sum(dim=1)
            of_truth_HB = logits_HCB.log_softmax(dim=1)[:, target_B, torch.arange(len(part), device=device)]
            loss_H -= of_truth_HB.sum(dim=1, dtype=torch.float64)
        return list(zip((right_H.double() / len(rows)).tolist(), (loss_H / len(rows)).tolist(), strict=True))

    def one(self, head: int) -> LinearClassifier:
        weight_CE = self.weight_HCE[head]
        return LinearClassifier(self.class_C.cpu(), weight_CE[:, :-1], weight_CE[:, -1], self.mean_D, self.std_D)


@torch.inference_mode()
def fit_sweep(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda epochs: None,
) -> LinearFit:
    """Train a classifier for every rate with every decay on nine tenths of the samples, choose the one that is best on
    the last tenth (stratified, seeded; of equal ones, the lower cross-entropy), and train that one again on all.

    Features are (N, D), an array, a map of a file or a tensor, labels (N,) integers. `advance(1)` is called 2 * epochs
    times.
    """
    label_N = as_numpy(labels)
    fit_rows, held_rows = holdout_split(label_N, seed)
    batch_size = min(LARGEST_BATCH, max(32, len(label_N) // 40))  # 40 steps an epoch, or more
    candidates = [Candidate(lr, decay) for lr, decay in product(lrs, weight_decays)]
    train = dict(epochs=epochs, batch_size=batch_size, seed=seed, device=device, advance=advance)

    swept = train_heads(features, label_N, fit_rows, candidates, **train)
    found = swept.evaluate(features, label_N, held_rows)
    best = max(range(len(candidates)), key=lambda i: (found[i][0], -found[i][1]))
    final = train_heads(features, label_N, np.arange(len(label_N)), [candidates[best]], **train)
    settings = {"batch_size": batch_size, "held_out": len(held_rows)}
    selection = [
        {**candidate._asdict(), "accuracy": accuracy, "nll": nll}
        for candidate, (accuracy, nll) in zip(candidates, found, strict=True)
    ]
    return LinearFit(final.one(0), settings, candidates[best]._asdict(), selection)


@torch.inference_mode()
def train_heads(
    features_ND: ArrayLike | Tensor,
    label_N: np.ndarray,
    rows: np.ndarray,
    candidates: Sequence[Candidate],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda epochs: None,
) -> StackedClassifiers:
    """One classifier a candidate, from zero weights, all on the same batches of some rows.

    The loss is convex and its gradient short, (probabilities - truth) * inputs / B, so it is written out: one matrix
    product serves all heads, where an optimiser would visit each in turn.
    """
    class_C, target_N = (torch.from_numpy(x).to(device) for x in np.unique(label_N, return_inverse=True))
    mean_D, std_D = (x.float() for x in mean_and_std(features_ND, rows, device))
    weight_HCE = torch.zeros(len(candidates), len(class_C), len(mean_D) + 1, device=device)
    heads = StackedClassifiers(class_C, mean_D, std_D, weight_HCE)

    velocity_KE = torch.zeros_like(weight_HCE.flatten(0, 1))  # K = H * C
    lr_H11, decay_H11 = torch.tensor(candidates, device=device).T[:, :, None, None]
    batches = Batches(features_ND, rows, batch_size, seed, device)
    steps, step = epochs * len(batches), 0
    decays = any(candidate.weight_decay for candidate in candidates)
    for _ in range(epochs):
        for row_B, x_BD in batches.epoch():
            x_BE = heads.inputs(x_BD)
            residual_HCB = heads.logits(x_BE).softmax(dim=1)
            residual_HCB[:, target_N[row_B], torch.arange(len(row_B), device=device)] -= 1
            # velocity = momentum * velocity + gradient + decay * weight, weight -= rate * velocity
            velocity_KE.addmm_(residual_HCB.flatten(0, 1), x_BE.contiguous(), beta=MOMENTUM, alpha=1 / len(row_B))
            if decays:
                velocity_KE.view_as(weight_HCE)[..., :-1].add_(decay_H11 * weight_HCE[..., :-1])
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            weight_HCE.addcmul_(lr_H11, velocity_KE.view_as(weight_HCE), value=-cosine)
            step += 1
        advance(1)
    return heads
