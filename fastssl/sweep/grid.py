"""From a sweep file to its runs:

    sweep = load_sweep("recipes/sweeps/ablation_cifar10.yaml")
    runs = expand(sweep, ["data.train=x.beton"])

A grid is a recipe and some axes, which are dotted keys with a list of values each. Its runs are all combinations.
"""

import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from fastssl.common.errors import UserError, in_short, quote
from fastssl.recipe import Recipe, Section, UserPath, explain, find_recipe, load_recipe, read_yaml

JOBS_FOLDER = "slurm"  # next to the folders of the grids
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)]  # a name that can be a folder
Settings = Annotated[dict[str, JsonValue], Field(max_length=500)]
MAX_RUNS = 10_000
LONGEST_NAME = 200  # of the folder of a run; file systems take 255 bytes


class Grid(Section):
    """One entry of `grids` in a sweep file."""

    recipe: UserPath
    name: Name | None = None  # folder of its runs; None: the recipe's file name
    set: Settings = {}
    axes: Annotated[dict[str, Annotated[list[JsonValue], Field(min_length=1)]], Field(max_length=20)] = {}


class Sweep(Section):
    """A sweep file."""

    name: Name
    dir: UserPath | None = None  # None: runs/NAME
    set: Settings = {}  # for the runs of all grids
    grids: Annotated[list[Grid], Field(min_length=1)]

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"runs/{self.name}")

    def make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {self.folder} cannot be made ({error.strerror})", hint="set another `dir`"
            ) from None


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # its directory below the sweep's, such as zprob_barlow/beta=0.01,seed=1997
    grid: str
    values: dict[str, JsonValue]  # its value on each axis
    recipe: Recipe  # run.dir is set

    @property
    def dir(self) -> Path:
        return Path(self.recipe.run.dir or "")


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; `recipes/sweeps/x.yaml` also means the shipped one. Raises UserError if anything is wrong."""
    file = find_recipe(Path(path))
    values = read_yaml(file)
    if "grids" not in values and "data" in values:
        raise UserError(
            f"{path} is a recipe, not a sweep", hint=f"train it with `fastssl train {shlex.quote(str(path))}`"
        )
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise explain(error, Sweep).prefixed(f"{file}: ") from None


def expand(sweep: Sweep, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """All runs of the sweep, each with its validated recipe.

    Later ones win: the recipe, the sweep's `set`, the grid's `set`, overrides (`key=value`, for every run), axes.
    Raises UserError for a run with an invalid recipe, for keys that an axis would overwrite, for names used twice, and
    for more than MAX_RUNS runs.
    """
    runs = []
    count = sum(math.prod(map(len, grid.axes.values())) for grid in sweep.grids)
    if count > MAX_RUNS:
        raise UserError(
            f"The sweep {sweep.name} has {in_short(count)} runs, more than {MAX_RUNS:,}", hint="shorten its axes"
        )
    names = [grid.name or Path(grid.recipe).stem for grid in sweep.grids]
    repeated = Counter(names)
    for grid, name in zip(sweep.grids, names):
        if repeated[name] > 1:
            raise UserError(f"Two grids of the sweep {sweep.name} are named {name}", hint="give one another `name:`")
        if name.startswith("."):
            raise UserError(f"A grid of {sweep.name} would be named {quote(name)}", hint="give it a `name:`")
        if name == JOBS_FOLDER:
            raise UserError(
                f"A grid of {sweep.name} is named {name}, like the folder of SLURM's logs", hint="rename it"
            )
        for_grid = [*as_overrides(grid.set), *overrides]
        for_all = [*as_overrides(sweep.set), *for_grid]
        check_keys(name, list(grid.axes), for_all, for_grid)
        for combination in itertools.product(*grid.axes.values()):
            values = dict(zip(grid.axes, combination))
            runs.append(make_run(sweep.folder, name, grid.recipe, for_all, values))
    for run, following in itertools.pairwise(sorted(runs, key=lambda run: run.name)):
        if run.name == following.name:
            raise UserError(
                f"Two runs of the sweep {sweep.name} would be {run.name}, because an axis has a value twice",
                hint="remove one of the two",
            )
    return runs


def make_run(folder: Path, grid: str, recipe: str, overrides: list[str], values: dict[str, JsonValue]) -> SweepRun:
    shorts = map(name_part, short_names(list(values)))
    parts = [f"{short}={name_part(value)}" for short, value in zip(shorts, values.values())]
    name = f"{grid}/{','.join(parts)}" if parts else grid
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"Run {in_short(name)}: a folder cannot have a name of {len(name):,} characters",
            hint="shorten its values, or sweep over fewer axes",
        )
    try:
        loaded = load_recipe(recipe, [*overrides, *as_overrides({**values, "run.dir": str(folder / name)})])
    except UserError as error:
        raise error.prefixed(f"Run {name}: ") from None
    return SweepRun(name, grid, values, loaded)


def as_overrides(values: dict[str, JsonValue]) -> list[str]:
    """`key=value` for each key. JSON is valid YAML, except for its escapes of characters beyond 16 bits."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def check_keys(grid: str, axes: list[str], for_all: list[str], for_grid: list[str]) -> None:
    """Raise UserError for overrides of run.dir, which the sweep sets, and for overrides that axes would hide."""
    for key in [*(override.partition("=")[0] for override in for_all), *axes]:
        if f"{key}.".startswith("run."):
            raise UserError(
                f"Grid {grid}: the sweep chooses each run's directory", hint=f"leave out {key} and set `dir`"
            )
    for override, axis in itertools.product(for_grid, axes):
        key = override.partition("=")[0]
        if f"{key}.".startswith(f"{axis}."):
            raise UserError(
                f"Grid {grid}: {key} cannot be set for all runs, because {axis} is an axis of this grid",
                hint=f"leave out {key}, or change the axis in the sweep file",
            )


def short_names(keys: list[str]) -> list[str]:
    """The last word of each dotted key, with as many words before it as are needed to make it unique."""
    shortened = []
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            short = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{short}") for other in keys) == 1:
                break
        shortened.append(short)
    return shortened


def name_part(value: JsonValue) -> str:
    """A value as part of a folder's name, such as 0.001 or true; characters that are unsafe in a path become -."""
    if isinstance(value, float):
        text = f"{value:.12g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "-"
