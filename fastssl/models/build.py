"""Build the untrained model of a recipe."""

import torch

from fastssl.models.classifier import Classifier
from fastssl.models.memory import require_memory
from fastssl.models.ssl_model import SSLModel
from fastssl.recipe import Recipe

Model = SSLModel | Classifier


def build_model(recipe: Recipe) -> Model:
    """An SSLModel, or a Classifier for an objective without a projector. Weights are drawn from torch's generator.

    Raises UserError if its weights are larger than the free memory.
    """
    require_memory(outline_model(recipe))
    return _assemble(recipe)


def outline_model(recipe: Recipe) -> Model:
    """The model on the meta device: its shapes, without memory and without a change of torch's generator."""
    with torch.device("meta"):
        return _assemble(recipe)


def _assemble(recipe: Recipe) -> Model:
    return SSLModel(recipe) if recipe.objective.has_projector else Classifier(recipe)
