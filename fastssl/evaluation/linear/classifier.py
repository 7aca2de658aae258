"""What the three protocols give: one linear classifier, and how it came about."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.linear.batches import in_order


@dataclass(frozen=True)
class LinearClassifier:
    """logits = weight @ ((features - mean) / std) + bias, or, with `normalize`, of features of length 1."""

    class_C: Tensor  # the labels that the columns stand for, ascending
    weight_CD: Tensor
    bias_C: Tensor
    mean_D: Tensor | None = None  # None: as they are
    std_D: Tensor | None = None
    normalize: bool = False

    @torch.inference_mode()
    def logits(self, features_MD: ArrayLike | Tensor) -> Tensor:
        """(M, C) float32 on the CPU; the work happens on the classifier's device, in parts that fit."""
        rows, device = np.arange(len(features_MD)), self.weight_CD.device
        parts = in_order(features_MD, rows, device, len(self.class_C))
        return torch.cat([self._logits(part.float()).cpu() for part in parts])

    def _logits(self, x_BD: Tensor) -> Tensor:
        if self.mean_D is not None:
            x_BD = (x_BD - self.mean_D) / self.std_D
        if self.normalize:
            x_BD = F.normalize(x_BD, dim=1)
        return F.linear(x_BD, self.weight_CD, self.bias_C)


@dataclass(frozen=True)
class LinearFit:
    """A classifier, and what its protocol did."""

    classifier: LinearClassifier
    settings: dict  # what followed from the data: batch_size, held_out (samples)
    chosen: dict  # what was chosen on held-out training samples; empty where nothing was
    selection: list[dict]  # each candidate with its held-out accuracy (share) and nll (nats)
