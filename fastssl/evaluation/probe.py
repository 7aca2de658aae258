"""The online probe: kNN accuracy of the encoder as it stands, in eval mode; no label touches its weights."""

from collections.abc import Callable

import torch

from fastssl.beton import read_header
from fastssl.evaluation.features import clean_features
from fastssl.evaluation.knn import knn_accuracy
from fastssl.models import SSLModel
from fastssl.recipe import Recipe

BANK = 50_000  # images: all of CIFAR-10, and 4% of ImageNet, whose whole would cost a pass over 1.28 million


def knn_probe(recipe: Recipe) -> Callable[[SSLModel], dict[str, float]]:
    """A function of the model: kNN accuracy on data.val, with up to 50,000 training images as the bank.

    With probe.split=rest, on the images of data.train that data.limit leaves out, as the published CIFAR-10 runs choose
    their checkpoint on 10,000 training images: the test set stays unseen.
    """
    if recipe.probe.split == "val":
        read_header(recipe.data.val)  # a file that is not there is said now, not after hours
    bank = min(BANK, recipe.data.limit or BANK)

    def probe(model: SSLModel) -> dict[str, float]:
        train = clean_features(model, recipe.data.train, recipe.views, limit=bank)
        if recipe.probe.split == "val":
            val = clean_features(model, recipe.data.val, recipe.views, limit=BANK)
        else:
            val = clean_features(model, recipe.data.train, recipe.views, limit=recipe.data.limit, rest=True)
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
