"""Tables of evaluation results: one run with intervals; several runs with mean and standard deviation over seeds."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import PlainConsole, count_of, printable
from fastssl.evaluation.metric_info import chance_levels, explanations, metric_info
from fastssl.evaluation.results import EvaluationResult, Interval, without_paths
from fastssl.evaluation.verdict import result_verdict
from fastssl.recipe import load_recipe

UNLIMITED = 100_000  # columns of a terminal that needs no wrapping
INTERVAL_LINE = "95 % interval: bootstrap over the tested images, not over seeds of the training."
INTERVALS_LINE = (
    "95 % intervals, as in brackets above: of several seeds, of their mean, over seeds (Student's t) and tested "
    "images (bootstrap); of a single run, over the tested images alone, so another seed may differ more."
)
CHANCE_LINE = "chance: value of a guess that knows nothing about the image (top-1: always the most frequent class)."
NOISE = "the 95 % intervals"
COMPARE = (
    "mean ± std over the seeds of runs. fastssl report compares them seed by seed and image by image, and sees smaller "
    "differences."
)
WORDS = "Every word: docs/glossary.md, section Evaluation."


class FirstThatFits:
    """Of several forms of a table, the first one that the terminal is wide enough for; else the last one.

    below: for each form, what is shown under it.
    """

    def __init__(self, tables: Sequence[Table], below: Sequence[RenderableType] = ()) -> None:
        self.tables = tables
        self.below = below

    @cached_property
    def needed_widths(self) -> list[int]:
        return [needed_width(table) for table in self.tables]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = [form for form, width in enumerate(self.needed_widths) if width <= options.max_width]
        chosen = fitting[0] if fitting else len(self.tables) - 1
        yield self.tables[chosen]
        if self.below:
            yield self.below[chosen]


def needed_width(table: Table) -> int:
    """Return the columns that a table needs if no cell is wrapped, as rich measures them."""
    console = PlainConsole(width=UNLIMITED, markup=False, emoji=False)
    return Measurement.get(console, console.options, table).maximum


def plain_table(title: str) -> Table:
    """Return an empty table in the style of all evaluations."""
    return Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def text_lines(lines: Iterable[str], style: str = "") -> Text:
    """Return lines of text that wrap between words, and that show names of files and sets as they are."""
    return Text("\n".join(map(printable, lines)) + "\n", style=style, overflow="fold")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


@dataclass(frozen=True)
class MeanAndStd:
    mean: float
    std: float | None  # with n - 1; None for a single run

    def format(self, show: Callable[[float], str]) -> str:
        return show(self.mean) + ("" if self.std is None else f" ± {show(self.std)}")


@dataclass(frozen=True)
class SummaryRow:
    """Results of runs that differ in their seed alone."""

    evaluation: str
    runs: list[str]  # run directories
    seeds: list[int]  # of the runs
    untrained: bool
    metrics: dict[str, MeanAndStd]  # those that all of the runs have
    score: str | None = None  # which uncertainty was measured, in an evaluation of one
    saturated: list[str] = field(default_factory=list)  # metrics that are lower limits in some run
    failed: list[str] = field(default_factory=list)  # self-checks that failed in some run
    chance: dict[str, float] = field(default_factory=dict)  # metrics without information about the images; means
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95 %, of `interval_of_mean`
    val: dict[str, Any] = field(default_factory=dict)  # the images that were tested on, without paths
    inverted: dict[str, list[str]] = field(default_factory=dict)  # OOD detector -> sets, inverted in some run

    def label(self) -> str:
        """What the runs are called, and on a second line their number: "vicreg", "(3 seeds)".

        Runs without a common name are called by the first one.
        """
        # A sweep makes NAME/seed=0 of the recipe NAME: without it, all of its runs have one name.
        paths = [Path(run).resolve() for run in self.runs]
        names = [f"{path.parent.name}/{path.name}" if "=" in path.name else path.name for path in paths]
        without_seed = {re.sub(r"(?<=[/,])seed=[^,]*,?", "", name).rstrip("/,") for name in names}
        of_weights = " (untrained)" if self.untrained else ""
        if len(names) == 1:
            return names[0] + of_weights
        if len(without_seed) == 1:
            return f"{without_seed.pop()}{of_weights}\n({count_of(len(names), 'seed')})"
        return f"{names[0]}{of_weights}\nand {len(names) - 1} more"

    def short_label(self) -> str:
        return self.label().replace("\n", " ")

    def heading(self) -> str:
        """The evaluation, the runs, and the uncertainty that was measured."""
        return "\n".join(filter(None, [self.evaluation, self.label(), self.score]))

    def noise(self, name: str) -> tuple[float, float]:
        """The 95 % interval of a metric; without one its value, twice."""
        low, high = self.intervals.get(name, [self.metrics[name].mean] * 2)
        return low, high

    def with_noise(self, name: str) -> str:
        """A metric with its unit and its 95 % interval, if there is one, such as "48.8 ± 0.4 % (47.8 to 49.8)"."""
        if name not in self.intervals:
            return self.format(name)
        bounds = [metric_info(name).format(bound, with_unit=False) for bound in self.noise(name)]
        return f"{self.format(name)} ({' to '.join(bounds)})"

    def format(self, name: str) -> str:
        """A metric with its unit; "" for one that the runs do not all have."""
        if name not in self.metrics:
            return ""
        info = metric_info(name)
        shown = self.metrics[name].format(partial(info.format, with_unit=False))
        return shown + (f" {info.unit}" if info.unit else "")


def interval_of_mean(values: Sequence[float], of_images: Sequence[Interval]) -> Interval:
    """The 95 % interval of the mean of a metric over runs that differ in their seed alone, and over test images.

    Args:
        values: of each run.
        of_images: of each run, its interval over test images. [] where the metric has none: it takes two runs then.
    """
    if len(values) == 1:
        return list(of_images[0])
    mean = statistics.fmean(values)
    of_seeds = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    # More seeds do not make the noise of the images smaller: all of them are tested on the same ones.
    low = statistics.fmean(low for low, _ in of_images) if of_images else mean
    high = statistics.fmean(high for _, high in of_images) if of_images else mean
    # Of the sum of independent errors, the root of the summed squares of their reaches, each with its own quantile,
    # covers at least 95 % (Banerjee, 1960, Sankhya 22, 357), also where two seeds agree by chance. With the one
    # quantile of fastssl report (degrees of freedom of Satterthwaite), it covered 88 % with two seeds in a simulation.
    return [mean - math.hypot(of_seeds, mean - low), mean + math.hypot(of_seeds, high - mean)]


def result_title(result: EvaluationResult) -> str:
    return f"{result['evaluation']}: {result['run']}" + (" (untrained)" if result["weights"] == "untrained" else "")


def result_table(result: EvaluationResult) -> Group:
    """Show the metrics of one result with their 95 % intervals, what they say in a sentence, and what they mean."""
    table = plain_table(result_title(result))
    table.add_column("metric", overflow="fold")
    for heading in ("value", "95 % interval", "better", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    chance = chance_levels(result["metrics"], result.get("chance", {}))
    for name, value in result["metrics"].items():
        info = metric_info(name)
        interval = " to ".join(info.format(bound, with_unit=False) for bound in result["intervals"].get(name, []))
        no_information = info.format(chance[name]) if name in chance else ""
        table.add_row(info.label, info.format(value), interval, info.better, no_information)
    return Group(
        table,
        text_lines(result_verdict(result)),
        text_lines([*_legend(list(result["metrics"]), bool(chance)), WORDS], style="dim"),
        text_lines(_about(result), style="dim"),
    )


def _legend(names: list[str], has_chance: bool, of_intervals: str = INTERVAL_LINE) -> list[str]:
    return [*explanations(names), of_intervals + (f" {CHANCE_LINE}" if has_chance else "")]


def _about(result: EvaluationResult) -> list[str]:
    """Return lines about the images of a result."""
    val, train = result["val"], result["train"]
    lines = [
        f"fitted on {train['images']:,} images of {train['path']}",
        f"tested on {val['images']:,} images of {val['path']} ({result['layout']} file)",
    ]
    if score := result["settings"].get("score"):
        spread = result["uncertainty"]
        lines.append(f"uncertainty: {score}, {spread['mean']:.4g} ± {spread['std']:.2g} over them")
    return [*lines, f"measured {result['measured_at']}"]


def summarize_runs(results: Sequence[EvaluationResult]) -> list[SummaryRow]:
    """Group results that differ in the seed of their run alone, in the order of their first run."""
    groups: dict[str, list[EvaluationResult]] = {}
    for result in results:
        recipe = load_recipe(Path(result["run"]) / "recipe.yaml").model_dump(mode="json", exclude={"seed", "run"})
        shared = {key: result.get(key) for key in ("evaluation", "settings", "view", "train", "val", "near", "far")}
        key = json.dumps([without_paths(shared), recipe, Path(result["weights"]).name], sort_keys=True)
        group = groups.setdefault(key, [])
        # A run that was given twice counts once.
        if result["encoder_sha256"] not in [other["encoder_sha256"] for other in group]:
            group.append(result)
    return [_summary_row(group) for group in groups.values()]


def _summary_row(group: list[EvaluationResult]) -> SummaryRow:
    metrics = {}
    intervals = {}
    for name in group[0]["metrics"]:
        if all(name in result["metrics"] for result in group):
            values = [result["metrics"][name] for result in group]
            metrics[name] = MeanAndStd(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
            of_images = [result["intervals"][name] for result in group if name in result.get("intervals", {})]
            if len(of_images) < len(group):  # results of older versions may lack it
                of_images = []
            if len(values) > 1 or of_images:
                intervals[name] = interval_of_mean(values, of_images)
    levels = [chance_levels(result["metrics"], result.get("chance", {})) for result in group]
    return SummaryRow(
        evaluation=group[0]["evaluation"],
        runs=[result["run"] for result in group],
        seeds=[load_recipe(Path(result["run"]) / "recipe.yaml").seed for result in group],
        untrained=group[0]["weights"] == "untrained",
        metrics=metrics,
        score=group[0]["settings"].get("score"),
        saturated=sorted({name for result in group for name in result.get("saturated", [])}),
        failed=sorted({name for result in group for name in result.get("failed", [])}),
        chance={
            name: statistics.fmean(each[name] for each in levels)
            for name in metrics
            if all(name in each for each in levels)
        },
        intervals=intervals,
        val=cast(dict[str, Any], without_paths(dict(group[0]["val"]))),
        inverted=_inverted_sets(group),
    )


def _inverted_sets(group: list[EvaluationResult]) -> dict[str, list[str]]:
    """Return for each OOD detector the sets on which it is inverted in some run."""
    inverted: dict[str, set[str]] = {}
    for result in group:
        for detector, row in cast(dict[str, Any], result.get("detectors", {})).items():
            names = {name for name, found in row["sets"].items() if found["inverted"]}
            if names:
                inverted[detector] = inverted.get(detector, set()) | names
    return {detector: sorted(names) for detector, names in inverted.items()}


def summary_table(rows: Sequence[SummaryRow]) -> Group:
    """Show the rows of `summarize_runs`: a line per metric or per row, whichever fits, else one row after the other."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    has_chance = any(row.chance for row in rows)
    forms = [_line_per_metric(rows, names), _line_per_row(rows, names)]
    if len(names) < len(rows):
        forms.reverse()
    return Group(
        FirstThatFits([*forms, _rows_one_after_the_other(rows)]),
        text_lines(runs_verdict(rows)),
        text_lines([*_legend(names, has_chance, INTERVALS_LINE), COMPARE, WORDS], style="dim"),
    )


