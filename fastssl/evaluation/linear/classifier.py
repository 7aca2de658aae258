"""The result of the three protocols: a linear classifier, and how it was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.evaluation.arrays import Array, read_in_chunks

# Hyperparameters of a candidate, with its `accuracy` (share) and `nll` (nats) on the held-out samples.
Candidate: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class LinearClassifier:
    """logits = weight @ ((features - mean) / std) + bias, or with `normalize` of features divided by their length."""

    class_C: Tensor  # the label of each column, ascending
    weight_CD: Tensor
    bias_C: Tensor
    mean_D: Tensor | None = None  # None: features are not standardized
    std_D: Tensor | None = None
    normalize: bool = False

    @torch.inference_mode()
    def logits(self, features_MD: Array) -> Tensor:
        """(M, C) float32 on the CPU, computed in chunks on the device of the classifier."""
        rows = np.arange(len(features_MD))
        logits = []
        for chunk_BD in read_in_chunks(features_MD, rows, self.weight_CD.device, len(self.class_C)):
            x_BD = chunk_BD.float()
            if self.mean_D is not None and self.std_D is not None:
                x_BD = (x_BD - self.mean_D) / self.std_D
            if self.normalize:
                x_BD = F.normalize(x_BD, dim=1)
            logits.append(F.linear(x_BD, self.weight_CD, self.bias_C).cpu())
        return torch.cat(logits)


@dataclass(frozen=True)
class LinearFit:
    """A fitted classifier, and how its protocol came to it."""

    classifier: LinearClassifier
    hyperparameters: dict[str, int]  # those that follow from the data: batch_size, held_out (samples)
    chosen: dict[str, float] = field(default_factory=dict)  # of the best candidate; empty if nothing is chosen
    candidates: list[Candidate] = field(default_factory=list)


def best_candidate(candidates: Sequence[Candidate]) -> int:
    """The position of the highest accuracy; of equal ones, of the lowest cross-entropy."""
    return max(range(len(candidates)), key=lambda i: (candidates[i]["accuracy"], -candidates[i]["nll"]))
