"""Models small enough for tests, real in every part."""

from fastssl.recipe import Recipe


def recipe_of(objective: dict, embedding: dict, hidden: int = 16, out: int = 8) -> Recipe:
    """timm's test_resnet: 0.5 million parameters, a real ResNet; 3 draws."""
    return Recipe.model_validate({
        "name": "x", "data": {"train": "x.beton"}, "views": {"size": 32}, "objective": objective,
        "model": {"backbone": "test_resnet", "projector": {"layers": 2, "hidden": hidden, "out": out}},
        "embedding": {"samples": 3, "beta": 0.1, **embedding},
    })  # fmt: skip
