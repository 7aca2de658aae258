"""Models small enough for tests, real in every part."""

from pathlib import Path

import torch

from fastssl.evaluation import BetonSubset, Features, RunEncoder, cached_features
from fastssl.evaluation.runs import weights_sha256
from fastssl.models import Model, build_model
from fastssl.recipe import Recipe, ViewsConfig, load_recipe


def recipe_of(objective: dict, embedding: dict, hidden: int = 16, out: int = 8) -> Recipe:
    """timm's test_resnet: 0.5 million parameters, a real ResNet; 3 draws."""
    return Recipe.model_validate({
        "name": "x", "data": {"train": "x.beton"}, "views": {"size": 32}, "objective": objective,
        "model": {"backbone": "test_resnet", "projector": {"layers": 2, "hidden": hidden, "out": out}},
        "embedding": {"samples": 3, "beta": 0.1, **embedding},
    })  # fmt: skip


def make_run(folder: Path, data: dict, *, seed: int = 0, **sections) -> tuple[Path, Recipe, Model]:
    """A run directory with the checkpoint of an untrained model."""
    recipe = Recipe.model_validate({
        "name": "tiny", "seed": seed, "data": data, "views": {"size": 16},
        "model": {"backbone": "test_resnet", "projector": {"layers": 2, "hidden": 16, "out": 8}}, **sections,
    })  # fmt: skip
    torch.manual_seed(100 + seed)  # not the seed that its recipe starts from
    model = build_model(recipe)
    (folder / "checkpoints").mkdir(parents=True)
    saved = {"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder, recipe, model


def features_of(
    run_dir: Path, beton: Path, *, model: Model, views: ViewsConfig, subset=None, limit=None, **options
) -> Features:
    """`cached_features` by the weights that the model has now."""
    recipe = load_recipe(run_dir / "recipe.yaml").model_copy(update={"views": views})
    encoder = RunEncoder(run_dir, recipe, model, torch.device("cpu"), None, "", weights_sha256(model))
    return cached_features(encoder, BetonSubset(beton, subset, limit), **options)
