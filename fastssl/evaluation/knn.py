"""The weighted k-nearest-neighbour classifier on frozen features.

The protocol of InstDisc (Wu et al., arXiv 1805.01978, section 3.4), as solo-learn, lightly and DINO
run it: by cosine similarity, each of the k nearest training samples votes for its class with weight
exp(similarity / T). The search is exact: every test sample is compared with every training sample,
in float64. A young encoder's features are nearly parallel (after 4 steps on digits, the median cosine
was 0.999999), and in float32 four of five test samples had a tie at rank 20.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fastssl.evaluation.results import write_result
from fastssl.evaluation.runs import run_features
from fastssl.evaluation.splits import balanced_draws
from fastssl.recipe import UserError

# Similarities held at a time: 128 MiB of float64, whatever the size of the bank.
CHUNK_ELEMENTS = 1 << 24


def knn_accuracy(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test samples, 0 to 1, whose class the k nearest training samples vote for."""
    (accuracy,) = knn_accuracies(
        train_features, train_labels, test_features, test_labels, ks=(k,), temperature=temperature
    ).values()
    return accuracy


def knn_accuracies(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    test_labels: ArrayLike | Tensor,
    *,
    ks: Sequence[int] = (20, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """{k: share of test samples classified rightly, 0 to 1}, all from one search.

    A test class without training samples is an error for each of its samples.
    """
    guesses = knn_predictions(train_features, train_labels, test_features, ks=ks, temperature=temperature)
    label_M = torch.as_tensor(test_labels).cpu()
    return {k: (guess_M == label_M).double().mean().item() for k, guess_M in guesses.items()}


@torch.inference_mode()
def knn_predictions(
    train_features: ArrayLike | Tensor,
    train_labels: ArrayLike | Tensor,
    test_features: ArrayLike | Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:
    """{k: (M,) int64 labels, on the CPU}: the class that the k nearest training samples vote for.

    Features are (N, D) in any float type, labels (N,) integers, both numpy arrays or torch tensors;
    the work happens on the training features' device. A k above the number of training samples is
    shortened to it: all of them vote. Of training samples equally near at rank k, torch.topk's pick
    votes; of classes with equal votes, the smallest label wins.
    """
    bank_ND = F.normalize(torch.as_tensor(train_features).double(), dim=1)
    device = bank_ND.device
    class_C, target_N = torch.unique(torch.as_tensor(train_labels).to(device), return_inverse=True)
    most = min(max(ks), len(bank_ND))

    guesses: dict[int, list[Tensor]] = {k: [] for k in ks}
    for query_BD in torch.as_tensor(test_features).split(max(1, CHUNK_ELEMENTS // len(bank_ND))):
        similarity_BN = F.normalize(query_BD.to(device).double(), dim=1) @ bank_ND.T
        near_BK, neighbour_BK = similarity_BN.topk(most, dim=1)  # nearest first
        # Divided by the nearest one's weight: votes keep their proportions, and none overflows.
        weight_BK = torch.exp((near_BK - near_BK[:, :1]) / temperature)
        vote_BK = target_N[neighbour_BK]
        for k in ks:
            score_BC = near_BK.new_zeros(len(query_BD), len(class_C))
            score_BC.scatter_add_(1, vote_BK[:, :k], weight_BK[:, :k])
            guesses[k].append(class_C[score_BC.argmax(dim=1)].cpu())
    return {k: torch.cat(parts) for k, parts in guesses.items()}


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
    run_dir: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    ks: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    device: str = "auto",
) -> dict:
    """`fastssl eval knn RUN`: the accuracy on data.val with data.train as the bank, kept in
    RUN/eval/knn.json. Returns what that file holds; `results.result_table` prints it."""
    run = run_features(run_dir, train=train, val=val, device=device)
    bank = run.about["train"]
    for k in ks:  # a shortened k would stand under the name of the published one
        if not 1 <= k <= bank["images"]:
            raise UserError(
                f"--k {k} is not between 1 and the {bank['images']} images of {bank['path']}: give one that is."
            )
    accuracies = knn_accuracies(
        torch.as_tensor(run.train.h, device=run.device),
        run.train.label,
        run.val.h,
        run.val.label,
        ks=ks,
        temperature=temperature,
    )
    result = {
        "evaluation": "knn",
        "protocol": "exact kNN on h by cosine similarity, weights exp(similarity / temperature)",
        "settings": {"ks": list(ks), "temperature": temperature},
        "figures": {f"accuracy_k{k}": accuracy for k, accuracy in accuracies.items()},
        **run.about,
    }
    write_result(run_dir, result)
    return result
