"""Build the untrained model of a recipe."""

from fastssl.models.classifier import Classifier
from fastssl.models.ssl_model import SSLModel
from fastssl.recipe import Recipe

Model = SSLModel | Classifier


def build_model(recipe: Recipe) -> Model:
    """An SSLModel, or a Classifier for an objective without a projector. Weights are drawn from torch's generator."""
    return SSLModel(recipe) if recipe.objective.has_projector else Classifier(recipe)
