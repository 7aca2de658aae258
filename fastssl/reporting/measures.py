"""What was measured of each run: the columns of the report's tables, and what single images contribute to them."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from fastssl.evaluation.metric_info import MetricInfo, metric_info
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.results import EvaluationResult, without_paths
from fastssl.evaluation.verdict import headline_metric
from fastssl.reporting.differences import Difference, mean_difference, placements
from fastssl.reporting.runs import Run
from fastssl.reporting.variants import Variant, start_of

# The order of the columns.
EVALUATIONS = ("knn", "linear", "semisup", "transfer", "ood", "uncertainty", "mi")
Group = Literal["accuracy", "ood", "uncertainty", "mi"]
SHOWN_UNCERTAINTY = ("r_auroc", "recall_at_1", "e_aurc", "spearman_blur", "spearman_noise", "spearman_jpeg")


@dataclass(frozen=True)
class Measure:
    """One metric of one evaluation on the same images."""

    group: Group
    evaluation: str  # such as "knn"
    images: str  # JSON of what was tested on, without paths
    metric: str  # its name in the result
    title: str  # heading of the column, or of the row

    @property
    def info(self) -> MetricInfo:
        return AUROC if self.group == "ood" else NATS if self.group == "mi" else metric_info(self.metric)


AUROC = MetricInfo("AUROC", "%", "up")
NATS = MetricInfo("mutual information", "nats", "")


class Found(NamedTuple):
    """A value, and the result that it is from."""

    value: float
    result: EvaluationResult
    name: str  # of the result's file in eval/


Values = dict[Measure, dict[Path, Found]]  # measure -> run directory -> value


def collect_measures(runs: Sequence[Run]) -> tuple[Values, list[str]]:
    """Return the measures of all runs, and sentences on what is left out.

    Where a run has several results of one evaluation on the same images, with other settings, the one with the
    shortest file name counts: that of the defaults.
    """
    values: Values = {}
    remarks = []
    for run in runs:
        for name, result in sorted(run.results.items(), key=lambda item: (len(item[0]), item[0])):
            if kind_of(result["evaluation"]) not in EVALUATIONS:
                remarks.append(f"{run.dir / 'eval' / name}.json is of an evaluation that this version does not know")
                continue
            measured = _measures(result)
            if not measured:
                remarks.append(f"{run.dir / 'eval' / name}.json lacks the metrics of its evaluation")
            for measure, value in measured:
                others = values.setdefault(measure, {})
                if run.dir in others:
                    remarks.append(f"{run.dir / 'eval' / name}.json: {others[run.dir].name}.json is shown in its place")
                    break
                others[run.dir] = Found(value, result, name)
                if measure.group == "accuracy" and "outcomes" not in result:
                    file = run.dir / "eval" / f"{name}.json"
                    remarks.append(f"{file} does not tell which images are right: delete it, and evaluate again")
    for measure, found in values.items():
        if measure.evaluation in ("knn", "uncertainty", "ood") or measure.evaluation.startswith("linear"):
            settings = {json.dumps(without_paths(each.result["settings"]), sort_keys=True) for each in found.values()}
            if len(settings) > 1:
                remarks.append(f"{measure.title}: the runs were evaluated with {len(settings)} different settings")
    ordered = dict(sorted(values.items(), key=lambda item: EVALUATIONS.index(kind_of(item[0].evaluation))))
    return _with_unique_titles(ordered), list(dict.fromkeys(remarks))


def kind_of(evaluation: str) -> str:
    """Return semisup for semisup-1percent."""
    return evaluation.partition("-")[0]


def _measures(result: EvaluationResult) -> list[tuple[Measure, float]]:
    """Return the measures of a result and their values; none if it lacks the metric of its evaluation."""
    evaluation, metrics = result["evaluation"], result["metrics"]
    images: dict[str, Any] = {"val": result["val"], **{key: result.get(key) for key in ("near", "far")}}
    where = json.dumps(without_paths(images), sort_keys=True)

    def measure(group: Group, metric: str, title: str) -> tuple[Measure, float]:
        return Measure(group, evaluation, where, metric, title), metrics[metric]

    if evaluation == "ood":
        found = {name: re.fullmatch(r"(\w+) (near|far) auroc", name) for name in metrics}
        return [measure("ood", name, f"{each[1]} {each[2]}") for name, each in found.items() if each]
    if evaluation == "uncertainty":
        score = result["settings"].get("score", "uncertainty")
        return [
            measure("uncertainty", name, f"{metric_info(name).label} ({score})")
            for name in SHOWN_UNCERTAINTY if name in metrics
        ]  # fmt: skip
    if evaluation == "mi":
        return [measure("mi", name, name) for name in metrics if name.endswith((" js", " mine", " rate"))]
    if not metrics:
        return []
    if evaluation == "knn":
        name = headline_metric(result)
        return [measure("accuracy", name, f"kNN {metric_info(name).label.removeprefix('top-1, ')}")]
    return [measure("accuracy", "accuracy", _title(evaluation))] if "accuracy" in metrics else []


def _title(evaluation: str) -> str:
    """Return "1 % of the labels" for semisup-1percent, "dtd, linear sweep" for transfer-dtd-linear-sweep."""
    share = re.fullmatch(r"semisup-(.+)percent", evaluation)
    target = re.fullmatch(r"transfer-(.+)-(linear-\w+|finetune)", evaluation)
    name = f"{share[1]} % of the labels" if share else f"{target[1]}, {target[2]}" if target else evaluation
    return name.replace("-", " ")


def _with_unique_titles(values: Values) -> Values:
    """Add the name of the tested file to titles that stand for several images."""
    titles = [measure.title for measure in values]
    renamed: Values = {}
    for measure, found in values.items():
        title = measure.title
        if titles.count(title) > 1:
            path = Path(next(iter(found.values())).result["val"]["path"])
            title = f"{title}, {path.parent.name}/{path.stem}"
        renamed[Measure(measure.group, measure.evaluation, measure.images, measure.metric, title)] = found
    return renamed


def compare_with_baseline(measure: Measure, variant: Variant, found: dict[Path, Found]) -> Difference | None:
    """Return a variant's difference to its baseline, over the seeds that both have; None without two such seeds."""
    if variant.baseline is None:
        return None
    baselines = {run.seed: run for run in variant.baseline.runs if run.dir in found}
    pairs = [(run, baselines[run.seed]) for run in variant.runs if run.dir in found and run.seed in baselines]
    return _paired_difference(measure, [((a, found[a.dir]), (b, found[b.dir])) for a, b in pairs])


