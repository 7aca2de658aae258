"""The tables of a report, as text: every format of the report shows these cells."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from fastssl.common.terminal import count_of
from fastssl.evaluation.mutual_information import unreliable_quantities
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED
from fastssl.evaluation.results import EvaluationResult
from fastssl.recipe import Recipe
from fastssl.reporting.differences import LEVEL, Difference, holm
from fastssl.reporting.measures import Found, Group, Measure, Values, compare_with_baseline
from fastssl.reporting.variants import Variant, compared_values, flat

NONE = "–"
MOST_DIFFERENCES = 6  # of a table that the findings name one by one
MARKED = (
    " Bold with ▲ or ▼: better or worse than its baseline by more than the noise of seeds and test images (paired; "
    "p < 0.05 after Holm's correction for all comparisons of this table). Intervals are of one difference each, "
    "without that correction. More seeds narrow them."
)

Mark = Literal["", "better", "worse"]


class Cell(NamedTuple):
    text: str
    mark: Mark = ""  # than the baseline, by more than the noise
    share: float | None = None  # in a heat map: where the value is between the lowest, 0, and the highest, 1


@dataclass(frozen=True)
class ReportTable:
    title: str
    caption: str
    corner: str  # heading of the first column
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    differences: list[list[str]] = field(default_factory=list)  # to the baselines: rows of DIFFERENCE_COLUMNS
    findings: list[str] = field(default_factory=list)  # sentences on the differences


DIFFERENCE_COLUMNS = [
    "variant",
    "baseline",
    "measure",
    "difference",
    "95 % interval",
    "p (Holm)",
    "seeds",
    "test images",
]


def result_tables(values: Values, variants: Sequence[Variant]) -> list[ReportTable]:
    """Return the tables of the evaluations that some run has."""
    of_ood = "AUROC in percent, of the {} sets ({}); mean ± standard deviation over seeds. 50 is chance. * uses labels."
    tables = [
        comparison_table(
            "Accuracy", "Top-1 accuracy in percent, mean ± standard deviation over seeds.", "variant",
            _of_group(values, "accuracy"), values, variants,
        ),
        *(
            comparison_table(
                f"OOD detection, {where}", of_ood.format(where, ", ".join(_sets(values, where))), "detector",
                _detectors_of(values, where), values, variants,
                a_row_is="measure",
            )
            for where in ("near", "far")
        ),
        comparison_table(
            "Uncertainty",
            "What the run's uncertainty says of errors and corruptions; mean ± standard deviation over seeds.",
            "variant", _of_group(values, "uncertainty"), values, variants,
        ),
        comparison_table(
            "Mutual information",
            "In nats, mean ± standard deviation over seeds. js and mine: lower bounds by critics; rate: an upper bound "
            "of what a stochastic embedding keeps of the image. ≥: saturated in some run, so a lower limit. "
            "?: an estimate that fails a self-check in some run.",
            "quantity", _of_group(values, "mi"), values, variants, a_row_is="measure",
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _of_group(values: Values, group: Group) -> list[Measure]:
    return [measure for measure in values if measure.group == group]


def _detectors_of(values: Values, where: str) -> list[Measure]:
    """The AUROC of every detector, in the order of `fastssl eval ood` whichever run has which detectors."""
    order = {name: position for position, name in enumerate(DETECTORS)}
    found = [measure for measure in _of_group(values, "ood") if measure.metric.split()[1] == where]
    return sorted(found, key=lambda measure: order.get(measure.metric.split()[0], len(order)))


def _sets(values: Values, where: str) -> list[str]:
    found = (found for measure in _of_group(values, "ood") for found in values[measure].values())
    return sorted({name for each in found for name in cast(dict[str, Any], each.result)[where]})


def comparison_table(
    title: str,
    caption: str,
    corner: str,
    measures: Sequence[Measure],
    values: Values,
    variants: Sequence[Variant],
    a_row_is: Literal["variant", "measure"] = "variant",
) -> ReportTable:
    """Return a table of the variants that have one of the measures; marks say where one differs from its baseline."""
    shown = [v for v in variants if any(run.dir in values[measure] for run in v.runs for measure in measures)]
    compared = {
        (variant, measure): difference
        for variant in shown for measure in measures
        if measure.info.better and (difference := compare_with_baseline(measure, variant, values[measure]))
    }  # fmt: skip
    adjusted = dict(zip(compared, holm([difference.p for difference in compared.values()])))
    differences = [
        _difference_row(variant, measure, difference, adjusted[variant, measure])
        for (variant, measure), difference in compared.items()
    ]
    marks = {key: _mark(key[1], difference, adjusted[key]) for key, difference in compared.items()}
    sentences = [_sentence(*key, difference, marks[key]) for key, difference in compared.items()]

    def cell(variant: Variant, measure: Measure) -> Cell:
        found = [values[measure][run.dir] for run in variant.runs if run.dir in values[measure]]
        text = mean_and_std([each.value for each in found], measure)
        return Cell(_with_doubts(text, measure, [each.result for each in found]), marks.get((variant, measure), ""))

    if a_row_is == "variant":
        columns = [_heading(measure) for measure in measures]
        rows = [(_with_seeds(variant), [cell(variant, measure) for measure in measures]) for variant in shown]
    else:
        columns = [_with_seeds(variant) for variant in shown]
        rows = [(_heading(measure), [cell(variant, measure) for variant in shown]) for measure in measures]
    caption += MARKED if compared else ""
    findings = _findings(title, list(marks.values()), sentences)
    return ReportTable(title, caption, corner, columns, rows, differences, findings)


def mean_and_std(values: Sequence[float], measure: Measure) -> str:
    if not values:
        return NONE
    show = measure.info.format
    text = show(statistics.fmean(values), with_unit=False)
    return text + (f" ± {show(statistics.stdev(values), with_unit=False)}" if len(values) > 1 else "")


def _with_doubts(text: str, measure: Measure, results: Sequence[EvaluationResult]) -> str:
    """Mark lower limits with ≥ and estimates that failed a self-check with ?, as `fastssl eval mi` does."""
    sign = "≥ " if any(measure.metric in result.get("saturated", []) for result in results) else ""
    failed = unreliable_quantities(check for result in results for check in result.get("failed", []))
    # The rate is computed from the known q, so no self-check concerns it.
    is_doubtful = measure.metric.endswith((" js", " mine")) and measure.metric.split(" ")[0] in failed
    return sign + text + (" ?" if is_doubtful else "")


def _heading(measure: Measure) -> str:
    if measure.group == "ood":
        detector = measure.metric.split()[0]
        return f"{detector} *" if detector in LABEL_BASED else detector
    return measure.title + {"up": " ↑", "down": " ↓", "": ""}[measure.info.better]


def _with_seeds(variant: Variant) -> str:
    seeds = len(variant.runs)
    return f"{variant.label} ({seeds} seed{'s' if seeds > 1 else ''})"


def _mark(measure: Measure, difference: Difference, adjusted: float) -> Mark:
    if adjusted >= 1 - LEVEL:
        return ""
    return "better" if (difference.mean > 0) == (measure.info.better == "up") else "worse"


def _findings(title: str, marks: Sequence[Mark], sentences: Sequence[str]) -> list[str]:
    """Count the differences outside and within the noise; where they are few, name each."""
    if not marks:
        return []
    counts = (
        f"{title}, {count_of(len(marks), 'comparison')} with the baselines: {marks.count('better')} better, "
        f"{marks.count('worse')} worse, {marks.count('')} within the noise"
    )
    if len(marks) > MOST_DIFFERENCES:
        return [f"{counts}."]
    return [f"{counts}. Differences with 95 % intervals:", *sentences]


def _sentence(variant: Variant, measure: Measure, difference: Difference, mark: Mark) -> str:
    """Say how much a variant differs from its baseline, and whether that is more than the noise."""
    baseline = variant.baseline.label if variant.baseline else NONE
    unit = {"%": " points", "nats": " nats", "": ""}[measure.info.unit]
    noise = f"the noise of {count_of(difference.seeds, 'seed')}"
    noise += f" and {count_of(difference.images, 'test image')}" if difference.images else ""
    # The interval is of one difference, and may leave out 0 where Holm's correction for all of them does not.
    is_outside_alone = not difference.low <= 0 <= difference.high
    corrected = " after Holm's correction" if is_outside_alone and not mark else ""
    return (
        f"{variant.label} against {baseline}, {measure.title}: {with_sign(difference.mean, measure)}{unit} "
        f"({interval_of(difference, measure)}), {f'{mark} by more than' if mark else 'within'} {noise}{corrected}."
    )


def _difference_row(variant: Variant, measure: Measure, difference: Difference, adjusted: float) -> list[str]:
    return [
        variant.label, variant.baseline.label if variant.baseline else NONE, measure.title,
        with_sign(difference.mean, measure), interval_of(difference, measure), f"{adjusted:.3f}",
        str(difference.seeds), f"{difference.images:,}" if difference.images else NONE,
    ]  # fmt: skip


def with_sign(mean: float, measure: Measure) -> str:
    return f"{'+' if mean > 0 else ''}{measure.info.format(mean, with_unit=False)}"


def interval_of(difference: Difference, measure: Measure) -> str:
    low, high = (measure.info.format(bound, with_unit=False) for bound in (difference.low, difference.high))
    return f"{low} to {high}"


HEAT_MAP_KEYS = ("embedding.beta", "embedding.samples", "embedding.prior")
MOST_MEASURES = 4  # of which heat maps are drawn


def heat_maps(values: Values, variants: Sequence[Variant]) -> list[ReportTable]:
    """Return tables of beta x samples, one for each measure and for variants that agree in all else but these.

    Only where two of beta, samples and prior vary, or one of them has three values.
    """
    maps = []
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.recipe.embedding.stochastic != "none":
            groups.setdefault(_all_else(variant.recipe), []).append(variant)
    measures = [m for m in values if (m.group, m.metric) == ("uncertainty", "r_auroc") or m.group == "accuracy"]
    for group in groups.values():
        points = {variant: tuple(flat(variant.recipe)[key] for key in HEAT_MAP_KEYS) for variant in group}
        varying = [len(set(column)) for column in zip(*points.values())]
        if max(varying) < 3 and sum(count > 1 for count in varying) < 2:
            continue
        for measure in measures[:MOST_MEASURES]:
            maps += _heat_map(measure, values[measure], points)
    return maps


def _all_else(recipe: Recipe) -> str:
    return repr({key: value for key, value in compared_values(recipe).items() if key not in HEAT_MAP_KEYS})


def _heat_map(
    measure: Measure, found: dict[Path, Found], points: dict[Variant, tuple[float, int, str]]
) -> list[ReportTable]:
    means = {
        points[variant]: statistics.fmean(values)
        for variant in points
        if (values := [found[run.dir].value for run in variant.runs if run.dir in found])
    }
    if not means:
        return []
    betas = sorted({beta for beta, _, _ in means})
    rows_of = sorted({(prior, samples) for _, samples, prior in means})
    low, high = min(means.values()), max(means.values())

    def cell(beta: float, prior: str, samples: int) -> Cell:
        value = means.get((beta, samples, prior))
        if value is None:
            return Cell(NONE)
        return Cell(measure.info.format(value, with_unit=False), share=(value - low) / (high - low or 1))

    embedding = next(iter(points)).recipe.embedding.stochastic
    objective = next(iter(points)).label.partition(",")[0]
    return [
        ReportTable(
            f"{measure.title}: {objective}",
            f"{_heading(measure)} over beta, samples and prior of {embedding}; mean over seeds.",
            "prior, samples", [f"beta {beta:g}" for beta in betas],
            [(f"{prior}, S = {samples}", [cell(beta, prior, samples) for beta in betas]) for prior, samples in rows_of],
        )
    ]  # fmt: skip
