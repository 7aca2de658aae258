"""The checkpoint file of a training run, written and read, and the models in it. Untrusted files run no code."""

import hashlib
import io
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.loading.loader import LoaderState
from fastssl.models.build import Model, build_model
from fastssl.models.exported import load_exported_encoder, load_exported_model, misfit
from fastssl.recipe import Recipe, sentence

LAST, PREVIOUS = "last.pt", "previous.pt"  # in RUN/checkpoints
StateDict = dict[str, Any]


class SavedState(TypedDict):
    """The contents of a checkpoint file, as torch.save writes them."""

    recipe: dict[str, Any]  # Recipe.model_dump(mode="json")
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None  # the moving average of the model, with train.ema
    optimizer: StateDict
    scaler: StateDict  # of the gradients, for fp16
    loader: LoaderState
    skipped: Tensor  # int64 (): steps skipped because they were not finite
    step: int  # optimizer steps, skipped ones included
    decay_epochs: NotRequired[int]  # until the learning rate has its final value
    epochs_probed: int
    best: dict[str, float]
    seconds: float  # of training
    torch_threads: int
    rng: Tensor  # of torch's CPU generator
    cuda_rng: Tensor | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file that has been read."""

    path: Path
    saved: SavedState  # tensors on the CPU
    sha256: str  # of the file
    warning: str | None = None  # where the newest file is damaged and this is the one before it

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's weights: their moving average where the run has one."""
        average = self.saved.get("ema")
        return self.saved["model"] if average is None else average

    @property
    def recipe(self) -> Recipe:
        """The run's recipe. Keys that are newer than the checkpoint have their defaults."""
        try:
            return Recipe.model_validate(self.saved["recipe"])
        except ValidationError as error:
            raise UserError(
                f"{self.path} holds a recipe that this version of fastssl does not know: {sentence(error, Recipe)}"
            ) from None


def write_checkpoint(run_dir: Path, name: str, saved: SavedState) -> None:
    """Write RUN/checkpoints/NAME; the last.pt before it becomes previous.pt.

    A reader sees the old file or the new one, whole. Raises OSError if the disk is full; the old files then stay.
    """
    # Into memory first: torch.save on a full disk raises errors that depend on the part of the archive it was in.
    data = io.BytesIO()
    torch.save(saved, data)
    folder = run_dir / "checkpoints"
    keep = folder / PREVIOUS if name == LAST else None
    write_atomically(folder / name, lambda path: path.write_bytes(data.getbuffer()), keep=keep)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one file. Raises UserError if it is damaged, or no checkpoint of fastssl."""
    try:
        data = path.read_bytes()
        # torch does not verify the archive's checksums; a flipped bit would become a weight.
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        missing = {"recipe", "model", "step"} - (saved.keys() if isinstance(saved, dict) else set())
    except Exception as error:  # damaged bytes raise errors of many types
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{path} is not a readable checkpoint, perhaps half-written: {reason}.") from None
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of fastssl: it lacks {', '.join(sorted(missing))}. Weights from elsewhere are "
            "for model.init, and for fastssl eval --weights FILE --backbone NAME."
        )
    return Checkpoint(path, saved, hashlib.sha256(data).hexdigest())


def find_checkpoints(run_or_checkpoint: str | Path) -> list[Path]:
    """The last.pt and previous.pt of a run directory, those that exist, or the path itself if it is a file."""
    path = Path(run_or_checkpoint)
    files = [path / "checkpoints" / name for name in (LAST, PREVIOUS)] if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def newest_checkpoint(run_or_checkpoint: str | Path) -> Checkpoint:
    """Read the last checkpoint of a run, or the one before it if the last is damaged.

    Raises UserError if no checkpoint can be read.
    """
    files = find_checkpoints(run_or_checkpoint)
    if not files:
        raise UserError(
            f"{run_or_checkpoint} holds no checkpoint: name a run directory of fastssl train or a .pt file."
        )
    errors: list[UserError] = []
    for path in files:
        try:
            found = read_checkpoint(path)
        except UserError as error:
            errors.append(error)
            continue
        warning = f"{errors[0]} Taking {path}, of step {found.saved['step']}." if errors else None
        return replace(found, warning=warning)
    raise errors[0]


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that contains a checkpoint file, or None."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file() else None


def find_run_dir(path: Path) -> Path:
    """The run directory that a user means by its path, or that of `checkpoints`, a file in it, or its only run.

    Raises:
        UserError: if there is no run, or several.
    """
    path = path.expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        for candidate in (folder, folder.parent) if folder.name == "checkpoints" else (folder,):
            if is_run_dir(candidate):
                return candidate
    runs = sorted(child for child in path.iterdir() if is_run_dir(child)) if path.is_dir() else []
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs, such as {runs[0]}: name one of them.")
    if not runs:
        raise UserError(f"{path} holds no run: name a run directory of fastssl train.")
    return runs[0]


def is_run_dir(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() or bool(path.is_dir() and find_checkpoints(path))


def load_model(run_or_checkpoint: str | Path) -> Model:
    """The trained model of a run directory, a checkpoint or an exported .safetensors, in eval mode, on the CPU.

    Its weights are their moving average if the run has one (train.ema).
    """
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_model(Path(run_or_checkpoint))
    checkpoint = newest_checkpoint(run_or_checkpoint)
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    return model_from_checkpoint(checkpoint)


def model_from_checkpoint(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint, as `load_model` returns it."""
    recipe = checkpoint.recipe
    try:
        model = build_model(recipe)
        model.load_state_dict(checkpoint.weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise misfit(checkpoint.path, error) from None
    return model.eval()


def load_encoder(run_or_checkpoint: str | Path) -> nn.Module:
    """The trained timm backbone in eval mode: images (B, 3, H, W) to features (B, D)."""
    if Path(run_or_checkpoint).suffix == ".safetensors":
        return load_exported_encoder(Path(run_or_checkpoint))
    return load_model(run_or_checkpoint).encoder
