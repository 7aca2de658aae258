"""The weighted k-nearest-neighbour classifier on frozen features.

The protocol of InstDisc (Wu et al., arXiv 1805.01978, section 3.4), as solo-learn, lightly and DINO
run it: by cosine similarity, each of the k nearest training samples votes for its class with weight
exp(similarity / T). solo-learn reports k = 20 and T = 0.07, lightly k = 200 and T = 0.1.

The search is exact: every test sample is compared with every training sample, in float64. A young
encoder's features are nearly parallel (after 4 steps on digits, the median cosine was 0.999999), and
in float32 four of five test samples had a tie at rank 20.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.common.terminal import progress
from fastssl.evaluation.arrays import as_tensor
from fastssl.evaluation.features import DType, cached_features, mean_of_draws
from fastssl.evaluation.metrics import accuracy_interval
from fastssl.evaluation.results import EvaluationResult, load_or_compute
from fastssl.evaluation.runs import EvaluationData, RunEncoder, check_draws
from fastssl.evaluation.splits import balanced_draws

KS, TEMPERATURES = (20, 200), (0.07, 0.1)
BANK_ROWS = 1 << 16  # training samples that are compared at a time: 256 MiB of float64 at 512 dimensions
CHUNK_ELEMENTS = 1 << 24  # similarities held at a time: 128 MiB


def knn_accuracy(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test samples, 0 to 1, whose class the k nearest training samples vote for.

    A test class without training samples is an error for each of its samples.
    """
    guess_M = knn_predictions(train_features, train_labels, test_features, ks=(k,), temperatures=(temperature,))[
        k, temperature
    ]
    return (guess_M == as_tensor(test_labels).cpu()).double().mean().item()


