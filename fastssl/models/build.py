"""From a recipe to its model, untrained."""

from fastssl.models.classifier import Classifier
from fastssl.models.ssl_model import SSLModel
from fastssl.recipe import Recipe

Model = SSLModel | Classifier


def build_model(recipe: Recipe) -> Model:
    """A Classifier for objective.name=supervised, else an SSLModel; weights from torch's global generator."""
    return Classifier(recipe) if recipe.objective.name == "supervised" else SSLModel(recipe)
