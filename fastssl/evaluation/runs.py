"""From a run, or one of its checkpoints, to the encoder that is evaluated and the features of its data."""

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fastssl.beton import data_checksum, read_header, read_index_list, read_labels, read_metadata
from fastssl.common.errors import UserError
from fastssl.evaluation.features import DType, Features, cached_features, weights_sha256
from fastssl.models import Model, build_model
from fastssl.models.checkpoint import LAST, model_from_checkpoint, newest_checkpoint, run_dir_of
from fastssl.recipe import Recipe, load_recipe
from fastssl.views import describe_eval_transform


@dataclass(frozen=True)
class Encoder:
    """A model on its device, and where it comes from."""

    run_dir: Path
    recipe: Recipe  # the run's, with the clean view that was asked for
    model: Model  # eval mode
    device: torch.device
    weights: Path | None  # the file that they come from; None: drawn from the run's seed
    suffix: str  # of the names of its results: "" for the end of the run, else such as "-best", "-untrained"
    sha256: str = field(repr=False)

    @property
    def about(self) -> dict:
        """What every result says of it."""
        return {
            "run": str(self.run_dir),
            "weights": "untrained" if self.weights is None else str(self.weights),
            "encoder_sha256": self.sha256,
            "view": describe_eval_transform(self.recipe.views),
        }


def find_encoder(
    run: str | Path,
    *,
    untrained: bool = False,
    view: Literal["squash", "center"] | None = None,
    device: str = "auto",
) -> Encoder:
    """The encoder of a run directory, or of a checkpoint in one.

    untrained: with the weights that the run began with, drawn from its seed. view: overrides the recipe's views.eval.
    Raises UserError where there is none.
    """
    run = Path(run)
    run_dir = run_dir_of(run) if run.is_file() else run
    if run_dir is None or not (run_dir / "recipe.yaml").is_file():
        raise UserError(
            f"{run} is not a run directory, it has no recipe.yaml: name one that fastssl train made, or a checkpoint "
            "in one."
        )
    recipe = load_recipe(run_dir / "recipe.yaml")
    if view:
        recipe = recipe.model_copy(update={"views": recipe.views.model_copy(update={"eval": view})})
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here: run `fastssl doctor`, or leave it out.")
    device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if untrained:
        if recipe.model.init:
            raise UserError(f"{run_dir} began with the weights of {recipe.model.init}: evaluate those instead.")
        torch.manual_seed(recipe.seed)  # as training.setup.prepare
        weights, suffix, model = None, "-untrained", build_model(recipe).eval()
    else:
        checkpoint = newest_checkpoint(run)
        if checkpoint.warning:
            warnings.warn(checkpoint.warning, stacklevel=2)
        model, weights = model_from_checkpoint(checkpoint), checkpoint.path
        suffix = f"-{weights.stem}" if run.is_file() and weights.name != LAST else ""
    suffix += f"-{view}" if view else ""
    return Encoder(run_dir, recipe, model.to(device), device, weights, suffix, weights_sha256(model))


@dataclass(frozen=True)
class Data:
    """A .beton to fit on or to test on."""

    path: Path
    subset: str | None = None  # as data.subset: the images of a list
    limit: int | None = None  # as data.limit: this many images, drawn at random

    @property
    def about(self) -> dict:
        info = read_header(self.path)
        listed = np.sort(read_index_list(self.path, self.subset)) if self.subset else None
        images = info.num_samples if listed is None else len(listed)
        return {
            "path": str(self.path),
            "images": min(images, self.limit or images),
            "subset": self.subset,
            "subset_sha256": None if listed is None else hashlib.sha256(listed.tobytes()).hexdigest(),
            "limit": self.limit,
            "layout": info.layout,
            "checksum": data_checksum(info),
        }


@dataclass(frozen=True)
class Split:
    """What a classifier is fitted on, and what it is tested on."""

    train: Data
    val: Data
    name: str  # of results: "" for the run's own data, else such as "-val-photos-val"

    @property
    def about(self) -> dict:
        """What every result says of it."""
        train, val = self.train.about, self.val.about
        layout = "full" if train["layout"] == val["layout"] == "full" else "canvas"
        return {"train": train, "val": val, "layout": layout}


def find_split(encoder: Encoder, train: str | Path | None = None, val: str | Path | None = None) -> Split:
    """data.train, as data.subset and data.limit limit it, and data.val of the run, or other files, each whole.

    Raises UserError where the files or their labels do not allow an evaluation.
    """
    data = encoder.recipe.data
    if val is None and data.val is None:
        raise UserError(
            f"{encoder.run_dir}/recipe.yaml names no data.val to evaluate on: give one with --val FILE.beton."
        )
    others = [(kind, Path(path).resolve()) for kind, path in (("train", train), ("val", val)) if path]
    split = Split(
        Data(Path(train)) if train else Data(Path(data.train), data.subset, data.limit),
        Data(Path(val or data.val)),
        "".join(f"-{kind}-{path.parent.name}-{path.stem}" for kind, path in others),
    )
    check_labels(split.train.path, split.val.path, split.train.subset)
    return split


def check_labels(train: Path, val: Path, subset: str | None = None) -> None:
    """That both files have labels, of the training file those that are fitted on, and the same classes."""
    label_N, label_M = labels_of(train, subset), labels_of(val)
    classes = np.unique(label_N)
    if len(classes) < 2:
        raise UserError(f"{train} holds one class only, nothing to tell apart: name another file.")
    if not np.isin(label_M, classes).any():
        raise UserError(f"{val} shares no class with {train}: name a matching file.")
    names = [read_header(path).classes for path in (train, val)]
    if None not in names and names[0] != names[1]:
        one, other = next((a, b) for a, b in zip([*names[0], "none"], [*names[1], "none"]) if a != b)
        raise UserError(
            f"{train} and {val} number their classes differently ({one} and {other} are the same one): build both from "
            "one source, or name a matching file."
        )


def check_draws(encoder: Encoder, draws: int | None) -> None:
    if draws and "h" not in encoder.recipe.embedding.stochastic:
        raise UserError(f"{encoder.run_dir} has no stochastic h to draw from: leave out --draws.")


def indices_of(path: Path) -> np.ndarray:
    """The sample ids in the order of the file."""
    metadata = read_metadata(path)
    if "index" not in metadata.dtype.names:
        raise UserError(
            f"{path} has no field 'index', so no part of it can be fine-tuned on: build it with fastssl build-beton."
        )
    return np.array(metadata["index"])


def labels_of(path: Path, subset: str | Path | None = None) -> np.ndarray:
    """The labels in the order of the file, or of those of its images that a list names; UserError where one lacks."""
    label_N = read_labels(path)
    if subset is not None:
        label_N = label_N[np.isin(indices_of(path), read_index_list(path, subset))]
    if (label_N < 0).any():
        raise UserError(f"{path} holds images without labels: name a labelled file, or a list of its labelled images.")
    return label_N


def features_of(encoder: Encoder, data: Data, dtype: DType = "float32", *, augmented: bool = False) -> Features:
    """`cached_features` of one file by this encoder."""
    return cached_features(
        encoder.run_dir, data.path, model=encoder.model, views=encoder.recipe.views, subset=data.subset,
        limit=data.limit, dtype=dtype, augmented=augmented,
    )  # fmt: skip


def split_features(encoder: Encoder, split: Split, dtype: DType = "float32") -> tuple[Features, Features]:
    """Features of what is fitted on and of what is tested on."""
    return features_of(encoder, split.train, dtype), features_of(encoder, split.val, dtype)
