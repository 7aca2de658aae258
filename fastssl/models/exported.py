"""The safetensors file of `fastssl export`: weights under the model's names, the recipe as JSON in the header.

Reading one runs no code: a header, numbers, and a recipe that is checked like any other.
"""

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.common.errors import UserError
from fastssl.models.build import Model, build_model
from fastssl.models.encoder import build_encoder
from fastssl.recipe import Recipe

ENCODER = "encoder."
TRAINING_ONLY = ("predictor.", "target.")  # of BYOL; no file that was exported holds them


def write_exported(path: Path, model: Model, recipe: Recipe, header: dict[str, str], whole: bool) -> None:
    """The encoder alone, or `whole`: projector or classifier, heads and priors too, all but what training alone needs.

    header: further entries, for people and other programs. The recipe is kept without the folders of this machine.
    """
    wanted = {
        name: weight
        for name, weight in model.state_dict().items()
        if name.startswith(ENCODER) or (whole and not name.startswith(TRAINING_ONLY))
    }
    # A VampPrior shares its head's tensors, and safetensors refuses to keep one storage twice.
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in wanted.items()}
    save_file(weights, path, metadata={**header, "recipe": without_folders(recipe).model_dump_json()})


def load_exported_model(path: Path) -> Model:
    """The model in eval mode, on the CPU. BYOL's predictor and target, which only training needs, are not there."""
    recipe, weights = _read(path)
    try:
        model = build_model(recipe)
        if model.target is not None:
            model.target = model.predictor = None
        missing, unknown = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(path, error) from None
    if all(name.startswith(ENCODER) for name in weights) and missing:
        raise UserError(
            f"{path} holds the encoder alone: fastssl.load_encoder reads it; load_model needs a file that "
            "fastssl export made with --sigma, or the run."
        )
    if missing or unknown:
        raise _misfit(path, f"missing {missing[:3]}, unknown {unknown[:3]}")
    return model.eval()


def load_exported_encoder(path: Path) -> nn.Module:
    """The timm backbone in eval mode, on the CPU, out of a file with or without the rest of the model."""
    recipe, weights = _read(path)
    own = {name.removeprefix(ENCODER): weight for name, weight in weights.items() if name.startswith(ENCODER)}
    try:
        encoder = build_encoder(recipe.model.backbone, recipe.model.stem, recipe.views.size)
        encoder.load_state_dict(own)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(path, error) from None
    return encoder.eval()


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the last two parts of its paths, such as imagenet/train.beton, and no run.dir.

    What is published should not tell where its maker keeps files.
    """
    keys = ("train", "val", "subset")
    data = {key: short_path(path) for key in keys if (path := getattr(recipe.data, key)) is not None}
    init = recipe.model.init and short_path(recipe.model.init)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "model": recipe.model.model_copy(update={"init": init}),
            "run": recipe.run.model_copy(update={"dir": None}),
        }
    )


def short_path(path: str) -> str:
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


def _read(path: Path) -> tuple[Recipe, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "recipe" not in header:
                raise UserError(
                    f"{path} is not a file of fastssl export --format safetensors: if it holds a timm backbone, "
                    "timm.create_model(..., checkpoint_path=...) reads it."
                )
            recipe = Recipe.model_validate_json(header["recipe"])
            return recipe, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {_short(error)}") from None
    except ValidationError as error:
        raise UserError(f"{path} holds a recipe that this version of fastssl does not know: {_short(error)}") from None


def _misfit(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: its weights do not fit its own recipe: {_short(reason)}")


def _short(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
