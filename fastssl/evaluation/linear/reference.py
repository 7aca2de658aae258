"""The linear protocol of the published code (arXiv 2310.18080; its conf/linear_probing, after VISSL's for SUN397).

Features of length 1, one linear layer, AdamW at 1e-2 with weight decay 5e-4, the rate divided by ten at three epochs.
Nothing is chosen: the last epoch's weights are tested.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastssl.evaluation.arrays import as_numpy
from fastssl.evaluation.linear.batches import Batches
from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit

LR, WEIGHT_DECAY, GAMMA = 1e-2, 5e-4, 0.1
CONSTANTS = {"optimizer": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY, "gamma": GAMMA}  # for records

ScheduleName = Literal["imagenet", "sun397", "flowers102"]


class Schedule(NamedTuple):
    epochs: int
    steps: tuple[int, ...]  # epochs behind which the rate is divided by ten
    batch_size: int


SCHEDULES: dict[str, Schedule] = {
    "imagenet": Schedule(100, (30, 60, 90), 512),
    "sun397": Schedule(50, (16, 32, 48), 256),
    "flowers102": Schedule(80, (25, 50, 75), 128),
}


def fit_reference(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    schedule: ScheduleName = "imagenet",
    normalize: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda epochs: None,
) -> LinearFit:
    """Train on features (N, D), an array, a map of a file or a tensor, and labels (N,).

    normalize: False for features that are means of draws of length 1 each. `advance(1)` is called once an epoch.
    """
    label_N = as_numpy(labels)
    epochs, steps, batch_size = SCHEDULES[schedule]
    class_C, target_N = np.unique(label_N, return_inverse=True)
    target_N = torch.from_numpy(target_N).to(device)
    # Drawn on the CPU from a generator of its own: the caller's random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layer = nn.Linear(features.shape[1], len(class_C)).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(steps), GAMMA)
    batches = Batches(features, np.arange(len(label_N)), min(batch_size, len(label_N)), seed, device)
    for _ in range(epochs):
        for row_B, x_BD in batches.epoch():
            logits_BC = layer(F.normalize(x_BD, dim=1) if normalize else x_BD)
            F.cross_entropy(logits_BC, target_N[row_B]).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        advance(1)
    weight_CD, bias_C = layer.weight.detach(), layer.bias.detach()
    classifier = LinearClassifier(torch.from_numpy(class_C), weight_CD, bias_C, normalize=normalize)
    return LinearFit(classifier, {"batch_size": batches.batch_size}, {}, [])
