"""The weighted k-nearest-neighbor classifier on frozen features.

The protocol of InstDisc (Wu et al., arXiv 1805.01978, section 3.4), as solo-learn, lightly and DINO run it: each of the
k nearest training samples by cosine similarity votes for its class with weight exp(similarity / T). solo-learn reports
k = 20 and T = 0.07, lightly k = 200 and T = 0.1.

The search is exact: every test sample is compared with every training sample, in float64. The features of a network
that has hardly been trained are nearly parallel (after 4 steps on digits, the median cosine was 0.999999), and in
float32 four of five test samples had a tie at rank 20.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.evaluation.arrays import Advance, Array, Device, as_labels, as_tensor
from fastssl.evaluation.features import DType, cached_features, mean_of_draws
from fastssl.evaluation.metrics import accuracy_interval, chance_levels
from fastssl.evaluation.results import RESULT, EvaluationResult, load_or_compute, save_outcomes
from fastssl.evaluation.runs import EvaluationData, RunEncoder, check_draws

KS, TEMPERATURES = (20, 200), (0.07, 0.1)
BANK_ROWS = 1 << 16  # training samples that are compared at a time: 256 MiB of float64 at 512 dimensions
CHUNK_ELEMENTS = 1 << 24  # similarities in memory at a time: 128 MiB


def evaluate_knn(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    ks: Sequence[int] | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    draws: int | None = 0,
    dtype: DType = "float32",
) -> EvaluationResult:
    """Accuracy of the kNN classifier for every k with every temperature. Cached in RUN/eval/knn.json.

    data.train is searched for the neighbors of data.val. For a stochastic h, draws > 0 searches with the mean of that
    many draws, each of length 1, in place of mu. dtype is that of the cached features. Without `ks`, the
    numbers of neighbors are 20 and 200, or as many as there are images.
    """
    check_draws(encoder, draws)
    description = data.describe()
    images = description["train"]["images"]
    if ks is None:
        ks = sorted({min(k, images) for k in KS})
    for k in ks:
        # A k that is reduced to the number of images would be reported under the name of the published one.
        if not 1 <= k <= images:
            raise UserError(
                f"--k must be from 1 to {images}, the number of images of {data.train.path}, got {k}",
                hint=f"write it like --k {min(20, images)}",
            )
    name = "knn" + (f"-draws{draws}" if draws else "") + encoder.suffix + data.suffix

    def compute() -> dict[str, Any]:
        train, val = (cached_features(encoder, part, dtype) for part in (data.train, data.val))
        seed, device = encoder.recipe.seed, encoder.device
        bank, query = (mean_of_draws(x, draws or 0, seed, normalize=True, device=device) for x in (train, val))
        with encoder.progress(f"neighbors in {data.train.path}", len(bank)) as advance:
            guesses = knn_predictions(
                bank, train.label, query, ks=ks, temperatures=temperatures, device=device, advance=advance
            )
        correct = {f"accuracy_k{k}_t{t:g}": guess_M.numpy() == val.label for (k, t), guess_M in guesses.items()}
        return {
            "metrics": {metric: float(correct_M.mean()) for metric, correct_M in correct.items()},
            "intervals": {metric: list(accuracy_interval(correct_M)) for metric, correct_M in correct.items()},
            "chance": dict.fromkeys(correct, chance_levels(val.label)["accuracy"]),
            "outcomes": save_outcomes(encoder.run_dir, name, correct),
        }

    request = {
        "evaluation": "knn",
        "protocol": "exact kNN on h by cosine similarity, weights exp(similarity / temperature)",
        "settings": {"ks": list(ks), "temperatures": list(temperatures), "draws": draws or 0, "dtype": dtype},
        "seed": encoder.recipe.seed,
        **encoder.describe(),
        **description,
    }
    return load_or_compute(encoder.run_dir, name, request, compute, RESULT)


def knn_accuracy(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """The share of test samples, 0 to 1, whose class the k nearest training samples vote for.

    A test sample of a class without training samples is an error. Raises ValueError if a label is negative, as for an
    image without one.
    """
    guesses = knn_predictions(train_features, train_labels, test_features, ks=(k,), temperatures=(temperature,))
    return (guesses[k, temperature] == as_tensor(as_labels(test_labels))).double().mean().item()


@torch.inference_mode()
def knn_predictions(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    device: Device | None = None,
    advance: Advance = lambda samples: None,
) -> dict[tuple[int, float], Tensor]:
    """The label that the k nearest training samples vote for, for every k with every temperature.

    Args:
        train_features: (N, D), any float type.
        train_labels: (N,) integers from 0 on.
        test_features: (M, D).
        ks: numbers of neighbors. A k above N means N.
        temperatures: of the votes.
        device: where to compute; None: the device of train_features. Features are read in chunks that fit.
        advance: called with the number of training samples that were searched since the last call.

    Returns:
        {(k, temperature): (M,) int64 labels on the CPU}. Of training samples that are equally near at rank k,
        torch.topk picks those that vote; of classes with equal votes the smallest label wins.
    """
    near_MK, row_MK = nearest_neighbors(train_features, test_features, max(ks), device=device, advance=advance)
    class_C, class_index_N = torch.unique(as_tensor(as_labels(train_labels)).to(near_MK.device), return_inverse=True)
    vote_MK = class_index_N[row_MK]

    guesses = {}
    for k, temperature in product(ks, temperatures):
        rows = max(1, CHUNK_ELEMENTS // len(class_C))
        found = []
        for near_BK, vote_BK in zip(near_MK[:, :k].split(rows), vote_MK[:, :k].split(rows), strict=True):
            # All weights are divided by that of the nearest sample: votes keep their proportions, and none overflows.
            weight_BK = torch.exp((near_BK - near_BK[:, :1]) / temperature)
            score_BC = near_BK.new_zeros(len(near_BK), len(class_C)).scatter_add_(1, vote_BK, weight_BK)
            found.append(class_C[score_BC.argmax(dim=1)].cpu())
        guesses[k, temperature] = torch.cat(found)
    return guesses


@torch.inference_mode()
def nearest_neighbors(
    bank: Array, query: Array, k: int, *, device: Device | None = None, advance: Advance = lambda samples: None
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` with the largest cosine similarity to each row of `query`, the nearest first.

    The bank is (N, D), the query (M, D), in any float type; a k above N means N. Returns similarities (M, k) float64
    and rows of the bank (M, k) int64, on the device (None: that of the bank). `advance` is called with the number of
    rows of the bank that were searched since the last call.
    """
    if device is None:
        device = bank.device if isinstance(bank, Tensor) else "cpu"
    near_MK = torch.zeros(len(query), 0, dtype=torch.float64, device=device)
    row_MK = torch.zeros(len(query), 0, dtype=torch.int64, device=device)
    for first_row in range(0, len(bank), BANK_ROWS):
        bank_RD = _unit_length(bank[first_row : first_row + BANK_ROWS], device)
        near, row = [], []
        step = max(1, CHUNK_ELEMENTS // len(bank_RD))
        for first in range(0, len(query), step):
            part = slice(first, first + step)
            similarity_BR = _unit_length(query[part], device) @ bank_RD.T
            new_BK, position_BK = similarity_BR.topk(min(k, len(bank_RD)), dim=1)
            # The k nearest of those found so far and of this part of the bank.
            both_BK = torch.cat([near_MK[part], new_BK], dim=1)
            rows_BK = torch.cat([row_MK[part], position_BK + first_row], dim=1)
            nearest_BK, order_BK = both_BK.topk(min(k, both_BK.shape[1]), dim=1)
            near.append(nearest_BK)
            row.append(rows_BK.gather(1, order_BK))
        near_MK, row_MK = torch.cat(near), torch.cat(row)
        advance(len(bank_RD))
    return near_MK, row_MK


def _unit_length(features_ND: Array, device: Device) -> Tensor:
    return F.normalize(as_tensor(features_ND).to(device).double(), dim=1)
