"""Checkpoints and run directories back into models. Files from strangers run no code."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fastssl.models.exported import load_exported_encoder, load_exported_model
from fastssl.models.ssl_model import SSLModel
from fastssl.recipe import Recipe, UserError


def checkpoint_of(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint file that a run directory, or the path itself, stands for."""
    path = Path(run_or_checkpoint)
    found = path / "checkpoints" / "last.pt" if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{path} holds no checkpoint: name a run directory of fastssl train or a .pt file.")
    return found


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that training saved; tensors on the CPU."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"recipe", "model", "step"} - set(saved)
    except Exception as error:  # a damaged file raises whatever its bytes happen to lead to
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} is not a readable checkpoint, perhaps half-written: {reason}") from None
    if missing:
        raise UserError(f"{path} is not a checkpoint of fastssl: it lacks {', '.join(sorted(missing))}.")
    return saved


def recipe_in(path: Path, saved: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint holds. Keys that are newer than it have their defaults."""
    try:
        return Recipe.model_validate(saved["recipe"])
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds a recipe that this version of fastssl does not know: {reason}") from None


def load_model(run_or_checkpoint: str | Path) -> SSLModel:
    """The trained model of a run directory, a checkpoint or an exported .safetensors, in eval mode, on the CPU."""
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_model(Path(run_or_checkpoint))
    path = checkpoint_of(run_or_checkpoint)
    saved = read_checkpoint(path)
    recipe = recipe_in(path, saved)
    try:
        model = SSLModel(recipe)
        model.load_state_dict(saved["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit its own recipe: {reason}") from None
    return model.eval()


def load_encoder(run_or_checkpoint: str | Path) -> nn.Module:
    """The trained timm backbone alone, in eval mode: images (B, 3, H, W) to features (B, D)."""
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_encoder(Path(run_or_checkpoint))
    return load_model(run_or_checkpoint).encoder
