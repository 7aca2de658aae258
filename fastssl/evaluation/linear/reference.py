"""The linear protocol of the published code of arXiv 2310.18080 (its conf/linear_probing, after VISSL's for SUN397).

Features of length 1, one linear layer, AdamW with learning rate 1e-2 and weight decay 5e-4. The rate is divided by ten
after three of the epochs. Nothing is chosen: the weights of the last epoch are tested.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.evaluation.arrays import Advance, Array, Device, ShuffledBatches, as_labels
from fastssl.evaluation.linear.classifier import LinearClassifier, LinearFit

LR, WEIGHT_DECAY, GAMMA = 1e-2, 5e-4, 0.1
CONSTANTS = {"optimizer": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY, "gamma": GAMMA}  # recorded in results

ScheduleName = Literal["imagenet", "sun397", "flowers102"]


class ReferenceSchedule(NamedTuple):
    epochs: int
    steps: tuple[int, ...]  # epochs after which the learning rate is divided by ten
    batch_size: int


SCHEDULES: dict[str, ReferenceSchedule] = {
    "imagenet": ReferenceSchedule(100, (30, 60, 90), 512),
    "sun397": ReferenceSchedule(50, (16, 32, 48), 256),
    "flowers102": ReferenceSchedule(80, (25, 50, 75), 128),
}


def fit_reference(
    features: Array,
    labels: Array,
    *,
    schedule: ScheduleName = "imagenet",
    normalize: bool = True,
    seed: int = 0,
    device: Device = "cpu",
    advance: Advance = lambda epochs: None,
) -> LinearFit:
    """Train on features (N, D) and labels (N,) by the reference protocol.

    normalize divides features by their length; it is False for means of draws of length 1. The seed is that of the
    initial weights and of the order of the samples. `advance(1)` is called after each epoch.
    """
    label_N = as_labels(labels)
    epochs, steps, batch_size = SCHEDULES[schedule]
    class_C, class_index_N = np.unique(label_N, return_inverse=True)
    target_N = torch.from_numpy(class_index_N).to(device)
    # The weights are drawn from a forked generator, so the random state of the caller does not change.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layer = nn.Linear(features.shape[1], len(class_C)).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(steps), GAMMA)
    batches = ShuffledBatches(features, np.arange(len(label_N)), min(batch_size, len(label_N)), seed, device)
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
    return LinearFit(classifier, {"batch_size": batches.batch_size})
