"""Linear classifiers on frozen features: the rate swept in one pass, and a few labels a class.

The sweep trains one softmax classifier a learning rate, all of them side by side as one matrix
product. The protocol is DINOv2's (arXiv 2304.07193 and its eval/linear.py: 13 rates, SGD with
momentum 0.9, no weight decay, cosine to zero) with two differences: features are standardised,
which is the parameter-free batch norm before the classifier of MAE (arXiv 2111.06377, appendix
A.1); and the rate is chosen on a held-out tenth of the *training* set, never on the test set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.beton.progress import progress
from fastssl.evaluation.results import write_result
from fastssl.evaluation.runs import run_features
from fastssl.evaluation.splits import balanced_draws, stratified_holdout
from fastssl.recipe import UserError

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
MOMENTUM = 0.9
LARGEST_BATCH = 1024  # the global batch of DINOv2
HELD_OUT = 0.1  # share of the training set that the rate is chosen on
FEW_LABEL_C = 1.0
CHUNK_ELEMENTS = 1 << 24  # inputs or logits held at a time when predicting: 64 MiB


@dataclass(frozen=True)
class Heads:
    """H linear classifiers of C classes on standardised features."""

    class_C: Tensor  # the labels that the columns stand for, ascending
    mean_D: Tensor
    std_D: Tensor
    weight_HCE: Tensor  # E = D + 1: the last column is the bias

    def inputs(self, features_BD: Tensor) -> Tensor:
        """(B, E): standardised, with a one appended that the bias multiplies."""
        x_BD = features_BD.to(self.mean_D.device).float() - self.mean_D
        return F.pad(x_BD.div_(self.std_D), (0, 1), value=1.0)

    def logits(self, x_BE: Tensor) -> Tensor:
        """(H, C, B): this order lets the softmax over classes run along contiguous memory."""
        return (self.weight_HCE.flatten(0, 1) @ x_BE.T).unflatten(0, self.weight_HCE.shape[:2])

    def evaluate(self, features_ND: Tensor, label_N: Tensor) -> tuple[list[float], list[float]]:
        """(accuracy, mean cross-entropy) of each head; a label without a column is an error."""
        heads, classes, inputs = self.weight_HCE.shape
        rows = max(1, CHUNK_ELEMENTS // max(heads * classes, inputs))
        right_H = loss_H = 0.0
        for features_BD, label_B in zip(features_ND.split(rows), label_N.split(rows), strict=True):
            logits_HCB = self.logits(self.inputs(features_BD))
            label_B = label_B.to(logits_HCB.device)
            truth_CB = label_B == self.class_C[:, None]
            right_H += (self.class_C[logits_HCB.argmax(dim=1)] == label_B).sum(dim=1)
            loss_H -= (logits_HCB.log_softmax(dim=1) * truth_CB).sum(dim=(1, 2), dtype=torch.float64)
        return (right_H.double() / len(label_N)).tolist(), (loss_H / len(label_N)).tolist()


@dataclass(frozen=True)
class LinearResult:
    accuracy: float  # share of test samples classified rightly, 0 to 1
    lr: float  # the chosen rate
    selection_accuracy: float  # that rate's share on the held-out samples
    selection_accuracies: dict[float, float]  # every rate's
    held_out: int  # how many samples the choice was made on
    batch_size: int
    heads: Heads  # the one classifier that was tested


@torch.inference_mode()
def linear_accuracy(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    seed: int = 0,
    advance: Callable[[int], object] = lambda epochs: None,
) -> LinearResult:
    """Train a classifier a learning rate on nine tenths of the training set, choose the one that is
    best on the last tenth (stratified, seeded; of equal ones, the lower cross-entropy), train that
    rate again on all of the training set, and test once.

    Features are (N, D) in any float type, labels (N,) integers, both numpy arrays or torch tensors;
    the work happens on the training features' device. `advance(1)` is called 2 * epochs times.
    """
    features_ND, label_N = torch.as_tensor(train_features), torch.as_tensor(train_labels)
    fit_rows, held_rows = stratified_holdout(label_N, HELD_OUT, seed)
    if len(held_rows) == 0:
        raise UserError("The linear probe holds out one training sample of a class, but no class has two.")
    batch_size = min(LARGEST_BATCH, max(32, len(label_N) // 40))  # 40 steps an epoch, or more
    settings = dict(epochs=epochs, batch_size=batch_size, seed=seed, advance=advance)

    swept = train_heads(features_ND[fit_rows], label_N[fit_rows], lrs, **settings)
    accuracy_H, loss_H = swept.evaluate(features_ND[held_rows], label_N[held_rows])
    best = max(range(len(lrs)), key=lambda i: (accuracy_H[i], -loss_H[i]))

    final = train_heads(features_ND, label_N, [lrs[best]], **settings)
    (accuracy,), _ = final.evaluate(torch.as_tensor(test_features), torch.as_tensor(test_labels))
    return LinearResult(
        accuracy=accuracy,
        lr=lrs[best],
        selection_accuracy=accuracy_H[best],
        selection_accuracies=dict(zip(lrs, accuracy_H, strict=True)),
        held_out=len(held_rows),
        batch_size=batch_size,
        heads=final,
    )


@torch.inference_mode()
def train_heads(
    features_ND: Tensor,
    label_N: Tensor,
    lrs: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    advance: Callable[[int], object] = lambda epochs: None,
) -> Heads:
    """One classifier a learning rate, from zero weights, all on the same batches.

    The loss is convex and its gradient short, (probabilities - truth) * inputs / B, so it is
    written out: one matrix product serves all heads, where an optimiser would visit each in turn.
    """
    device = features_ND.device
    class_C, target_N = torch.unique(label_N.to(device), return_inverse=True)
    H, C = len(lrs), len(class_C)
    std_D, mean_D = torch.std_mean(features_ND.float(), dim=0, correction=0)
    std_D = torch.where(std_D > 1e-6 * std_D.max(), std_D, 1.0)  # a dead unit stays at zero
    weight_HCE = torch.zeros(H, C, features_ND.shape[1] + 1, device=device)
    heads = Heads(class_C, mean_D, std_D, weight_HCE)

    velocity_KE = torch.zeros_like(weight_HCE.flatten(0, 1))  # K = H * C
    lr_H11 = torch.tensor(lrs, device=device)[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(len(label_N) / batch_size), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(label_N), generator=generator).to(device).split(batch_size):
            x_BE = heads.inputs(features_ND[batch])
            residual_HCB = heads.logits(x_BE).softmax(dim=1)
            residual_HCB[:, target_N[batch], torch.arange(len(batch), device=device)] -= 1
            # velocity = momentum * velocity + gradient, weight -= rate * velocity
            residual_KB = residual_HCB.flatten(0, 1)
            velocity_KE.addmm_(residual_KB, x_BE, beta=MOMENTUM, alpha=1 / len(batch))
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            weight_HCE.addcmul_(lr_H11, velocity_KE.view_as(weight_HCE), value=-cosine)
            step += 1
        advance(1)
    return heads


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

    scaler = StandardScaler().fit(_array(train_features))
    train_ND, test_ND = (scaler.transform(_array(x)) for x in (train_features, test_features))
    label_N, test_label_N = _array(train_labels), _array(test_labels)
    accuracies = []
    for rows in balanced_draws(label_N, labels_per_class, draws, seed):
        classifier = LogisticRegression(C=FEW_LABEL_C, max_iter=1000).fit(train_ND[rows], label_N[rows])
        accuracies.append(float(classifier.score(test_ND, test_label_N)))
    return accuracies


def evaluate_linear(
    run_dir: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    epochs: int = 100,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """`fastssl eval linear RUN`: a classifier trained on data.train and tested on data.val, kept in
    RUN/eval/linear.json. Returns what that file holds; `results.result_table` prints it."""
    run = run_features(run_dir, train=train, val=val, device=device)
    with progress(f"Linear classifiers on {run.about['train']['path']}", 2 * epochs, "epochs") as advance:
        linear = linear_accuracy(
            torch.as_tensor(run.train.h, device=run.device),
            run.train.label,
            run.val.h,
            run.val.label,
            epochs=epochs,
            seed=seed,
            advance=advance,
        )
    result = {
        "evaluation": "linear",
        "protocol": "softmax classifier on standardised h, SGD with cosine, rate chosen on "
        "held-out training images, trained again on all of them",
        "settings": {
            "epochs": epochs,
            "batch_size": linear.batch_size,
            "momentum": MOMENTUM,
            "weight_decay": 0.0,
            "held_out_images": linear.held_out,
            "lrs": list(linear.selection_accuracies),
        },
        "seed": seed,
        "figures": {"accuracy": linear.accuracy, "selection_accuracy": linear.selection_accuracy},
        "lr": linear.lr,
        "selection_accuracies": list(linear.selection_accuracies.values()),
        **run.about,
    }
    write_result(run_dir, result)
    return result


def _array(x: ArrayLike | Tensor) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
