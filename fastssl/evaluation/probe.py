"""The online probe: kNN accuracy of the encoder as it stands, in eval mode; no label touches its weights."""

from collections.abc import Callable
from pathlib import Path

import torch

from fastssl.common.errors import UserError
from fastssl.evaluation.features import compute_features
from fastssl.evaluation.knn import knn_accuracy
from fastssl.evaluation.runs import BetonSubset
from fastssl.loading import SampleSelection
from fastssl.models import Model
from fastssl.recipe import Recipe

BANK = 50_000  # images: all of CIFAR-10, and 4% of ImageNet, whose whole would cost a pass over 1.28 million


def probe_of(recipe: Recipe) -> Callable[[Model], dict[str, float]] | None:
    """The probe that a recipe asks for: none without probe.every, or without images to look at."""
    wanted = recipe.probe.every and (recipe.data.val or recipe.probe.split == "rest")
    return knn_probe(recipe) if wanted else None


def knn_probe(recipe: Recipe) -> Callable[[Model], dict[str, float]]:
    """A function of the model: kNN accuracy on data.val, with up to 50,000 training images as the bank.

    The bank's are images that the run trains on. With probe.split=rest, on the images of data.train (of data.subset)
    that data.limit leaves out, as the published CIFAR-10 runs choose their checkpoint on 10,000 training images: the
    test set stays unseen.
    """
    data, rest = recipe.data, recipe.probe.split == "rest"
    probed = data.train if rest else data.val
    subset = data.subset if rest else None
    images = SampleSelection(subset).count(probed)  # a file that is not there is said now, not after hours
    if rest and images <= data.limit:
        raise UserError(
            f"probe.split=rest has nothing to look at: data.limit={data.limit} leaves out none of the {images} images "
            f"of {probed}; lower it, or set probe.split=val."
        )
    bank, skip = min(BANK, data.limit or BANK), data.limit if rest else 0

    def probe(model: Model) -> dict[str, float]:
        train = compute_features(model, BetonSubset(Path(data.train), data.subset, bank), recipe.views)
        val = compute_features(model, BetonSubset(Path(probed), subset, BANK), recipe.views, skip=skip)
        device = next(model.parameters()).device
        accuracy = knn_accuracy(
            torch.as_tensor(train.h, device=device),
            train.label,
            val.h,
            val.label,
            k=min(recipe.probe.k, len(train.h)),
        )
        return {"knn": accuracy}

    return probe
