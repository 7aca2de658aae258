"""From a sweep file to its runs:

    sweep = load_sweep("recipes/sweeps/ablation_cifar10.yaml")
    runs = expand(sweep, ["data.train=x.beton"])

A grid is a recipe and some axes: dotted keys with the values that each takes. Its runs are all combinations.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from fastssl.common.errors import UserError
from fastssl.recipe import Recipe, Section, find_recipe, load_recipe, read_yaml, sentence

JOBS_FOLDER = "slurm"  # beside the grids' folders
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]  # it becomes a folder


class Grid(Section):
    recipe: str
    name: Name | None = None  # folder of its runs; None: the recipe's file name
    set: dict[str, JsonValue] = {}
    axes: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = {}


class Sweep(Section):
    name: Name
    dir: str | None = None  # None: runs/NAME
    set: dict[str, JsonValue] = {}  # for the runs of all grids
    grids: Annotated[list[Grid], Field(min_length=1)]

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"runs/{self.name}")


@dataclass(frozen=True)
class Run:
    """One run of a sweep. Its name is its directory below the sweep's, such as `zprob_barlow/beta=0.01,seed=1997`."""

    name: str
    grid: str
    values: dict[str, JsonValue]  # of the axes
    recipe: Recipe  # run.dir is set

    @property
    def dir(self) -> Path:
        return Path(self.recipe.run.dir)


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; `recipes/sweeps/x.yaml` also means the shipped one. Raises UserError for anything wrong."""
    path = find_recipe(Path(path))
    try:
        return Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {sentence(error, Sweep)}") from None


def expand(sweep: Sweep, overrides: list[str] = ()) -> list[Run]:
    """All runs of the sweep, each with its checked recipe. overrides: `key=value`, for every run.

    What is nearer to the run wins: axes over overrides over the grid's `set` over the sweep's over the recipe. Raises
    UserError for a run that its recipe refuses, and for names or keys that would be lost or used twice.
    """
    runs = []
    names = [grid_name(grid) for grid in sweep.grids]
    for grid, name in zip(sweep.grids, names):
        if names.count(name) > 1:
            raise UserError(f"Two grids of the sweep {sweep.name} are named {name}: give one another `name:`.")
        if name == JOBS_FOLDER:
            raise UserError(f"A grid of {sweep.name} is named {name}, as the folder of SLURM's logs is: rename it.")
        nearest = [*as_overrides(grid.set), *overrides]
        fixed = [*as_overrides(sweep.set), *nearest]
        check_keys(name, list(grid.axes), keys_of(fixed), keys_of(nearest))
        for combination in itertools.product(*grid.axes.values()):
            values = dict(zip(grid.axes, combination))
            runs.append(make_run(sweep.folder, name, grid.recipe, fixed, values))
    for run, following in itertools.pairwise(sorted(runs, key=lambda run: run.name)):
        if run.name == following.name:
            raise UserError(f"Two runs of the sweep {sweep.name} would be {run.name}: an axis has a value twice.")
    return runs


def grid_name(grid: Grid) -> str:
    return grid.name or Path(grid.recipe).stem


def make_run(folder: Path, grid: str, recipe: str, fixed: list[str], values: dict[str, JsonValue]) -> Run:
    shown = ",".join(f"{short}={in_a_name(value)}" for short, value in zip(short_names(list(values)), values.values()))
    name = f"{grid}/{shown}" if shown else grid
    try:
        loaded = load_recipe(recipe, [*fixed, *as_overrides(values), f"run.dir={as_yaml(str(folder / name))}"])
    except UserError as error:
        raise UserError(f"Run {name}: {error}") from None
    return Run(name, grid, values, loaded)


def as_overrides(values: dict[str, JsonValue]) -> list[str]:
    return [f"{key}={as_yaml(value)}" for key, value in values.items()]


def as_yaml(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML too, but for what it escapes beyond 16 bits


def keys_of(overrides: list[str]) -> list[str]:
    return [override.partition("=")[0] for override in overrides]


def check_keys(grid: str, axes: list[str], fixed: list[str], nearest: list[str]) -> None:
    """Refuse run.dir, which the sweep chooses, and `nearest` keys (the grid's, the command's) that axes would hide."""
    for key in [*fixed, *axes]:
        if f"{key}.".startswith("run."):
            raise UserError(f"Grid {grid}: the sweep chooses each run's directory; leave out {key} and set `dir`.")
    for key, axis in itertools.product(nearest, axes):
        if f"{key}.".startswith(f"{axis}."):
            raise UserError(f"Grid {grid}: {key} cannot be set for all runs, because {axis} is an axis of this grid.")


def short_names(keys: list[str]) -> list[str]:
    """The last word of each dotted key, with as many words before it as tell it from the others."""
    shortened = []
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            short = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{short}") for other in keys) == 1:
                break
        shortened.append(short)
    return shortened


def in_a_name(value: JsonValue) -> str:
    """A value as part of a folder's name: 0.001, mixture, true; what a shell or a path would stumble over becomes -."""
    text = f"{value:.12g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "-"
