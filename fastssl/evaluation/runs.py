"""From a run directory to the features of its training and validation images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastssl.beton import read_header
from fastssl.evaluation.features import Features, cached_features, weights_sha256
from fastssl.models import load_model
from fastssl.recipe import UserError, load_recipe


@dataclass(frozen=True)
class RunFeatures:
    train: Features
    val: Features
    device: torch.device  # to evaluate on
    about: dict  # the run, its data and its encoder, as a result's file keeps them


def run_features(
    run_dir: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    device: str = "auto",
) -> RunFeatures:
    """Features of data.train, as data.subset and data.limit limit it, and of data.val of a run's recipe.

    `train` and `val` name other .beton files; one given as `train` is used whole. Raises UserError
    where the run, the files or their labels do not allow an evaluation.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run directory, it has no recipe.yaml: name one that fastssl train "
            "made."
        )
    recipe = load_recipe(run_dir / "recipe.yaml")
    subset, limit = (None, None) if train else (recipe.data.subset, recipe.data.limit)
    train, val = train or recipe.data.train, val or recipe.data.val
    if val is None:
        raise UserError(
            f"{run_dir}/recipe.yaml names no data.val to evaluate on: give one with --val "
            "FILE.beton."
        )
    layouts = {read_header(beton).layout for beton in (train, val)}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)

    model = load_model(run_dir).to(device)
    of_train = cached_features(run_dir, train, model=model, views=recipe.views, subset=subset, limit=limit)
    of_val = cached_features(run_dir, val, model=model, views=recipe.views)
    _check(run_dir, train, of_train, val, of_val)
    about = {
        "run": str(run_dir),
        "encoder_sha256": weights_sha256(model),
        "train": {"path": str(train), "images": len(of_train.label), "subset": subset, "limit": limit},
        "val": {"path": str(val), "images": len(of_val.label)},
        "classes": len(np.unique(of_train.label)),
        "layout": "full" if layouts == {"full"} else "canvas",
        "view": {"size": recipe.views.size, "mean": recipe.views.mean, "std": recipe.views.std},
    }
    return RunFeatures(of_train, of_val, device, about)


def _check(
    run_dir: Path, train: str | Path, of_train: Features, val: str | Path, of_val: Features
) -> None:
    for beton, features in ((train, of_train), (val, of_val)):
        if not np.isfinite(features.h).all():
            raise UserError(
                f"The encoder of {run_dir} gives numbers that are not finite on {beton}: train it "
                "again."
            )
        if (features.label < 0).any():
            raise UserError(
                f"{beton} holds images without labels: name a labelled file with --train or --val."
            )
    classes = np.unique(of_train.label)
    if len(classes) < 2:
        raise UserError(
            f"{train} holds one class only, nothing to tell apart: name another file with --train."
        )
    if not np.isin(of_val.label, classes).any():
        raise UserError(f"{val} shares no class with {train}: name a matching file with --val.")
