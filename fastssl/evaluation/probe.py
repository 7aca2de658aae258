"""The online probe: kNN accuracy of the encoder during training, in eval mode. No label changes its weights."""

import torch

from fastssl.beton import beton_file
from fastssl.common.errors import UserError
from fastssl.evaluation.features import compute_features
from fastssl.evaluation.knn import knn_accuracy
from fastssl.evaluation.runs import BetonSubset, check_labels
from fastssl.loading import SampleSelection, require_channels
from fastssl.models import Model
from fastssl.recipe import Recipe
from fastssl.training.loop import Probe
from fastssl.training.setup import training_file

MAX_IMAGES = 50_000  # of either side: all of CIFAR-10, and 4 % of ImageNet, where all would be a pass over 1.28 million


def probe_from_recipe(recipe: Recipe) -> Probe | None:
    """The probe of a recipe; None without probe.every, or without images to test on."""
    if not recipe.probe.every or not (recipe.data.val or recipe.probe.split == "rest"):
        return None
    require_channels(training_file(recipe), recipe.model.in_chans)  # an error here is not the probe's
    try:
        return knn_probe(recipe)
    except UserError as error:
        raise error.prefixed("The kNN probe cannot run, and probe.every=0 leaves it out: ") from None


def knn_probe(recipe: Recipe) -> Probe:
    """A function that returns {"knn": accuracy} of a model.

    Up to 50,000 images of probe.train, else of data.train, are searched for neighbors.

    It is tested on data.val. With probe.split=rest it is tested on those images of data.train that data.limit leaves
    out, as the published CIFAR-10 runs choose their checkpoint on 10,000 training images: the test set stays unseen.

    Raises:
        UserError: there are no such images, or some have no label, or both parts do not have the same classes.
    """
    config = recipe.data
    if recipe.probe.train:
        bank = BetonSubset(beton_file(recipe.probe.train, "train"), limit=MAX_IMAGES)
    else:
        bank = BetonSubset(training_file(recipe), config.subset, min(MAX_IMAGES, config.limit or MAX_IMAGES))
    if recipe.probe.split == "rest":
        tested, skip = BetonSubset(bank.path, config.subset, MAX_IMAGES), config.limit or 0
    else:
        tested, skip = BetonSubset(beton_file(config.val or "", "val"), limit=MAX_IMAGES), 0
    # Checked now, so that a missing file or label is reported before the training, not hours later.
    if recipe.probe.train:
        require_channels(bank.path, recipe.model.in_chans, fix="set another probe.train")
    if recipe.probe.split == "val":
        require_channels(tested.path, recipe.model.in_chans, fix="set another data.val")
    images = SampleSelection(tested.subset).count(tested.path)
    if recipe.probe.split == "rest" and images <= skip:
        raise UserError(
            f"probe.split=rest finds no images: data.limit={skip} leaves out none of the {images} images of "
            f"{tested.path}",
            hint="lower data.limit, or set probe.split=val",
        )
    fix_val = "set another data.val"
    if recipe.probe.train:
        fix_train = "set another probe.train"
    elif recipe.probe.split == "rest":
        fix_train = fix_val = "list images with labels of several classes in data.subset"
    else:
        fix_train = "set probe.train to labeled images of several classes"
    check_labels(bank, tested, "the kNN probe", fix_train=fix_train, fix_val=fix_val, skip=skip)

    def probe(model: Model) -> dict[str, float]:
        train = compute_features(model, bank, recipe.views)
        test = compute_features(model, tested, recipe.views, skip=skip)
        bank_ND = torch.as_tensor(train.h, device=next(model.parameters()).device)
        k = min(recipe.probe.k, len(train.h))
        return {"knn": knn_accuracy(bank_ND, train.label, test.h, test.label, k=k)}

    return probe
