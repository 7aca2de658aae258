"""Checkpoints and run directories back into models. Files from strangers run no code."""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastssl.common.errors import UserError
from fastssl.models.build import Model, build_model
from fastssl.models.exported import load_exported_encoder, load_exported_model
from fastssl.recipe import Recipe

LAST, PREVIOUS = "last.pt", "previous.pt"


class Checkpoint(NamedTuple):
    path: Path
    saved: dict[str, Any]  # what training saved; tensors on the CPU
    sha256: str  # of the file
    warning: str | None = None  # where the newest file was damaged and this is the one before


def find_checkpoints(run_or_checkpoint: str | Path) -> list[Path]:
    """The checkpoint files that a run directory, or the path itself, stands for: the newest first."""
    path = Path(run_or_checkpoint)
    files = [path / "checkpoints" / name for name in (LAST, PREVIOUS)] if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def newest_checkpoint(run_or_checkpoint: str | Path) -> Checkpoint:
    """The last checkpoint of a run, or where that one is damaged the one before it.

    Raises UserError where there is none that can be read.
    """
    files = find_checkpoints(run_or_checkpoint)
    if not files:
        raise UserError(
            f"{run_or_checkpoint} holds no checkpoint: name a run directory of fastssl train or a .pt file."
        )
    damaged = None
    for path in files:
        try:
            found = read_checkpoint(path)
        except UserError as error:
            damaged = damaged or error
            continue
        return found._replace(warning=damaged and f"{damaged} Taking {path}, of step {found.saved['step']}.")
    raise damaged


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint file lies in, if it does."""
    inside = checkpoint.resolve().parent
    return inside.parent if inside.name == "checkpoints" and (inside.parent / "recipe.yaml").is_file() else None


def read_checkpoint(path: Path) -> Checkpoint:
    """What training saved in this file. Raises UserError for a damaged or foreign one."""
    try:
        data = path.read_bytes()
        # torch leaves out the check of the archive's checksums; a flipped bit would become a weight.
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        missing = {"recipe", "model", "step"} - (saved.keys() if isinstance(saved, dict) else set())
    except Exception as error:  # a damaged file raises whatever its bytes happen to lead to
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{path} is not a readable checkpoint, perhaps half-written: {reason}.") from None
    if missing:
        raise UserError(f"{path} is not a checkpoint of fastssl: it lacks {', '.join(sorted(missing))}.")
    return Checkpoint(path, saved, hashlib.sha256(data).hexdigest())


def recipe_in(path: Path, saved: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint holds. Keys that are newer than it have their defaults."""
    try:
        return Recipe.model_validate(saved["recipe"])
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds a recipe that this version of fastssl does not know: {reason}") from None


def load_model(run_or_checkpoint: str | Path) -> Model:
    """The trained model of a run directory, a checkpoint or an exported .safetensors, in eval mode, on the CPU.

    Its weights are their running average where the run kept one (train.ema).
    """
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_model(Path(run_or_checkpoint))
    checkpoint = newest_checkpoint(run_or_checkpoint)
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    return model_from_checkpoint(checkpoint)


def model_from_checkpoint(checkpoint: Checkpoint) -> Model:
    """What `load_model` gives, of a checkpoint that has been read."""
    path, saved = checkpoint.path, checkpoint.saved
    recipe = recipe_in(path, saved)
    try:
        model = build_model(recipe)
        model.load_state_dict(saved["model"] if saved.get("ema") is None else saved["ema"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit its own recipe: {reason}") from None
    return model.eval()


def load_encoder(run_or_checkpoint: str | Path) -> nn.Module:
    """The trained timm backbone alone, in eval mode: images (B, 3, H, W) to features (B, D)."""
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_encoder(Path(run_or_checkpoint))
    return load_model(run_or_checkpoint).encoder


def load_pretrained(model: Model, source: str) -> str:
    """Fill a new model with the weights of `source`, as `model.init` says; returns a line on what came and what not.

    source: a run, a checkpoint or an export of fastssl, or a .safetensors of timm's for this backbone. All of the
    encoder must come from there; projector, classifier, heads and priors come where names and shapes agree.
    """
    if Path(source).suffix == ".safetensors":
        weights, warning = _read_safetensors(Path(source)), None
        if not any(name.startswith("encoder.") for name in weights):  # timm's names; our exports have ours
            weights = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    else:
        path, saved, _, warning = newest_checkpoint(source)
        weights = saved["model"] if saved.get("ema") is None else saved["ema"]
        if not isinstance(weights, dict) or not all(map(_is_dense, weights.values())):
            raise UserError(f"model.init: {path} holds no weights that this version of fastssl knows.")
    own = model.state_dict()
    # BYOL's target starts as a copy of the online network, wherever that comes from.
    online = {name: weights.get(name.removeprefix("target.")) for name in own if name.startswith("target.")}
    weights = {name: t for name, t in online.items() if t is not None} | weights
    fitting = {name: t for name, t in weights.items() if name in own and own[name].shape == t.shape}
    lacking = [name for name in own if name not in fitting]
    of_encoder = [name for name in lacking if name.startswith("encoder.")]
    if of_encoder:
        raise UserError(
            f"model.init: {source} lacks {len(of_encoder)} tensors of this encoder or has them in other shapes, such "
            f"as {of_encoder[0]}: set model.backbone and model.stem as they were there."
        )
    model.load_state_dict(fitting, strict=False)
    warning = f"{warning} " if warning else ""
    rest = f"; {len(lacking)} others start anew, such as {lacking[0]}" if lacking else ""
    return f"{warning}Starting from {source}: {len(fitting)} tensors{rest}."


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.init: {path} is not a readable safetensors file: {error}.") from None
