"""Find run directories, and read what they tell: recipe, training curves, results of evaluations, profile."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import BadZipFile

import numpy as np
from pydantic import ValidationError

from fastssl.common.errors import UserError
from fastssl.common.files import expand_user, open_regular, read_lines
from fastssl.common.terminal import printable
from fastssl.evaluation.ood.evaluate import OOD_RESULT
from fastssl.evaluation.results import RESULT, EvaluationResult, read_json_object
from fastssl.models.checkpoint import LAST, is_run_dir, runs_below
from fastssl.profiling.profile import Profile, read_profile
from fastssl.recipe import Recipe, load_recipe
from fastssl.training.tracking import parse_metrics

MOST_RUNS = 2000
LARGEST_ARRAY = 1 << 30  # bytes of a file of arrays
NO_CURVE = ("step", "epoch", "seconds")  # of metrics.jsonl


class Curve(NamedTuple):
    """A metric during training."""

    epoch: np.ndarray  # float (N,), epochs done
    seconds: np.ndarray  # float (N,) of training until then
    value: np.ndarray  # float (N,)


@dataclass(frozen=True)
class Run:
    """One run directory."""

    dir: Path
    recipe: Recipe
    environment: dict[str, Any]  # of environment.json, which may lack any key
    curves: dict[str, Curve]  # metric of metrics.jsonl -> its values
    results: dict[str, EvaluationResult]  # name of the file in eval/ -> a result of the last weights
    untrained: dict[str, EvaluationResult]  # the same for the weights that the run started from
    epochs_begun: int  # as the log says
    profile: Profile | None
    unread: list[str] = field(default_factory=list)  # sentences about files that could not be read

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def is_finished(self) -> bool:
        """Whether the log reaches the last epoch. The weights may have been left elsewhere."""
        return self.epochs_begun >= self.recipe.train.epochs

    def array(self, file: str, name: str) -> np.ndarray | None:
        """Return an array of RUN/eval/FILE, an .npz; None if it cannot be read."""
        return read_array(self.dir / "eval" / Path(file).name, name)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run directories among `paths` and in the folders among them, such as those of sweeps.

    Raises UserError for a path that holds no run, or more runs than a report takes.
    """
    found: dict[Path, None] = {}
    for path in paths:
        path = expand_user(path)
        runs = [path] if is_run_dir(path) else runs_below(path)
        if not runs:
            raise UserError(f"{path} holds no run", hint="name run directories of fastssl train, or folders of them")
        found |= dict.fromkeys(Path(os.path.normpath(run)) for run in runs)
    if len(found) > MOST_RUNS:
        raise UserError(
            f"{len(found):,} runs are more than the {MOST_RUNS:,} that a report takes", hint="name fewer folders"
        )
    return list(found)


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError if its recipe cannot be read; other files are reported in `unread`."""
    recipe = load_recipe(path / "recipe.yaml")
    unread: list[str] = []
    results: dict[str, EvaluationResult] = {}
    untrained: dict[str, EvaluationResult] = {}
    for file in sorted((path / "eval").glob("*.json")):
        found = cast(EvaluationResult, read_json_object(file))
        try:
            RESULT.validate_python(found, strict=True)
            if found["evaluation"] == "ood":
                OOD_RESULT.validate_python(found, strict=True)
        except ValidationError as error:
            unread.append(_not_a_result(file, error))
            continue
        if Path(found["weights"]).name == LAST:
            results[file.stem] = found
        elif found["weights"] == "untrained":
            untrained[file.stem] = found
    profile = None
    if (path / "profile.json").exists():
        try:
            profile = read_profile(path / "profile.json")
        except UserError as error:
            unread.append(error.message)
    environment = read_json_object(path / "environment.json")
    if environment is None:
        unread.append(f"{path / 'environment.json'} is missing or damaged")
    curves, epochs_begun = _read_log(path, unread)
    return Run(path, recipe, environment or {}, curves, results, untrained, epochs_begun, profile, unread)


def _not_a_result(file: Path, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    key = printable(".".join(map(str, first["loc"])))[:100]
    return f"{file} is not a result of fastssl eval" + (f" ({key}: {first['msg']})" if key else "")


def _read_log(run_dir: Path, unread: list[str]) -> tuple[dict[str, Curve], int]:
    """Return the curve of each metric, and the number of epochs that the log reaches.

    The line of a probe has no seconds: it gets those of the line before.
    """
    columns: dict[str, list[tuple[float, float, float]]] = {}
    epochs, seconds, steps_per_epoch = 0, 0.0, 0.0
    try:
        for entry in parse_metrics(read_lines(run_dir / "metrics.jsonl")):
            step = float(entry["step"] or 0)
            seconds = float(entry.get("seconds") or seconds)
            if (epoch := entry.get("epoch")) is not None and epoch >= 0:
                epochs = max(epochs, int(epoch) + 1)
                steps_per_epoch = max(steps_per_epoch, step / (epoch + 1))
            for name, value in entry.items():
                if value is not None and name not in NO_CURVE:
                    columns.setdefault(name, []).append((step, seconds, float(value)))
    except OSError as error:
        unread.append(f"{run_dir / 'metrics.jsonl'} cannot be read ({error.strerror})")
    curves = {name: Curve(*np.array(rows).T) for name, rows in columns.items()}
    curves = {name: curve._replace(epoch=curve.epoch / (steps_per_epoch or 1)) for name, curve in curves.items()}
    return curves, epochs


def read_array(path: Path, name: str) -> np.ndarray | None:
    """Return an array of an .npz that `np.savez` wrote; None if it is missing, damaged, compressed or too large."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            member = archive.zip.getinfo(f"{name}.npy")
            if member.compress_type or member.file_size > LARGEST_ARRAY:
                return None
            array: np.ndarray = archive[name]
            return array
    except (OSError, ValueError, KeyError, EOFError, MemoryError, SyntaxError, AttributeError, BadZipFile):
        return None
