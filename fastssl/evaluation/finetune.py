"""Fine-tuning all of an encoder on labels: the trainer itself, with the supervised objective, from the run's weights.

So a fine-tune is a run like any other: it logs, saves, resumes and may be looked at, in a folder of RUN/eval/.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import progress
from fastssl.evaluation.features import eval_input, eval_loader, in_fp32, valid_rows
from fastssl.evaluation.metrics import classification_metrics
from fastssl.evaluation.results import EvaluationResult, load_or_compute, save_classification, without_paths
from fastssl.evaluation.runs import BetonSubset, RunEncoder, read_required_labels
from fastssl.models import Classifier, load_model
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import JitterConfig, PerViewConfig, Recipe, ViewsConfig, with_overrides
from fastssl.training import train
from fastssl.views import describe_eval_transform

PROTOCOL = "all of the encoder fine-tuned with a new linear classifier; the last epoch is tested"
# The semi-supervised runs of arXiv 2310.18080, in its published code.
ENCODER_LR, HEAD_LR_FACTOR, WEIGHT_DECAY, FINAL_LR_FACTOR, EPOCHS, BATCH = 1e-4, 10.0, 1e-5, 0.1, 50, 256
LEAST_STEPS = 10  # an epoch: below, the batch is halved (ImageNet's 1 % makes 50 steps of 256)
SETTABLE = ("train", "optim", "views", "log", "checkpoint", "data.workers", "data.decode", "data.resident")  # by --set
# Of the fine-tuning's recipe: what its figures do not depend on, or what a result says elsewhere.
NOT_SETTINGS = {
    **dict.fromkeys(("name", "run", "log", "checkpoint", "probe"), True), "data": {"train", "val", "subset", "workers"},
    "model": {"init"},
}  # fmt: skip
SMALL_IMAGES = 64  # px: up to here the published evaluation view is the squashed image, above its centre


@dataclass(frozen=True)
class FinetuneData:
    """What is fine-tuned on and tested on: .beton files, or parts of them by sample ids."""

    train: Path
    train_list: Path | None  # of sample ids or names; None: all
    train_images: int
    test: Path
    test_rows: np.ndarray | None = None  # None: all


def finetune_view(views: ViewsConfig) -> ViewsConfig:
    """Crop and flip alone for training; for testing the published view: the centre, of small images all."""
    clean = "center" if views.size > SMALL_IMAGES else "squash"
    none = {
        "jitter": JitterConfig(p=0),
        "gray": 0.0,
        "first": PerViewConfig(),
        "second": PerViewConfig(),
        "progressive_resize": None,
    }
    return views.model_copy(update={**none, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "eval": clean})


def finetune_recipe(
    encoder: RunEncoder, labelled: FinetuneData, classes: int, *, seed: int, view: str | None, overrides: list[str]
) -> Recipe:
    """The recipe of a fine-tune: the published one, with `overrides` on top.

    A stochastic h stays so, with the run's draws; the KL has no weight. The used learning rates are the published ones
    at any batch size: AdamW's steps do not grow with the batch.
    """
    run = encoder.recipe
    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides):
        if not any(key == one or key.startswith(f"{one}.") for one in SETTABLE):
            raise UserError(f"--set {override}: fine-tuning sets this itself; it takes {', '.join(SETTABLE)}.")
    batch = BATCH
    while batch > 2 and labelled.train_images < LEAST_STEPS * batch:
        batch //= 2
    views = finetune_view(run.views)
    values = {
        "name": f"{run.name}_finetune",
        "seed": seed,
        "data": {
            "train": str(labelled.train.resolve()),
            "subset": labelled.train_list and str(labelled.train_list.resolve()),
            "workers": run.data.workers,
        },
        "views": views.model_copy(update={"eval": view or views.eval}).model_dump(),
        "model": {"backbone": run.model.backbone, "stem": run.model.stem},
        "embedding": {
            "stochastic": "h" if "h" in run.embedding.stochastic else "none",
            "samples": run.embedding.samples,
            "beta": 0.0,
        },
        "objective": {"name": "supervised", "classes": classes},
        "optim": {
            "name": "adamw",
            "head_lr_factor": HEAD_LR_FACTOR,
            "weight_decay": WEIGHT_DECAY,
            "warmup_epochs": 0,
            "final_lr_factor": FINAL_LR_FACTOR,
            "clip": None,
            "exclude": [],
        },
        "train": {"epochs": EPOCHS, "batch_size": batch, "device": encoder.device.type},
        "probe": {"every": 0},
    }
    recipe = with_overrides(Recipe.model_validate(values), overrides)
    if "optim.lr" in keys or "optim" in keys:
        return recipe
    at_batch_256 = ENCODER_LR * 256 / recipe.train.batch_size
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": at_batch_256})})


def finetune(
    encoder: RunEncoder,
    name: str,
    labelled: FinetuneData,
    *,
    seed: int,
    view: str | None,
    overrides: list[str],
    about: dict,
) -> EvaluationResult:
    """Fine-tune in RUN/eval/NAME-.../, test the last epoch's weights once, and keep RUN/eval/NAME.json.

    about: what the result says beside. A fine-tune that was stopped goes on; a finished one is not done again.
    """
    class_C = np.unique(read_required_labels(labelled.train, labelled.train_list))
    if len(class_C) < 2:
        raise UserError(f"{labelled.train_list or labelled.train} holds one class only: name images of several.")
    recipe = finetune_recipe(encoder, labelled, int(class_C[-1]) + 1, seed=seed, view=view, overrides=overrides)
    settings = recipe.model_dump(mode="json", exclude=NOT_SETTINGS)
    of_view = {"view": describe_eval_transform(recipe.views)}
    request = {"protocol": PROTOCOL, **about, "settings": settings, "seed": seed, **encoder.describe(), **of_view}
    key = hashlib.sha256(json.dumps(without_paths(request)).encode()).hexdigest()[:8]
    folder = encoder.run_dir / "eval" / f"{name}-{key}"

    def measure() -> dict:
        start = write_start_weights(encoder, folder)
        train(
            recipe.model_copy(
                update={
                    "run": recipe.run.model_copy(update={"dir": str(folder)}),
                    "model": recipe.model.model_copy(update={"init": str(start.resolve())}),
                }
            ),
            resume="auto",
        )
        model = load_model(folder).to(encoder.device)
        logits_MC, label_M = test_logits(model, labelled.test, recipe.views)
        rows = slice(None) if labelled.test_rows is None else labelled.test_rows
        # Labels may have gaps: a class of which no image is learnt from is no candidate.
        scores = classification_metrics(logits_MC[rows][:, class_C], label_M[rows], class_C, seed=seed)
        (folder / "checkpoints" / "previous.pt").unlink(missing_ok=True)  # a finished run needs the last one alone
        return {"folder": folder.name, **save_classification(encoder.run_dir, name, scores, labelled.test)}

    return load_or_compute(encoder.run_dir, name, request, measure)


def write_start_weights(encoder: RunEncoder, folder: Path) -> Path:
    """FOLDER/start.safetensors: encoder and h head as they are evaluated, and no classifier that they may have had."""
    path = folder / "start.safetensors"
    weights = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in encoder.model.state_dict().items()
        if name.startswith(("encoder.", "heads.h."))
    }
    with explain_write_errors(path):
        write_atomically(path, lambda beside: save_file(weights, beside))
    return path


@torch.inference_mode()
def test_logits(model: Classifier, beton: Path, views: ViewsConfig) -> tuple[np.ndarray, np.ndarray]:
    """(M, C) logits of the clean views of a .beton, and their labels (M,), in the order of the file."""
    make_input, parts = eval_input(views), []
    loader = eval_loader(BetonSubset(beton), views, next(model.parameters()).device)
    with evaluating(model), progress(f"Testing on {beton}", len(loader.rows), "images") as advance:
        for batch in loader:
            with in_fp32(batch.image.device):
                logits = model.logits(make_input(batch))
            parts.append([valid_rows(x, batch) for x in (logits, batch.label)])
            advance(len(parts[-1][1]))
    logits, labels = zip(*parts, strict=True)
    return np.concatenate(logits), np.concatenate(labels)


def write_sample_list(run_dir: Path, name: str, index: np.ndarray, about: str) -> Path:
    """RUN/eval/NAME.txt: sample ids, one a line, as data.subset reads them."""
    path = run_dir / "eval" / f"{name}.txt"
    text = "\n".join([f"# {about}", *map(str, index.tolist())]) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_text(text))
    return path
