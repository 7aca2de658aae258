"""The safetensors file of `fastssl export`, written and read: weights under our names, the recipe in its header.

Reading one runs no code: it holds numbers, and a recipe in JSON that is checked like any other.
"""

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.common.errors import UserError, in_short, is_out_of_memory
from fastssl.common.files import open_regular
from fastssl.models.build import Model, build_model
from fastssl.models.encoder import encoder_of
from fastssl.models.memory import require_memory
from fastssl.recipe import Recipe, explain

ENCODER = "encoder."
TRAINING_ONLY = ("predictor.", "target.")  # of BYOL; they are not exported


def write_exported(path: Path, model: Model, recipe: Recipe, header: dict[str, str], whole: bool) -> None:
    """Write a model.

    Args:
        header: metadata for people and other programs, added to the recipe, which is written without folders.
        whole: False for the encoder only; True for projector or classifier, heads and priors too.
    """
    wanted = {
        name: weight
        for name, weight in model.state_dict().items()
        if name.startswith(ENCODER) or (whole and not name.startswith(TRAINING_ONLY))
    }
    # Copies, because a VampPrior shares the tensors of its head, and safetensors refuses to store a tensor twice.
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in wanted.items()}
    save_file(weights, path, metadata={**header, "recipe": without_folders(recipe).model_dump_json()})


def load_exported_model(path: Path) -> Model:
    """The model in eval mode, on the CPU, without BYOL's predictor and target, which only training needs."""
    recipe, weights = _read(path)
    try:
        model = build_model(recipe)
        if model.target is not None:
            model.target = model.predictor = None
        missing, unknown = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, AttributeError, UserError) as error:
        raise misfit(path, error) from None
    if all(name.startswith(ENCODER) for name in weights) and missing:
        raise UserError(
            f"{path} holds the encoder only",
            hint="read it with fastssl.load_encoder, or export the run with --sigma for load_model",
        )
    if missing or unknown:
        raise misfit(path, f"missing {missing[:3]}, unknown {unknown[:3]}")
    return model.eval()


def load_exported_encoder(path: Path) -> nn.Module:
    """The timm backbone in eval mode, on the CPU, from a file with or without the rest of the model."""
    recipe, weights = _read(path)
    own = {name.removeprefix(ENCODER): weight for name, weight in weights.items() if name.startswith(ENCODER)}
    try:
        with torch.device("meta"):
            require_memory(encoder_of(recipe))
        encoder = encoder_of(recipe)
        encoder.load_state_dict(own)
    except (RuntimeError, TypeError, AttributeError, UserError) as error:
        raise misfit(path, error) from None
    return encoder.eval()


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with only the last two parts of its paths, such as imagenet/train.beton, and without run.dir.

    A published file should not reveal the folders of its author.
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
    """The last two parts of a path."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


def _read(path: Path) -> tuple[Recipe, dict[str, Tensor]]:
    try:
        open_regular(path).close()  # safe_open would wait at a named pipe
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "recipe" not in header:
                raise UserError(
                    f"{path} is not a file of fastssl export --format safetensors",
                    hint="if it holds a timm backbone, read it with timm.create_model(..., checkpoint_path=...)",
                )
            recipe = Recipe.model_validate_json(header["recipe"])
            return recipe, {name: check_dense(file.get_tensor(name)) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is not a readable safetensors file ({in_short(error)})", hint="copy it again, or name another file"
        ) from None
    except ValidationError as error:
        raise UserError(
            f"{path} holds a recipe that this version of fastssl does not know: {explain(error, Recipe).message}",
            hint="use the version that wrote it",
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # tensors of a type that torch or fastssl lacks
        raise misfit(path, error) from None


def check_dense(tensor: Tensor) -> Tensor:
    """Raise ValueError unless a tensor holds plain numbers, each of them in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        raise ValueError(f"a tensor of a kind that no weights have ({tensor.layout}, {tensor.dtype}, {tensor.device})")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor that repeats its numbers")
    return tensor


def misfit(path: Path, reason: object) -> Exception:
    """The error for a file whose weights do not match its recipe, or whose recipe asks for too large a model."""
    if isinstance(reason, UserError):
        return reason.prefixed(f"{path}: ")
    if isinstance(reason, Exception) and is_out_of_memory(reason):
        return reason
    return UserError(f"{path}: its weights do not fit its own recipe ({in_short(reason)})", hint="export the run again")
