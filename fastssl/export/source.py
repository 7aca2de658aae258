"""The run that is exported: its model, and what checkpoint and run directory tell about it."""

import importlib.metadata
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from fastssl.common.errors import UserError
from fastssl.evaluation.results import read_json_object
from fastssl.evaluation.runs import weights_sha256
from fastssl.models import Model
from fastssl.models.checkpoint import model_from_checkpoint, newest_checkpoint, run_dir_of
from fastssl.recipe import Recipe
from fastssl.training.tracking import parse_metrics
from fastssl.views import describe_eval_transform


@dataclass(frozen=True)
class EvaluationSummary:
    """One result in RUN/eval/."""

    name: str
    metrics: dict[str, float]
    images: int | None  # number of images that it was measured on; None: not known
    data: str | None  # path of the .beton file that it was measured on; None: not known


@dataclass
class Source:
    """A trained model and everything that its run tells about it."""

    model: Model  # eval mode, on the CPU
    recipe: Recipe
    checkpoint: Path
    checkpoint_sha256: str
    step: int | None  # optimizer steps done; None: the checkpoint does not tell
    epochs_done: int | None  # None: the checkpoint does not tell
    run_dir: Path | None  # None: the checkpoint is not in a run directory, and nothing below is known
    environment: dict[str, object] = field(default_factory=dict)  # environment.json
    results: list[EvaluationSummary] = field(default_factory=list)
    probe: dict[str, float] | None = None  # metrics of the last probe up to the exported step, and its `step`
    train_images: int | None = None  # number of training images
    stale: list[str] = field(default_factory=list)  # files with results of other weights
    damaged: list[str] = field(default_factory=list)  # files that could not be read

    @property
    def spaces(self) -> str:
        """The stochastic embeddings: "h", "z", "hz", or "" for a deterministic run."""
        return self.recipe.embedding.stochastic.replace("none", "")

    @property
    def header(self) -> dict[str, str]:
        """The metadata of the exported file. The formats only allow strings, so lists and objects are JSON."""
        return {
            "fastssl_version": importlib.metadata.version("fastssl-trainer"),
            "name": self.recipe.name,
            "backbone": self.recipe.model.backbone,
            "stem": self.recipe.model.stem,
            "in_chans": str(self.recipe.model.in_chans),
            "stochastic": self.recipe.embedding.stochastic,
            "eval_transform": json.dumps(describe_eval_transform(self.recipe.views)),
            "checkpoint_sha256": self.checkpoint_sha256,
        }


def read_run(run: str | Path) -> Source:
    """Load a run directory or a checkpoint file. Raises UserError if it holds no sound model."""
    checkpoint = newest_checkpoint(run)
    path, saved = checkpoint.path, checkpoint.saved
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    # With gradients, torch.export keeps views in some attention layers (relpos, maxvit) that ONNX refuses.
    model = model_from_checkpoint(checkpoint).requires_grad_(False)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite: export an earlier checkpoint, or train again.")
    loader = saved.get("loader")
    epochs_done = _count(loader.get("epoch")) if isinstance(loader, dict) else None
    step = _count(saved["step"])
    run_dir = run_dir_of(path)
    source = Source(model, checkpoint.recipe, path, checkpoint.sha256, step, epochs_done, run_dir)
    if run_dir is None:
        return source

    environment = run_dir / "environment.json"
    if environment.is_file():
        source.environment = read_json_object(environment) or {}
        if not source.environment:
            source.damaged.append(environment.name)
    sha256 = weights_sha256(model)
    for file in sorted((run_dir / "eval").glob("*.json")):
        result = read_json_object(file)
        if result is None:
            source.damaged.append(f"eval/{file.name}")
        elif result.get("encoder_sha256", sha256) != sha256 and result.get("weights") != "untrained":
            source.stale.append(f"eval/{file.name}")
        elif result.get("weights") != "untrained":
            val = result.get("val")
            val = val if isinstance(val, dict) else {}
            data = val.get("path")
            source.results.append(
                EvaluationSummary(
                    name=str(result.get("evaluation", file.stem)),
                    metrics=_numbers(result.get("metrics")),
                    images=_count(val.get("images")),
                    data=data if isinstance(data, str) else None,
                )
            )
            train = result.get("train")
            if isinstance(train, dict) and train.get("path") == source.recipe.data.train:
                source.train_images = _count(train.get("images"))
    source.probe = last_probe(run_dir / "metrics.jsonl", step)
    return source


def last_probe(path: Path, last_step: int | None) -> dict[str, float] | None:
    """The last line of metrics.jsonl that holds a probe, up to `last_step`; invalid lines are skipped."""
    if not path.is_file():
        return None
    last = None
    for entry in parse_metrics(path.read_text(errors="replace").splitlines()):
        metrics = _numbers(entry)
        is_probe = "loss" not in entry and metrics.keys() - {"step", "epoch"}
        if is_probe and (last_step is None or metrics["step"] <= last_step):
            last = metrics
    return last


def _count(value: object) -> int | None:
    """The value if it is a count. Files from other people may hold anything under any key."""
    return value if type(value) is int and value >= 0 else None


def _numbers(values: object) -> dict[str, float]:
    """The numbers in an object; integers only if they can be formatted as a float."""
    if not isinstance(values, dict):
        return {}
    return {key: x for key, x in values.items() if type(x) is float or (type(x) is int and abs(x) < 2**63)}
