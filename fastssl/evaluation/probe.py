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
    """A function of the model: kNN accuracy on data.val, with up to 50,000 training images as the bank."""
    read_header(recipe.data.val)  # a file that is not there is said now, not after hours
    bank = min(BANK, recipe.data.limit or BANK)

    def probe(model: SSLModel) -> dict[str, float]:
        train = clean_features(model, recipe.data.train, recipe.views, limit=bank)
        val = clean_features(model, recipe.data.val, recipe.views, limit=BANK)
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
