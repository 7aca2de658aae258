"""The result file of an evaluation, RUN/eval/NAME.json: its fields, and when it is read in place of measuring again."""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar, cast

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fastssl.beton import read_header
from fastssl.common.files import (
    LARGEST_TEXT,
    explain_write_errors,
    make_folder,
    read_bytes,
    remove_abandoned_files,
    write_atomically,
)
from fastssl.common.schema import Finite
from fastssl.evaluation.metrics import ClassificationResult
from fastssl.evaluation.plots import draw_confusion

PATH_KEYS = ("run", "weights", "path", "subset", "list")  # fields that hold the path of a file: they change nothing
Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]  # 95 % [low, high]


class DataDescription(TypedDict):
    """The images of one .beton file that an evaluation uses."""

    path: str
    images: int
    subset: str | None  # list of sample ids or names; None: all images
    subset_sha256: str | None  # of the listed sample ids, sorted
    limit: int | None  # this many images, drawn at random
    layout: str  # "canvas" or "full"
    checksum: str  # of the file's content
    part: NotRequired[str]  # which images these are, in words
    list: NotRequired[str | None]  # semisup's --list
    list_sha256: NotRequired[str | None]


class EncoderDescription(TypedDict):
    """The encoder that was evaluated."""

    run: str  # run directory
    weights: str  # checkpoint file, or "untrained"
    encoder_sha256: str  # of all weights
    view: dict[str, Any]  # the evaluation transform


class Spread(TypedDict):
    mean: Finite
    std: Finite
    min: Finite
    max: Finite


class EvaluationResult(EncoderDescription):
    """One RUN/eval/NAME.json. The evaluations add fields of their own."""

    # The request: all that the metrics depend on.
    evaluation: str  # such as "knn" or "linear-sweep"
    protocol: str  # one sentence
    settings: dict[str, Any]
    seed: int
    train: NotRequired[DataDescription]  # fitted on
    val: DataDescription  # tested on
    layout: NotRequired[str]  # "full" where both files are, else "canvas"
    # What was measured.
    metrics: dict[str, Finite]  # shares from 0 to 1 unless metric_info.py names another unit
    intervals: NotRequired[dict[str, Interval]]  # of metrics, bootstrap over the test images
    chance: NotRequired[dict[str, Finite]]  # metrics of a guess that knows nothing about the image
    outcomes: NotRequired[str]  # file with a bool (M,) per accuracy: which test images are right, in their order
    confusion: NotRequired[str]  # file with the (K, K) confusion matrix
    confusion_classes: NotRequired[list[int]]  # its K labels
    hyperparameters: NotRequired[dict[str, int]]  # of a linear classifier, as they follow from the data
    chosen: NotRequired[dict[str, float | bool]]  # the candidate with the best accuracy on held-out training images
    candidates: NotRequired[list[dict[str, float | bool]]]  # each with its held-out accuracy and nll
    folder: NotRequired[str]  # of a fine-tuning run, in RUN/eval/
    uncertainty: NotRequired[Spread]  # of the uncertainty over the test images
    aurc_minus_error: NotRequired[Interval]  # of the difference, from the same resamples of the test images
    saturated: NotRequired[list[str]]  # metrics that are lower limits
    failed: NotRequired[list[str]]  # self-checks
    fastssl: str  # version
    measured_at: str  # ISO 8601


RESULT = TypeAdapter(EvaluationResult)
Result = TypeVar("Result", bound=EvaluationResult)


def load_or_compute(
    run_dir: Path,
    name: str,
    request: Mapping[str, Any],
    compute: Callable[[], Mapping[str, Any]],
    schema: TypeAdapter[Result],
) -> Result:
    """Return RUN/eval/NAME.json if it answers this request; else call `compute`, and write what it returns there.

    Args:
        run_dir: the run directory.
        name: file name without ".json".
        request: all that the metrics depend on. A file answers it if all fields but those in PATH_KEYS are equal, so a
            run or data that moved are not measured again.
        compute: returns the other fields of the result.
        schema: of the result. A file with other fields is measured again.
    """
    request = {**request, "fastssl": importlib.metadata.version("fastssl-trainer")}
    fields: dict[str, Any] = json.loads(json.dumps(request))  # tuples become lists, as in the file
    path = run_dir / "eval" / f"{name}.json"
    cached = read_json_object(path)
    if cached and without_paths({key: cached.get(key) for key in fields}) == without_paths(fields):
        try:
            schema.validate_python(cached | fields, strict=True)
            return cast(Result, cached | fields)
        except ValidationError:  # another version, or edited
            pass
    with explain_write_errors(path):  # before the work: a folder that cannot be written to is refused at once
        make_folder(path.parent)
        remove_abandoned_files(path.parent, f"{name}.")
    result = {**fields, **compute(), "measured_at": datetime.now().astimezone().isoformat(timespec="seconds")}
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    with explain_write_errors(path):
        write_atomically(path, text)
    return cast(Result, json.loads(text))


def save_classification(run_dir: Path, name: str, result: ClassificationResult, test: Path) -> dict[str, Any]:
    """Write RUN/eval/NAME.confusion.npy, and a plot of it.

    test: the .beton that was tested on, for the names of its classes. Returns the fields of an EvaluationResult.
    """
    path = run_dir / "eval" / f"{name}.confusion.npy"
    with explain_write_errors(path):
        write_atomically(path, lambda temporary: np.save(temporary, result.confusion_KK))
    outcomes = save_outcomes(run_dir, name, {"accuracy": result.correct_M})
    draw_confusion(path.with_suffix(".png"), result, read_header(test).classes)
    return {
        "metrics": result.metrics,
        "intervals": result.intervals,
        "chance": result.chance,
        "outcomes": outcomes,
        "confusion": path.name,
        "confusion_classes": result.label_K.tolist(),
    }


def save_outcomes(run_dir: Path, name: str, correct: Mapping[str, np.ndarray]) -> str:
    """Write RUN/eval/NAME.correct.npz, from which a report compares runs image by image. Returns the file's name.

    correct: for each accuracy, bool (M,): whether the guess for each test image is right.
    """
    path = run_dir / "eval" / f"{name}.correct.npz"
    with explain_write_errors(path):
        write_atomically(path, lambda temporary: np.savez(temporary, **correct))  # type: ignore[arg-type]
    return path.name


def without_paths(value: object) -> object:
    """A JSON value without the fields in PATH_KEYS, at any depth of nested objects."""
    if not isinstance(value, dict):
        return value
    return {key: without_paths(inner) for key, inner in value.items() if key not in PATH_KEYS}


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file does not exist, is damaged or holds something else."""
    try:
        return TypeAdapter(dict[str, Any]).validate_json(read_bytes(path, LARGEST_TEXT))
    except (OSError, ValidationError):
        return None
