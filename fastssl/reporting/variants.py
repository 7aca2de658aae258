"""Variants: runs that differ in their seed alone. Their labels, and what each is compared with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastssl.common.errors import UserError
from fastssl.common.files import expand_user
from fastssl.recipe import Recipe
from fastssl.reporting.runs import Run

# Keys that change no result of a training: where it writes, how often it reports, on what and with how many threads.
NOT_COMPARED = ("name", "seed", "run", "log", "checkpoint", "probe", "data.workers", "train.device")
STOCHASTIC = {"none": "", "z": "Z-prob ", "h": "H-prob ", "hz": "HZ-prob "}
OBJECTIVES = {
    "barlow_twins": "Barlow Twins", "vicreg": "VICReg", "simclr": "SimCLR", "byol": "BYOL", "sigreg": "SIGReg",
    "visreg": "VISReg", "supervised": "supervised",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs whose recipes differ in their seed alone."""

    label: str  # such as "Z-prob VICReg" or "Z-prob VICReg, beta=0.01"; no other variant has it
    runs: list[Run]  # by seed
    # What it is compared with: the deterministic variant of the same objective, or the one that the user has named.
    # None: there is none, or several.
    baseline: "Variant | None"

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


def group_runs(runs: Sequence[Run], baseline: Path | None = None) -> tuple[list[Variant], list[str]]:
    """Return variants, by objective and with the deterministic one first, and sentences on runs that are left out.

    Of runs with equal recipes and seeds the first one counts. With `baseline`, one of the run directories, all other
    variants are compared with the variant of that run. Raises UserError if it is none of them.
    """
    groups: dict[str, list[Run]] = {}
    remarks = []
    for run in runs:
        group = groups.setdefault(_key(run.recipe), [])
        same = [other for other in group if other.seed == run.seed]
        if same:
            remarks.append(f"{run.dir} has the recipe and the seed of {same[0].dir}, and is left out")
        else:
            group.append(run)
    ordered = sorted(groups.values(), key=lambda group: _order(group[0].recipe))
    labels = _labels([group[0].recipe for group in ordered])
    variants: list[Variant] = []
    for group, label in zip(ordered, labels, strict=True):
        recipe = group[0].recipe
        found = [
            other for other in variants
            if _is_deterministic(other.recipe) and _without_embedding(other.recipe) == _without_embedding(recipe)
        ]  # fmt: skip
        deterministic = found[0] if len(found) == 1 and not _is_deterministic(recipe) else None
        variants.append(Variant(label, sorted(group, key=lambda run: run.seed), deterministic))
    return variants if baseline is None else _compared_with(baseline, runs, variants), remarks


def _compared_with(baseline: Path, runs: Sequence[Run], variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants, all but one with that one as their baseline: the variant of the run in `baseline`."""
    named = [run.recipe for run in runs if run.dir.resolve() == expand_user(baseline).resolve()]
    if not named:
        raise UserError(f"--baseline {baseline} is none of the runs", hint="name a run directory that the report shows")
    (variant,) = [each for each in variants if _key(each.recipe) == _key(named[0])]
    chosen = replace(variant, baseline=None)
    return [chosen if each is variant else replace(each, baseline=chosen) for each in variants]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe by dotted key, such as "optim.lr"."""
    values: dict[str, Any] = {}

    def add(prefix: str, section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                values[prefix + key] = value

    add("", recipe.model_dump(mode="json"))
    return values


def compared_values(recipe: Recipe) -> dict[str, Any]:
    return {
        key: value for key, value in flat(recipe).items()
        if key not in NOT_COMPARED and key.split(".")[0] not in NOT_COMPARED
    }  # fmt: skip


def start_of(recipe: Recipe) -> str:
    """Equal for recipes whose runs started from the same encoder of the same images.

    The weights are drawn from the seed, those of the encoder first. A stochastic h is a layer after it, and drawn
    later, so it is the same in one variant only.
    """
    if "h" in recipe.embedding.stochastic:
        return json.dumps([recipe.seed, _key(recipe)])
    values = compared_values(recipe)
    kept = {key: values[key] for key in values if key.startswith(("data.", "views.", "model."))}
    return json.dumps([recipe.seed, {key: kept[key] for key in kept if not key.startswith("model.projector.")}])


def _key(recipe: Recipe) -> str:
    """Equal for recipes of one variant."""
    return json.dumps(compared_values(recipe), sort_keys=True)


def _is_deterministic(recipe: Recipe) -> bool:
    return recipe.embedding.stochastic == "none"


def _without_embedding(recipe: Recipe) -> dict[str, Any]:
    values = compared_values(recipe)
    return {key: values[key] for key in values if not key.startswith("embedding.")}


def _order(recipe: Recipe) -> tuple[Any, ...]:
    embedding = recipe.embedding
    return (
        list(OBJECTIVES).index(recipe.objective.name), list(STOCHASTIC).index(embedding.stochastic), recipe.name,
        embedding.prior, embedding.beta, embedding.samples,
    )  # fmt: skip


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    """Name each recipe by its objective, and by the keys in which it differs from others of that name."""
    names = [STOCHASTIC[recipe.embedding.stochastic] + OBJECTIVES[recipe.objective.name] for recipe in recipes]
    labels = []
    for name, recipe in zip(names, recipes):
        others = [compared_values(other) for other, its in zip(recipes, names) if its == name]
        own = compared_values(recipe)
        differing = [key for key in own if any(other.get(key) != own[key] for other in others)]
        values = ", ".join(f"{key.rpartition('.')[2]}={_shown(own[key])}" for key in differing)
        labels.append(f"{name}, {values}" if values else name)
    return labels


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
