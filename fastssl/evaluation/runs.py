"""Load the encoder of a run, and find the images that an evaluation fits and tests on."""

import hashlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import nn

from fastssl.beton import beton_file, data_checksum, read_header, read_index_list
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user, explain_write_errors, make_folder, write_atomically
from fastssl.common.terminal import Advance, console, print_line, progress
from fastssl.evaluation.results import DataDescription, EncoderDescription
from fastssl.loading import SampleSelection, count_labels, require_channels, require_labels
from fastssl.models import Model, build_model
from fastssl.models.checkpoint import (
    LAST,
    find_run_dir,
    model_from_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    run_dir_of,
)
from fastssl.models.encoder_only import EncoderOnly
from fastssl.recipe import Recipe, load_recipe
from fastssl.views import describe_eval_transform

# What to do if images have no labels, for messages.
FIX_TRAIN = "name a labeled file with --train, or list those that have one in the run's data.subset"
FIX_VAL = "name a labeled file with --val"

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class RunEncoder:
    """The model of a run on its device, and where its weights come from."""

    run_dir: Path
    recipe: Recipe  # the run's, with the evaluation transform of this evaluation in views.eval
    model: Model | EncoderOnly  # eval mode; EncoderOnly: of `load_foreign_encoder`
    device: torch.device
    weights: Path | None  # checkpoint file; None: untrained weights, drawn from the run's seed
    suffix: str  # ends the names of its results: "" for the last checkpoint, else such as "-best" or "-untrained"
    sha256: str = field(repr=False)  # weights_sha256 of the model

    def check_channels(self, *files: str | Path) -> None:
        """Raise UserError unless the images of these files have the channels that the encoder takes."""
        for file in files:
            require_channels(file, self.recipe.model.in_chans, f"the encoder of {self.run_dir}", "name another file")

    def progress(self, work: str, total: int, unit: str = "images") -> AbstractContextManager[Advance]:
        """Show how far work on this encoder is, as `terminal.progress`, with the run in the title."""
        return progress(f"{self.run_dir}: {work}", total, unit)

    def describe(self) -> EncoderDescription:
        return {
            "run": str(self.run_dir),
            "weights": "untrained" if self.weights is None else str(self.weights),
            "encoder_sha256": self.sha256,
            "view": describe_eval_transform(self.recipe.views),
        }


def load_run_encoder(
    run: str | Path, *, untrained: bool = False, view: Literal["squash", "center"] | None = None, device: str = "auto"
) -> RunEncoder:
    """Load the model of a run directory or of a checkpoint file for evaluation.

    Args:
        run: a checkpoint file, or a path that `find_run_dir` takes: the last checkpoint of that run is loaded. The
            results for a checkpoint that is in no run directory go to NAME_eval/ next to it.
        untrained: take the weights that the run started from, drawn from its seed, in place of a checkpoint.
        view: evaluation transform; None: the recipe's views.eval.
        device: "cpu", "cuda" or "auto" (a GPU if there is one).

    Raises:
        UserError: there is no run or checkpoint, or no GPU for "cuda".
    """
    run = expand_user(run)
    if run.is_file() and run.suffix in CHECKPOINT_SUFFIXES:
        source, run_dir = run, run_dir_of(run) or directory_of_lone_checkpoint(run)
    else:
        source = run_dir = find_run_dir(run)
    recipe = load_recipe(run_dir / "recipe.yaml")
    if view:
        recipe = recipe.model_copy(update={"views": recipe.views.model_copy(update={"eval": view})})
    chosen_device = find_device(device)
    weights: Path | None = None
    if untrained:
        if recipe.model.init:
            raise UserError(f"{run_dir} began with the weights of {recipe.model.init}", hint="evaluate those instead")
        torch.manual_seed(recipe.seed)  # as training.setup.prepare does
        model, suffix = build_model(recipe).eval(), "-untrained"
    else:
        checkpoint = newest_checkpoint(source)
        if checkpoint.warning:
            warnings.warn(checkpoint.warning, stacklevel=2)
        model, weights = model_from_checkpoint(checkpoint), checkpoint.path
        is_of_run = weights.parent.parent.resolve() == run_dir.resolve()
        suffix = f"-{weights.stem}" if source.is_file() and is_of_run and weights.name != LAST else ""
    if view:
        suffix += f"-{view}"
    return RunEncoder(run_dir, recipe, model.to(chosen_device), chosen_device, weights, suffix, weights_sha256(model))


