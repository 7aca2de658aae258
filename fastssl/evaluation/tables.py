"""Tables of evaluation results: one run with intervals; several runs with mean and standard deviation over seeds."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import PlainConsole, printable
from fastssl.evaluation.metric_info import chance_levels, explanations, metric_info
from fastssl.evaluation.results import EvaluationResult, without_paths
from fastssl.evaluation.verdict import result_verdict
from fastssl.recipe import load_recipe

UNLIMITED = 100_000  # columns of a terminal that needs no wrapping
CHANCE_LINE = "chance: value of a guess that knows nothing about the image (top-1: always the most frequent class)."
LEGEND = (
    "95 % interval: bootstrap over the tested images, not over seeds of the training. " + CHANCE_LINE,
    "Every word: docs/glossary.md, section Evaluation.",
)


class FirstThatFits:
    """Of several forms of a table, the first one that the terminal is wide enough for; else the last one."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    @cached_property
    def needed_widths(self) -> list[int]:
        return [needed_width(table) for table in self.tables]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pairs = zip(self.tables, self.needed_widths, strict=True)
        yield next((table for table, width in pairs if width <= options.max_width), self.tables[-1])


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
    chance: dict[str, float] = field(default_factory=dict)  # metrics without information about the images

    def label(self) -> str:
        """The name of the first run, and the number of the others on a second line."""
        others = f"\nand {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return Path(self.runs[0]).resolve().name + (" (untrained)" if self.untrained else "") + others

    def short_label(self) -> str:
        return self.label().replace("\n", " ")

    def heading(self) -> str:
        """The evaluation, the runs, and the uncertainty that was measured."""
        return "\n".join(filter(None, [self.evaluation, self.label(), self.score]))

    def format(self, name: str) -> str:
        """A metric with its unit; "" for one that the runs do not all have."""
        if name not in self.metrics:
            return ""
        info = metric_info(name)
        shown = self.metrics[name].format(partial(info.format, with_unit=False))
        return shown + (f" {info.unit}" if info.unit else "")


def result_title(result: EvaluationResult) -> str:
    return f"{result['evaluation']}: {result['run']}" + (" (untrained)" if result["weights"] == "untrained" else "")


def result_table(result: EvaluationResult) -> Group:
    """Show the metrics of one result with their 95 % intervals, what they say in a sentence, and what they mean."""
    table = plain_table(result_title(result))
    table.add_column("metric", overflow="fold")
    for heading in ("value", "95 % interval", "better", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    chance = chance_levels(result)
    for name, value in result["metrics"].items():
        info = metric_info(name)
        interval = " to ".join(info.format(bound, with_unit=False) for bound in result["intervals"].get(name, []))
        no_information = info.format(chance[name]) if name in chance else ""
        table.add_row(info.label, info.format(value), interval, info.better, no_information)
    return Group(
        table,
        text_lines(result_verdict(result)),
        text_lines([*explanations(list(result["metrics"])), *LEGEND], style="dim"),
        text_lines(_about(result), style="dim"),
    )


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
    for name in group[0]["metrics"]:
        if all(name in result["metrics"] for result in group):
            values = [result["metrics"][name] for result in group]
            metrics[name] = MeanAndStd(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return SummaryRow(
        evaluation=group[0]["evaluation"],
        runs=[result["run"] for result in group],
        seeds=[load_recipe(Path(result["run"]) / "recipe.yaml").seed for result in group],
        untrained=group[0]["weights"] == "untrained",
        metrics=metrics,
        score=group[0]["settings"].get("score"),
        saturated=sorted({name for result in group for name in result.get("saturated", [])}),
        failed=sorted({name for result in group for name in result.get("failed", [])}),
        chance=chance_levels(group[0]),
    )


def summary_table(rows: Sequence[SummaryRow]) -> Group:
    """Show the rows of `summarize_runs`: a line per metric or per row, whichever fits, else one row after the other."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    forms = [_line_per_metric(rows, names), _line_per_row(rows, names)]
    if len(names) < len(rows):
        forms.reverse()
    return Group(
        FirstThatFits([*forms, _rows_one_after_the_other(rows)]),
        text_lines(runs_verdict(rows)),
        text_lines([*explanations(names), "mean ± std over the seeds of runs.", CHANCE_LINE], style="dim"),
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
        levels = {row.chance[name] for row in rows if name in row.chance}
        chance = info.format(levels.pop()) if len(levels) == 1 else ""
        table.add_row(info.label, *(row.format(name) for row in rows), info.better, chance)
    return table


def _line_per_row(rows: Sequence[SummaryRow], names: Sequence[str]) -> Table:
    table = plain_table("")
    table.add_column("run")
    for name in names:
        info = metric_info(name)
        table.add_column(f"{info.label}\n(better: {info.better})", justify="right", max_width=18)
    for row in rows:
        table.add_row(row.heading().replace("\n", " "), *(row.format(name) for name in names))
    return table


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
) -> FirstThatFits:
    """Return a table with a line per name and a column per row; in a narrow terminal one row after the other.

    Args:
        heading: of the names.
        value: heading of the cells where rows follow each other.
        rows: of `summarize_runs`.
        names: of the lines; repeated ones count once.
        cell: returns the text of a row and a name, "" where there is none.
        show: returns how a name is shown.
    """
    unique = list(dict.fromkeys(names))
    side_by_side = plain_table("")
    side_by_side.add_column(heading, no_wrap=True)
    for row in rows:
        side_by_side.add_column(row.label(), justify="right")
    for name in unique:
        side_by_side.add_row(show(name), *(cell(row, name) for row in rows))
    stacked = plain_table("")
    stacked.add_column(heading, overflow="fold")
    stacked.add_column(value, justify="right", no_wrap=True)
    for row in rows:
        stacked.add_section()
        stacked.add_row(row.short_label(), "")
        for name in unique:
            if text := cell(row, name):
                stacked.add_row(f"  {show(name)}", text)
    return FirstThatFits([side_by_side, stacked])


def runs_verdict(rows: Sequence[SummaryRow]) -> list[str]:
    """Name the best row of each evaluation by its first metric, and say what chance is."""
    sentences = []
    for evaluation in dict.fromkeys(row.evaluation for row in rows):
        same = [row for row in rows if row.evaluation == evaluation and row.metrics]
        name = next((name for row in same for name in row.metrics), None)
        same = [row for row in same if name in row.metrics]
        if name is None:
            continue
        info = metric_info(name)
        choose = max if info.better == "up" else min
        best = choose(same, key=lambda row: row.metrics[name].mean)
        sentence = f"{evaluation}: " + ("best is " if len(same) > 1 else "") + f"{best.short_label()}"
        sentence += f" with {info.label} {best.format(name)}"
        if name in best.chance:
            sentence += f"; chance is {info.format(best.chance[name])}"
        sentences.append(sentence + ".")
    return sentences


def write_summary(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Write the rows as JSON: {"rows": [fields of SummaryRow, ...]}."""
    text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    with explain_write_errors(path):
        write_atomically(path, text)
