"""Evaluate an encoder that is not a run of fastssl: a file of weights and the name of its backbone."""

import statistics
from pathlib import Path
from typing import Literal

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastssl.beton import beton_file, read_header
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user
from fastssl.common.terminal import printable
from fastssl.evaluation.runs import RunEncoder, find_device, make_results_dir, weights_sha256
from fastssl.models.encoder_only import EncoderOnly
from fastssl.models.image_size import check_image_size
from fastssl.models.pretrained import load_encoder_weights
from fastssl.recipe import Recipe, make_recipe

SMALL_STEM_SIZE = 32  # px; the small stem is for images of 32 to 64 px
SMALL_IMAGES = 64  # px: up to this size the default transform is the squashed image, above it the center crop


def load_foreign_encoder(
    weights: str | Path,
    backbone: str,
    *,
    train: str | Path,
    val: str | Path | None = None,
    stem: Literal["imagenet", "small"] = "imagenet",
    size: int | None = None,
    view: Literal["squash", "center"] | None = None,
    device: str = "auto",
    out_dir: str | Path | None = None,
) -> tuple[RunEncoder, list[str]]:
    """Load a file of weights for evaluation. Returns the encoder and remarks about what was loaded and how it is used.

    Args:
        weights: a file in one of the layouts of docs/training.md.
        backbone: an architecture of timm. With a tag, such as vit_small_patch16_224.augreg_in1k, the evaluation
            transform has the mean, standard deviation and size of those weights of timm, else ImageNet's mean and
            standard deviation.
        train, val: the default files of evaluations. If the images of `train` are not RGB, the first layer is adapted.
        stem: "small" for a ResNet with a 3x3 convolution and no max-pool.
        size: side of the images in px; None: the size that timm names for the backbone, 32 for a small stem.
        view: evaluation transform; None: the center crop above 64 px, else the squashed image.
        device: "cpu", "cuda" or "auto".
        out_dir: folder for results and cached features; None: NAME_eval next to the file NAME.

    Raises:
        UserError: the weights do not fit the backbone, or `out_dir` belongs to something else.
    """
    weights = expand_user(weights)
    train_file, val_file = str(beton_file(train, "train")), str(beton_file(val, "val")) if val else None
    recipe = _recipe_of(weights, backbone, train_file, val_file, stem, size, view)
    chosen = find_device(device)
    folder = expand_user(out_dir) if out_dir else weights.with_name(f"{recipe.name}_eval")
    check_image_size(recipe.model, recipe.views.size, "--size")
    torch.manual_seed(recipe.seed)  # of tensors that the file lacks
    model = EncoderOnly(recipe).eval()
    remarks = load_encoder_weights(model.encoder, recipe, str(weights))
    make_results_dir(folder, recipe, "name another folder with --out-dir")
    views = recipe.views
    remarks.append(
        f"Evaluated at {views.size} px ({views.eval}), mean {_text(views.mean)}, std {_text(views.std)}; results go to "
        f"{folder}/eval."
    )
    suffix = f"-{view}" if view else ""
    return RunEncoder(folder, recipe, model.to(chosen), chosen, weights, suffix, weights_sha256(model)), remarks


def _recipe_of(
    weights: Path, backbone: str, train: str, val: str | None, stem: str, size: int | None, view: str | None
) -> Recipe:
    """The recipe that stands for the encoder: its data, evaluation transform and model."""
    architecture, _, tag = backbone.partition(".")
    if tag and backbone not in (known := timm.list_pretrained(f"{architecture}.*")):
        names = f"use one of {', '.join(known)}" if known else f"use --backbone {architecture}, which has none"
        raise UserError(f"--backbone {backbone}: timm {timm.__version__} has no such weights", hint=names)
    config = timm.get_pretrained_cfg(backbone) if timm.is_model(architecture) else None
    if size is None:
        size = SMALL_STEM_SIZE if stem == "small" else config.input_size[-1] if config else 224
    mean = tuple(config.mean) if tag and config else IMAGENET_DEFAULT_MEAN
    std = tuple(config.std) if tag and config else IMAGENET_DEFAULT_STD
    channels = read_header(train).channels
    if channels != len(mean):  # not RGB: one value for all channels, as the first layer is adapted to them
        mean, std = (statistics.fmean(mean),), (statistics.fmean(std),)
    return make_recipe({
        "name": printable(weights.name.partition(".")[0])[:200] or "weights",
        "data": {"train": train, "val": val},
        "views": {
            "size": size, "eval": view or ("center" if size > SMALL_IMAGES else "squash"),
            "mean": mean, "std": std,
        },
        "model": {"backbone": architecture, "stem": stem, "in_chans": channels, "init": str(weights.resolve())},
        "probe": {"every": 0},
    })  # fmt: skip


def _text(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