OfRun = tuple[Run, Found]


def compare_with_untrained(
    measure: Measure, variant: Variant, found: dict[Path, Found], untrained: dict[str, OfRun]
) -> tuple[float, Difference | None] | None:
    """Return a variant's mean difference to the weights that its runs started from, and its noise.

    untrained: by `start_of` a recipe. The noise is None for a single run, all is None where no run has both values.
    """
    starts = [(run, start_of(run.recipe)) for run in variant.runs if run.dir in found]
    pairs = [((run, found[run.dir]), untrained[start]) for run, start in starts if start in untrained]
    if not pairs:
        return None
    mean = statistics.fmean(trained.value - before.value for (_, trained), (_, before) in pairs)
    return mean, _paired_difference(measure, pairs)


def _paired_difference(measure: Measure, pairs: Sequence[tuple[OfRun, OfRun]]) -> Difference | None:
    values_S2 = np.array([[found.value for _, found in pair] for pair in pairs])
    return mean_difference(values_S2, _differences_of_images(measure, pairs))


def _differences_of_images(measure: Measure, pairs: Sequence[tuple[OfRun, OfRun]]) -> list[np.ndarray]:
    """Return what each image contributes to the difference, as a mean over the pairs; [] if that is not known."""
    means: list[np.ndarray] = []
    for pair in pairs:
        own, other = (image_contributions(measure, run, found.result) for run, found in pair)
        if not own or [len(part) for part in own] != [len(part) for part in other]:
            return []
        parts = [(a - b) / len(pairs) for a, b in zip(own, other)]
        means = [mean + part for mean, part in zip(means, parts)] if means else parts
    return means


def image_contributions(measure: Measure, run: Run, result: EvaluationResult) -> list[np.ndarray]:
    """Return for each kind of images, float (images,): what each contributes to the metric, which is their mean.

    Of an accuracy, whether the image is right. Of a mean AUROC over sets, the placements of the ID images, and those of
    the images of each set. Empty where the files do not tell.
    """
    if measure.group == "accuracy":
        correct = run.array(result.get("outcomes", ""), measure.metric)
        is_usable = correct is not None and correct.dtype == bool and correct.ndim == 1 and correct.size
        return [cast(np.ndarray, correct).astype(np.float64)] if is_usable else []
    if measure.group != "ood":
        return []
    detector, group, _ = measure.metric.split()
    ood_result = cast(OODResult, result)
    sets = list(ood_result["near"] if group == "near" else ood_result["far"])
    scores = {part: run.array(ood_result["scores"], f"{part}/{detector}") for part in ("id", *sets)}
    if not sets or not all(each is not None and _is_of_images(each) for each in scores.values()):
        return []  # such as JEPA-SCORE, which only some images have
    pairs = [placements(cast(np.ndarray, scores["id"]), cast(np.ndarray, scores[each])) for each in sets]
    return [np.mean([of_id for of_id, _ in pairs], axis=0), *(of_set / len(sets) for _, of_set in pairs)]


def _is_of_images(scores: np.ndarray) -> bool:
    return scores.dtype.kind == "f" and scores.ndim == 1 and len(scores) > 0 and bool(np.isfinite(scores).all())