@torch.inference_mode()
def knn_predictions(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda samples: None,
) -> dict[tuple[int, float], Tensor]:
    """{(k, temperature): (M,) int64 labels, on the CPU}: the class that the k nearest training samples vote for.

    Features are (N, D) in any float type, labels (N,) integers, both numpy arrays, maps of files or torch tensors; the
    work happens on `device`, by default the training features' own, in parts that fit whatever their number. A k above
    the number of training samples is shortened to it: all of them vote. Of training samples equally near at rank k,
    torch.topk's pick votes; of classes with equal votes, the smallest label wins. `advance` is told of training samples
    searched.
    """
    bank_ND, query_MD = train_features, test_features
    near_MK, row_MK = nearest_neighbours(bank_ND, query_MD, max(ks), device=device, advance=advance)
    class_C, target_N = torch.unique(as_tensor(train_labels).to(near_MK.device), return_inverse=True)
    vote_MK = target_N[row_MK]

    guesses = {}
    for k, temperature in product(ks, temperatures):
        rows = max(1, CHUNK_ELEMENTS // len(class_C))
        found = []
        for near_BK, vote_BK in zip(near_MK[:, :k].split(rows), vote_MK[:, :k].split(rows), strict=True):
            # Divided by the nearest one's weight: votes keep their proportions, and none overflows.
            weight_BK = torch.exp((near_BK - near_BK[:, :1]) / temperature)
            score_BC = near_BK.new_zeros(len(near_BK), len(class_C)).scatter_add_(1, vote_BK, weight_BK)
            found.append(class_C[score_BC.argmax(dim=1)].cpu())
        guesses[k, temperature] = torch.cat(found)
    return guesses


@torch.inference_mode()
def nearest_neighbours(
    bank: ArrayLike | Tensor,
    query: ArrayLike | Tensor,
    k: int,
    *,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda samples: None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` (N, D) that are nearest to each of `query` (M, D), nearest first: their cosine similarities,
    (M, k) float64, and their places, (M, k) int64, on `device`, by default the bank's own.

    Arrays, sizes, ties, a k above N and `advance` as in `knn_predictions`.
    """
    if device is None:
        device = bank.device if isinstance(bank, Tensor) else "cpu"
    most = min(k, len(bank))
    near_MK = torch.full((len(query), 0), 0.0, dtype=torch.float64, device=device)
    row_MK = torch.full((len(query), 0), 0, device=device)
    for first in range(0, len(bank), BANK_ROWS):
        part = slice(first, first + BANK_ROWS)
        near_MK, row_MK = _nearer(unit(bank[part], device), first, query, near_MK, row_MK, most)
        advance(len(bank[part]))
    return near_MK, row_MK


def _nearer(bank_ND: Tensor, first_row: int, query_MD, near_MK: Tensor, row_MK: Tensor, most: int):
    """The nearest `most`, nearest first, of this part of the bank and of those found before: similarity and row."""
    near, row = [], []
    for first in range(0, len(query_MD), rows := max(1, CHUNK_ELEMENTS // len(bank_ND))):
        part = slice(first, first + rows)
        similarity_BN = unit(query_MD[part], bank_ND.device) @ bank_ND.T
        new_BK, place_BK = similarity_BN.topk(min(most, len(bank_ND)), dim=1)
        both_BK = torch.cat([near_MK[part], new_BK], dim=1)
        rows_BK = torch.cat([row_MK[part], place_BK + first_row], dim=1)
        kept_BK, order_BK = both_BK.topk(min(most, both_BK.shape[1]), dim=1)
        near.append(kept_BK)
        row.append(rows_BK.gather(1, order_BK))
    return torch.cat(near), torch.cat(row)


def unit(features_ND: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Features in float64, of length 1."""
    return F.normalize(as_tensor(features_ND).to(device).double(), dim=1)


def few_label_knn(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    labels_per_class: int = 10,
    draws: int = 5,
    seed: int = 0,
    k: int = 20,
    temperature: float = 0.07,
) -> list[float]:
    """The kNN accuracy with each of the draws that `few_label_linear` makes as the bank."""
    features_ND, label_N = torch.as_tensor(train_features), torch.as_tensor(train_labels)
    return [
        knn_accuracy(
            features_ND[rows],
            label_N[rows],
            test_features,
            test_labels,
            k=k,
            temperature=temperature,
        )
        for rows in balanced_draws(label_N, labels_per_class, draws, seed)
    ]


def evaluate_knn(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    draws: int = 0,
    dtype: DType = "float32",
) -> EvaluationResult:
    """`fastssl eval knn`: every k with every temperature, kept in RUN/eval/knn.json; returns what that file holds.

    draws: for a stochastic h, search with the mean of so many draws, each of length 1, in place of mu.
    """
    check_draws(encoder, draws)
    about = data.describe()
    for k in ks:  # a shortened k would stand under the name of the published one
        if not 1 <= k <= about["train"]["images"]:
            raise UserError(
                f"--k {k} is not between 1 and the {about['train']['images']} images of {about['train']['path']}: give "
                "one that is."
            )

    def measure() -> dict:
        sets = [cached_features(encoder, part, dtype) for part in (data.train, data.val)]
        seed = encoder.recipe.seed
        bank, query = (
            mean_of_draws(x, draws, seed, normalize=True, device=encoder.device) if draws else x.h for x in sets
        )
        with progress(f"Neighbours in {data.train.path}", len(bank), "images") as advance:
            guesses = knn_predictions(
                bank, sets[0].label, query, ks=ks, temperatures=temperatures, device=encoder.device, advance=advance
            )
        correct = {f"accuracy_k{k}_t{t:g}": guess.numpy() == sets[1].label for (k, t), guess in guesses.items()}
        return {
            "metrics": {name: float(right_M.mean()) for name, right_M in correct.items()},
            "intervals": {name: list(accuracy_interval(right_M)) for name, right_M in correct.items()},
        }

    request = {
        "evaluation": "knn",
        "protocol": "exact kNN on h by cosine similarity, weights exp(similarity / temperature)",
        "settings": {"ks": list(ks), "temperatures": list(temperatures), "draws": draws, "dtype": dtype},
        "seed": encoder.recipe.seed,
        **encoder.describe(),
        **about,
    }
    name = "knn" + (f"-draws{draws}" if draws else "") + encoder.suffix + data.suffix
    return load_or_compute(encoder.run_dir, name, request, measure)
