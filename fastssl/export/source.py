"""The run that is exported: its model, and what checkpoint and run directory tell about it."""

import importlib.metadata
import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastssl.common.errors import UserError
from fastssl.common.files import LARGEST_TEXT, read_bytes, read_lines
from fastssl.common.schema import Count, Finite, Text
from fastssl.evaluation.results import Interval
from fastssl.evaluation.runs import weights_sha256
from fastssl.models import Model
from fastssl.models.checkpoint import model_from_checkpoint, newest_checkpoint, run_dir_of
from fastssl.recipe import Recipe
from fastssl.training.tracking import parse_metrics
from fastssl.views import describe_eval_transform


class MeasuredImages(BaseModel):
    path: Text | None = None
    images: Count | None = None


class MeasuredSet(BaseModel):
    inverted: bool = False


class MeasuredDetector(BaseModel):
    sets: dict[Text, MeasuredSet] = {}  # OOD sets by their names


class MeasuredResult(BaseModel):
    """One file in RUN/eval/, as far as a card shows it."""

    evaluation: Text | None = None
    encoder_sha256: Text | None = None
    weights: Text | None = None
    metrics: dict[Text, Finite]
    intervals: dict[Text, Interval] = {}
    chance: dict[Text, Finite] = {}
    saturated: list[Text] = []  # metrics that are lower limits
    failed: list[Text] = []  # self-checks
    aurc_minus_error: Interval | None = None
    detectors: dict[Text, MeasuredDetector] = {}
    settings: dict[str, Any] = {}
    near: dict[Text, Any] = {}  # OOD sets by their names
    far: dict[Text, Any] = {}
    train: MeasuredImages = MeasuredImages()
    val: MeasuredImages = MeasuredImages()


class Environment(BaseModel):
    """environment.json, as far as a card shows it."""

    packages: dict[Text, Text | None] = {}
    git: Text | None = None
    device: Text | None = None


File = TypeVar("File", bound=BaseModel)


@dataclass(frozen=True)
class EvaluationSummary:
    """One result in RUN/eval/."""

    name: str
    file: str  # in RUN/eval/
    result: MeasuredResult
    images: int | None  # number of images that it was measured on; None: not known
    data: str | None  # path of the .beton file that it was measured on; None: not known


@dataclass
class Source:
    """A trained model and everything that its run tells about it."""

    model: Model  # eval mode, on the CPU
    recipe: Recipe
    checkpoint: Path
    checkpoint_sha256: str
    step: int  # optimizer steps done
    epochs_done: int | None  # None: the checkpoint does not tell
    run_dir: Path | None  # None: the checkpoint is not in a run directory, and nothing below is known
    environment: Environment | None = None  # environment.json
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
        raise UserError(
            f"{path} holds weights that are not finite", hint="export an earlier checkpoint, or train again"
        )
    step, epochs_done = saved["step"], saved["loader"]["epoch"] if "loader" in saved else None
    run_dir = run_dir_of(path)
    source = Source(model, checkpoint.recipe, path, checkpoint.sha256, step, epochs_done, run_dir)
    if run_dir is None:
        return source

    environment = run_dir / "environment.json"
    if environment.is_file():
        source.environment = _read(environment, Environment)
        if source.environment is None:
            source.damaged.append(environment.name)
    sha256 = weights_sha256(model)
    for file in sorted((run_dir / "eval").glob("*.json")):
        result = _read(file, MeasuredResult)
        if result is None:
            source.damaged.append(f"eval/{file.name}")
        elif result.weights == "untrained":
            continue
        elif result.encoder_sha256 not in (None, sha256):
            source.stale.append(f"eval/{file.name}")
        else:
            name = result.evaluation or file.stem
            source.results.append(EvaluationSummary(name, file.name, result, result.val.images, result.val.path))
            if result.train.path == source.recipe.data.train:
                source.train_images = result.train.images
    source.probe = last_probe(run_dir / "metrics.jsonl", step)
    return source


def last_probe(path: Path, last_step: int) -> dict[str, float] | None:
    """The last line of metrics.jsonl that holds a probe, up to `last_step`; invalid lines are skipped."""
    last = None
    with suppress(OSError):  # no such file, or none that is read
        for entry in parse_metrics(read_lines(path)):
            metrics = {name: value for name, value in entry.items() if value is not None}
            is_probe = "loss" not in entry and metrics.keys() - {"step", "epoch"}
            if is_probe and metrics["step"] <= last_step:
                last = metrics
    return last


def _read(path: Path, kind: type[File]) -> File | None:
    """Read a file of a run directory; None if it is damaged. Other people's files may hold anything under any key."""
    try:
        return kind.model_validate_json(read_bytes(path, LARGEST_TEXT))
    except (OSError, ValidationError):
        return None