def _line_per_metric(rows: Sequence[SummaryRow], names: Sequence[str]) -> Table:
    table = plain_table("")
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.heading(), justify="right")
    table.add_column("better", justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for name in names:
        info = metric_info(name)
        table.add_row(info.label, *(row.format(name) for row in rows), info.better, _chance(rows, name))
    return table


def _line_per_row(rows: Sequence[SummaryRow], names: Sequence[str]) -> Table:
    table = plain_table("")
    table.add_column("run")
    for name in names:
        info = metric_info(name)
        known = {"better": info.better, "chance": _chance(rows, name)}
        notes = "".join(f"\n({key}: {text})" for key, text in known.items() if text)
        table.add_column(info.label + notes, justify="right", max_width=28)
    for row in rows:
        table.add_row(row.heading().replace("\n", " "), *(row.format(name) for name in names))
    return table


def _chance(rows: Sequence[SummaryRow], name: str) -> str:
    """Return the chance level of a metric, or the range of those of the rows; "" if there is none."""
    info = metric_info(name)
    levels = [row.chance[name] for row in rows if name in row.chance]
    if not levels:
        return ""
    lowest, highest = info.format(min(levels)), info.format(max(levels))
    return lowest if lowest == highest else f"{info.format(min(levels), with_unit=False)} to {highest}"


def _rows_one_after_the_other(rows: Sequence[SummaryRow]) -> Table:
    table = plain_table("")
    table.add_column("metric", overflow="fold")
    for heading in ("mean ± std", "better", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_section()
        table.add_row(row.heading().replace("\n", " "))
        for name in row.metrics:
            info = metric_info(name)
            chance = info.format(row.chance[name]) if name in row.chance else ""
            table.add_row(f"  {info.label}", row.format(name), info.better, chance)
    return table


def table_of_rows(
    heading: str,
    value: str,
    rows: Sequence[SummaryRow],
    names: Iterable[str],
    cell: Callable[[SummaryRow, str], str],
    show: Callable[[str], str] = str,
    second: tuple[str, Callable[[SummaryRow, str], str]] | None = None,
) -> FirstThatFits:
    """Return a table with a line per name and a column per row; in a narrow terminal one row after the other.

    Args:
        heading: of the names.
        value: heading of the cells where rows follow each other.
        rows: of `summarize_runs`.
        names: of the lines; repeated ones count once.
        cell: returns the text of a row and a name, "" where there is none.
        show: returns how a name is shown.
        second: heading and cells of another column after each column of cells.
    """
    columns = [(value, cell), *([second] if second else [])]
    unique = list(dict.fromkeys(names))
    side_by_side = plain_table("")
    side_by_side.add_column(heading, no_wrap=True)
    for row in rows:
        side_by_side.add_column(row.label(), justify="right")
        if second:
            side_by_side.add_column(second[0], justify="right", no_wrap=True)
    for name in unique:
        side_by_side.add_row(show(name), *(show_cell(row, name) for row in rows for _, show_cell in columns))
    stacked = plain_table("")
    stacked.add_column(heading, overflow="fold")
    for title, _ in columns:
        stacked.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        stacked.add_section()
        stacked.add_row(row.short_label())
        for name in unique:
            if cell(row, name):
                stacked.add_row(f"  {show(name)}", *(show_cell(row, name) for _, show_cell in columns))
    return FirstThatFits([side_by_side, stacked])


def runs_verdict(rows: Sequence[SummaryRow]) -> list[str]:
    """Name the best row of each evaluation by its first metric, or those that differ by no more than noise.

    Only rows with the same test images and the same first metric are compared.
    """
    sentences = []
    for evaluation in dict.fromkeys(row.evaluation for row in rows):
        groups: dict[str, list[SummaryRow]] = {}
        for row in rows:
            if row.evaluation == evaluation and row.metrics:
                groups.setdefault(json.dumps([_first_metric(row), row.val], sort_keys=True), []).append(row)
        sentences += [f"{evaluation}: {_best_of(group)}." for group in groups.values()]
        if len(groups) > 1:
            sentences.append(f"{evaluation}: runs with other test images or another first metric are not compared.")
    return sentences


def _first_metric(row: SummaryRow) -> str:
    return next(iter(row.metrics))


def _best_of(rows: Sequence[SummaryRow]) -> str:
    """Name the best of rows that can be compared, and say how it compares with chance."""
    name = _first_metric(rows[0])
    info = metric_info(name)
    if len(rows) > 1 and not info.better:
        return f"whether a higher {info.label} is better is not known"
    best = (min if info.better == "down" else max)(rows, key=lambda row: row.metrics[name].mean)
    low, high = best.noise(name)
    chance = f"; {info.against_chance(low, high, best.chance[name])}" if name in best.chance else ""
    if len(rows) == 1:
        return f"{best.short_label()} with {info.label} {best.with_noise(name)}{chance}"
    equal = [row for row in rows if row.noise(name)[0] <= high and row.noise(name)[1] >= low]  # with `best` itself
    if len(equal) == 1:
        return f"best is {best.short_label()} with {info.label} {best.with_noise(name)}, beyond {NOISE}{chance}"
    named = [f"{row.short_label()} with {row.with_noise(name)}" for row in equal]
    if len(named) > 3:
        named = [*named[:2], f"{len(named) - 2} more"]
    worse = len(rows) - len(equal)
    others = f"; {worse} {'is' if worse == 1 else 'are'} worse" if worse else ""
    joined = f"{', '.join(named[:-1])} and {named[-1]}"
    return f"no difference in {info.label} beyond {NOISE} between {joined}{others}{chance}"


def write_summary(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Write the rows as JSON: {"rows": [fields of SummaryRow, ...]}."""
    text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    with explain_write_errors(path):
        write_atomically(path, text)
