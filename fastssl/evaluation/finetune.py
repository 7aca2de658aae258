"""Fine-tuning of the whole encoder on labels: a training run with the supervised objective, from the run's weights.

Like any other run it logs, saves and resumes. Its run directory lies in RUN/eval/. The semi-supervised evaluation
fine-tunes on 1 % or 10 % of the labels (SimCLR, arXiv 2002.05709).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from fastssl.beton import read_index_list, read_metadata
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, make_folder, write_atomically
from fastssl.evaluation.features import eval_input, eval_loader, in_fp32, valid_rows
from fastssl.evaluation.metrics import classification_metrics
from fastssl.evaluation.results import RESULT, EvaluationResult, load_or_compute, save_classification, without_paths
from fastssl.evaluation.runs import BetonSubset, EvaluationData, RunEncoder
from fastssl.evaluation.splits import stratified_share
from fastssl.loading import SampleSelection
from fastssl.models import Classifier, load_model
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import JitterConfig, PerViewConfig, Recipe, ViewsConfig, make_recipe
from fastssl.training import train
from fastssl.views import describe_eval_transform

PROTOCOL = "all of the encoder fine-tuned with a new linear classifier; the last epoch is tested"
# The semi-supervised runs of arXiv 2310.18080, in its published code.
ENCODER_LR = 1e-4
EPOCHS, BATCH_SIZE = 50, 256
OPTIM = {
    "name": "adamw", "head_lr_factor": 10.0, "weight_decay": 1e-5, "warmup_epochs": 0, "final_lr_factor": 0.1,
    "clip": None, "exclude": [],
}  # fmt: skip
CROP_AND_FLIP = {
    "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": JitterConfig(p=0), "gray": 0.0,
    "first": PerViewConfig(), "second": PerViewConfig(), "progressive_resize": None,
}  # fmt: skip
SMALL_IMAGES = 64  # px: up to this size the published evaluation view is the squashed image, above it the center
MIN_STEPS = 10  # per epoch; with fewer, the batch size is halved (1 % of ImageNet makes 50 steps of 256)
SETTABLE = ("train", "optim", "views", "log", "checkpoint", "data.workers", "data.resident")  # by --set
# Keys of the fine-tuning recipe that its metrics do not depend on, or that other fields of a result hold.
NOT_SETTINGS: dict[str, Any] = {
    "name": True, "run": True, "log": True, "checkpoint": True, "probe": True,
    "data": {"train", "val", "subset", "workers"}, "model": {"init"},
}  # fmt: skip


def evaluate_semisup(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    percent: float = 1.0,
    list_file: Path | None = None,
    seed: int = 0,
    view: str | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationResult:
    """Fine-tune on some images of data.train and test on data.val. Cached in RUN/eval/semisup-1percent-seed0.json.

    The list of the images is written next to the result.

    Args:
        data: the images. The subset and limit of data.train do not apply.
        percent: of the images of every class, drawn from `seed`: the same ones for every encoder.
        list_file: the images instead, one name or sample id per line, such as SimCLR's lists for ImageNet.
        view: evaluation transform of the test; None: the published one.
        overrides: KEY=VALUE of the fine-tuning recipe.
    """
    evaluation = f"semisup-{list_file.stem}" if list_file else f"semisup-{percent:g}percent"
    name = f"{evaluation}-seed{seed}{encoder.suffix}{f'-{view}' if view else ''}{data.suffix}"
    train = data.train.path
    if list_file:
        index_N, part = read_index_list(train, list_file), "a list"
    else:
        label_N = BetonSubset(train).labels("a share of every class", "list those that have one with --list")
        rows = stratified_share(label_N, percent / 100, seed)
        index_N, part = read_sample_ids(train)[rows], f"{percent:g} % of every class, drawn with seed {seed}"
    listed = BetonSubset(train, str(write_sample_list(encoder.run_dir, name, index_N, part)))
    description = data.describe()
    description["train"] |= {
        "images": len(index_N), "subset": None, "subset_sha256": None, "limit": None, "part": part,
        "list": str(list_file) if list_file else None, "list_sha256": listed.subset_sha256(),
    }  # fmt: skip
    request = {"evaluation": evaluation, **description}
    few = EvaluationData(listed, data.val)
    return finetune(encoder, name, few, seed=seed, view=view, overrides=overrides, request=request)


def finetune(
    encoder: RunEncoder,
    name: str,
    data: EvaluationData,
    *,
    seed: int,
    view: str | None,
    overrides: Sequence[str],
    request: Mapping[str, Any],
    test_rows: np.ndarray | None = None,
) -> EvaluationResult:
    """Fine-tune in RUN/eval/NAME-.../ and test the weights of the last epoch. Cached in RUN/eval/NAME.json.

    A training that was stopped is resumed.

    Args:
        view: evaluation transform of the test; None: the published one.
        overrides: KEY=VALUE of the fine-tuning recipe.
        request: `evaluation` and the descriptions of the data, for the result.
        test_rows: rows of data.val to test on; None: all.
    """
    class_C = np.unique(SampleSelection(data.train.subset).labels(data.train.path))
    recipe = finetune_recipe(encoder, data.train, int(class_C[-1]) + 1, seed=seed, view=view, overrides=overrides)
    request = {
        "protocol": PROTOCOL,
        **request,
        "settings": recipe.model_dump(mode="json", exclude=NOT_SETTINGS),
        "seed": seed,
        **encoder.describe(),
        "view": describe_eval_transform(recipe.views),
    }
    key = hashlib.sha256(json.dumps(without_paths(request)).encode()).hexdigest()[:8]
    folder = encoder.run_dir / "eval" / f"{name}-{key}"

    def compute() -> dict[str, Any]:
        start = write_start_weights(encoder, folder)
        run = recipe.run.model_copy(update={"dir": str(folder)})
        model_config = recipe.model.model_copy(update={"init": str(start.resolve())})
        train(recipe.model_copy(update={"run": run, "model": model_config}), resume="auto")
        model = cast(Classifier, load_model(folder).to(encoder.device))
        logits_MC, label_M = test_logits(encoder, model, data.val.path, recipe.views)
        rows = slice(None) if test_rows is None else test_rows
        # Labels may have gaps. A class without training images is no candidate.
        result = classification_metrics(logits_MC[rows][:, class_C], label_M[rows], class_C, seed=seed)
        # A finished run needs its last checkpoint only.
        (folder / "checkpoints" / "previous.pt").unlink(missing_ok=True)
        return {"folder": folder.name, **save_classification(encoder.run_dir, name, result, data.val.path)}

    return load_or_compute(encoder.run_dir, name, request, compute, RESULT)


def finetune_recipe(
    encoder: RunEncoder, train_data: BetonSubset, classes: int, *, seed: int, view: str | None, overrides: Sequence[str]
) -> Recipe:
    """The recipe of the published fine-tuning, with `overrides` applied.

    A stochastic h stays stochastic, with the draws of the run and a KL weight of 0. The learning rates are the
    published ones at any batch size, as the steps of AdamW do not grow with it.
    """
    run = encoder.recipe
    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if not any(key == settable or key.startswith(f"{settable}.") for settable in SETTABLE):
            raise UserError(
                f"--set {override}: fine-tuning sets this itself",
                hint=f"leave it out, as --set takes {', '.join(SETTABLE)}",
            )
    images = SampleSelection(train_data.subset).count(train_data.path)
    batch_size = BATCH_SIZE
    while batch_size > 2 and images < MIN_STEPS * batch_size:
        batch_size //= 2
    published_view = "center" if run.views.size > SMALL_IMAGES else "squash"
    subset = train_data.subset and str(Path(train_data.subset).resolve())
    stochastic = "h" if "h" in run.embedding.stochastic else "none"
    values = {
        "name": f"{run.name[:190]}_finetune",
        "seed": seed,
        "data": {"train": str(train_data.path.resolve()), "subset": subset, "workers": run.data.workers},
        "views": run.views.model_copy(update={**CROP_AND_FLIP, "eval": view or published_view}).model_dump(),
        "model": {"backbone": run.model.backbone, "stem": run.model.stem, "in_chans": run.model.in_chans},
        "embedding": {"stochastic": stochastic, "samples": run.embedding.samples, "beta": 0.0},
        "objective": {"name": "supervised", "classes": classes},
        "optim": OPTIM,
        "train": {"epochs": EPOCHS, "batch_size": batch_size, "device": encoder.device.type},
        "probe": {"every": 0},
    }
    recipe = make_recipe(values, overrides)
    if "optim.lr" in keys or "optim" in keys:
        return recipe
    # optim.lr is the rate at batch size 256, and is scaled by batch_size / 256 in training.
    lr = ENCODER_LR * 256 / recipe.train.batch_size
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": lr})})


def write_start_weights(encoder: RunEncoder, folder: Path) -> Path:
    """Write FOLDER/start.safetensors: the weights of the encoder and of its stochastic h, but of no classifier."""
    path = folder / "start.safetensors"
    weights = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in encoder.model.state_dict().items()
        if name.startswith(("encoder.", "heads.h."))
    }
    header = {"recipe": encoder.recipe.model_dump_json()}  # for an error about another views.size
    with explain_write_errors(path):
        make_folder(folder.parent)
        make_folder(folder)
        write_atomically(path, to_safetensors(weights, header))  # save_file raises errors of its own on a full disk
    return path


@torch.inference_mode()
def test_logits(
    encoder: RunEncoder, model: Classifier, beton: Path, views: ViewsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (M, C) under the evaluation transform, and labels (M,), in the order of the file.

    encoder: what the model was fine-tuned from.
    """
    make_input = eval_input(views)
    logits, labels = [], []
    loader = eval_loader(BetonSubset(beton), views, next(model.parameters()).device)
    with evaluating(model), encoder.progress(f"testing on {beton}", len(loader.rows)) as advance:
        for batch in loader:
            with in_fp32(batch.index.device):
                logits_BC = model.logits(make_input(batch))
            logits.append(valid_rows(logits_BC, batch))
            labels.append(valid_rows(batch.label, batch))
            advance(len(labels[-1]))
    return np.concatenate(logits), np.concatenate(labels)


def read_sample_ids(path: Path) -> np.ndarray:
    """(N,) sample ids in the order of the file."""
    metadata = read_metadata(path)
    if "index" not in (metadata.dtype.names or ()):
        raise UserError(
            f"{path} has no field 'index', so no part of it can be fine-tuned on",
            hint="build it with fastssl build-beton",
        )
    return np.array(metadata["index"])


def write_sample_list(run_dir: Path, name: str, index_N: np.ndarray, title: str) -> Path:
    """Write RUN/eval/NAME.txt: one sample id per line, in the format of data.subset."""
    path = run_dir / "eval" / f"{name}.txt"
    with explain_write_errors(path):
        make_folder(path.parent)
        write_atomically(path, "\n".join([f"# {title}", *map(str, index_N.tolist())]) + "\n")
    return path