def find_device(device: str) -> torch.device:
    """Return the device for "cpu", "cuda" or "auto". Raises UserError if there is no GPU for "cuda"."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here", hint="run `fastssl doctor`, or leave out --device")
    return torch.device(device)


def directory_of_lone_checkpoint(path: Path) -> Path:
    """Make the directory for results of a checkpoint that is in no run directory: NAME_eval/ next to it.

    Raises UserError if the file is no checkpoint of fastssl, or as `make_results_dir`.
    """
    recipe = read_checkpoint(path).recipe
    folder = path.with_name(f"{path.stem}_eval")
    make_results_dir(folder, recipe, f"move it, or rename {path}")
    print_line(console(), f"{path} is in no run directory: results go to {folder}.")
    return folder


def make_results_dir(folder: Path, recipe: Recipe, fix: str) -> None:
    """Make the directory for results of weights that are in no run directory. Its recipe.yaml says of which.

    Raises:
        UserError: the folder is a run, or has results of another model, with `fix` as the end of the message.
    """
    file = folder / "recipe.yaml"
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder}, where the results would go, is a run of fastssl train", hint=fix)
    if not file.exists():
        with explain_write_errors(folder):
            make_folder(folder)
            write_atomically(file, recipe.to_yaml())
        return
    old = load_recipe(file)
    if old.model != recipe.model or old.views.model_copy(update={"eval": recipe.views.eval}) != recipe.views:
        raise UserError(f"{folder} has results of other weights, or at another image size", hint=fix)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class BetonSubset:
    """Some or all images of a .beton, chosen as data.subset and data.limit choose them in training."""

    path: Path
    subset: str | None = None  # file that lists sample ids or names; None: all images
    limit: int | None = None  # at most this many of them, drawn at random

    def labels(self, use: str, fix: str, *, skip: int = 0, classes: int = 1) -> np.ndarray:
        """(N,) int64: the labels in the order of the file.

        Args:
            use, fix, classes: as in `require_labels`.
            skip: leave out the first images of the random draw that `limit` makes.

        Raises:
            UserError: one of these images has no label, or they have fewer classes.
        """
        label_N = SampleSelection(self.subset, self.limit, skip).labels(self.path)
        require_labels(self.path, count_labels([label_N]), use, fix, classes)
        return label_N

    def subset_sha256(self) -> str | None:
        """SHA-256 of the sorted ids of the listed images; None without a list."""
        if self.subset is None:
            return None
        return hashlib.sha256(np.sort(read_index_list(self.path, self.subset)).tobytes()).hexdigest()

    def describe(self) -> DataDescription:
        info = read_header(self.path)
        return {
            "path": str(self.path),
            "images": SampleSelection(self.subset, self.limit).count(self.path),
            "subset": self.subset,
            "subset_sha256": self.subset_sha256(),
            "limit": self.limit,
            "layout": info.layout,
            "checksum": data_checksum(info),
        }


class EvaluationDataDescription(TypedDict):
    train: DataDescription
    val: DataDescription
    layout: str  # "full" if both files are, else "canvas"


@dataclass(frozen=True)
class EvaluationData:
    """The images that a classifier is fitted on, and those that it is tested on.

    Raises UserError unless all have labels, of the same classes.
    """

    train: BetonSubset
    val: BetonSubset
    suffix: str = ""  # ends the names of results: "" for the run's own data, else such as "-val-photos-val"

    def __post_init__(self) -> None:
        check_labels(self.train, self.val, "an evaluation with labels", fix_train=FIX_TRAIN, fix_val=FIX_VAL)

    def describe(self) -> EvaluationDataDescription:
        train, val = self.train.describe(), self.val.describe()
        layout = "full" if train["layout"] == val["layout"] == "full" else "canvas"
        return {"train": train, "val": val, "layout": layout}


def find_evaluation_data(
    encoder: RunEncoder,
    train: str | Path | None = None,
    val: str | Path | None = None,
    train_list: str | Path | None = None,
) -> EvaluationData:
    """The run's data.train (with its data.subset and data.limit) and data.val, or other files, all of their images.

    train_list: of the training images only those of this list, in place of data.subset and data.limit.

    Raises:
        UserError: a file is missing, lacks labels, or both do not have the same classes.
    """
    config = encoder.recipe.data
    val_file = val or config.val
    if val_file is None:
        raise UserError(
            f"{encoder.run_dir}/recipe.yaml names no data.val to evaluate on", hint="give one with --val FILE.beton"
        )
    train_file, val_file = beton_file(train or config.train, "train"), beton_file(val_file, "val")
    encoder.check_channels(train_file, val_file)
    given = [
        (kind, file.resolve()) for kind, path, file in (("train", train, train_file), ("val", val, val_file)) if path
    ]
    if train_list:
        train_data = BetonSubset(train_file, str(train_list))
    elif train:
        train_data = BetonSubset(train_file)
    else:
        train_data = BetonSubset(train_file, config.subset, config.limit)
    suffix = "".join(f"-{kind}-{path.parent.name}-{path.stem}" for kind, path in given)
    return EvaluationData(train_data, BetonSubset(val_file), suffix)


def check_labels(
    train: BetonSubset, val: BetonSubset, use: str, *, fix_train: str, fix_val: str, skip: int = 0
) -> None:
    """Raise UserError unless all of these images have labels, of the same classes; other images need none.

    Args:
        use: what needs the labels.
        fix_train, fix_val: what to do if one of the two lacks labels. These are parts of the messages.
        skip: number of images of `val` that are left out, as in `BetonSubset.labels`.
    """
    label_N = train.labels(use, fix_train, classes=2)
    label_M = val.labels(use, fix_val, skip=skip)
    if not np.isin(label_M, label_N).any():
        raise UserError(f"{val.path} shares no class with {train.path}", hint="name a matching file")
    train_names, val_names = read_header(train.path).classes, read_header(val.path).classes
    if train_names is not None and val_names is not None and train_names != val_names:
        pairs = zip([*train_names, "none"], [*val_names, "none"], strict=False)
        one, other = next((a, b) for a, b in pairs if a != b)
        raise UserError(
            f"{train.path} and {val.path} number their classes differently ({one} and {other} are the same one)",
            hint="build both from one source, or name a matching file",
        )


def check_draws(encoder: RunEncoder, draws: int | None) -> None:
    """Raise UserError if draws of h are requested from an encoder whose h is deterministic."""
    if draws and "h" not in encoder.recipe.embedding.stochastic:
        raise UserError(f"{encoder.run_dir} has no stochastic h to draw from", hint="leave out --draws")
