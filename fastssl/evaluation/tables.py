"""Tables of evaluation results: one run with intervals; several runs with mean and standard deviation over seeds."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.table import Table

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.evaluation.results import EvaluationResult, without_paths
from fastssl.recipe import load_recipe

# Units of the metrics that are no shares from 0 to 1. The shares are shown in percent.
UNITS = {"nll": "nats", "nll_scaled": "nats"}
UNITS |= dict.fromkeys(("aurc", "e_aurc", "aurc_confidence", "e_aurc_confidence"), "0 to 1")
UNITS |= dict.fromkeys(("spearman_blur", "spearman_noise", "spearman_jpeg", "spearman_crop"), "-1 to 1")
MAX_METRIC_COLUMNS = 10  # of a table of several runs; with more metrics, each one is a line


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

    def label(self) -> str:
        """The name of the first run, and the number of the others."""
        others = f"\nand {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return Path(self.runs[0]).resolve().name + (" (untrained)" if self.untrained else "") + others


def format_metric(name: str, value: float) -> str:
    """A share in percent, any other value as it is."""
    return f"{value:.3f}" if name in UNITS else f"{100 * value:.2f}"


def metric_label(name: str) -> str:
    """The name of a metric, with its unit unless that is percent."""
    return f"{name} ({UNITS[name]})" if name in UNITS else name


def result_title(result: EvaluationResult) -> str:
    return f"{result['evaluation']}: {result['run']}" + (" (untrained)" if result["weights"] == "untrained" else "")


def result_table(result: EvaluationResult) -> Table:
    """The metrics of one result with their 95 % intervals over the test images."""
    val, train = result["val"], result["train"]
    lines = [
        f"fitted on {train['images']:,} images of {train['path']}",
        f"tested on {val['images']:,} images of {val['path']} ({result['layout']} file)",
        "95 % bootstrap intervals over the tested images",
        f"measured {result['measured_at']}",
    ]
    if score := result["settings"].get("score"):
        spread = result["uncertainty"]
        lines.insert(2, f"uncertainty: {score}, {spread['mean']:.4g} ± {spread['std']:.2g} over them")
    title = result_title(result)
    table = Table("metric", title=title, caption="\n".join(lines), min_width=max(map(len, [title, *lines])))
    for heading in ("%", "from", "to"):
        table.add_column(heading, justify="right")
    for name, value in result["metrics"].items():
        interval = [format_metric(name, bound) for bound in result["intervals"].get(name, [])]
        table.add_row(metric_label(name), format_metric(name, value), *interval)
    return table


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
    )


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """One line per row of `summarize_runs`, or one column per row if there are many metrics."""
    headings = ["evaluation", "run", "seeds"]
    if any(row.score for row in rows):
        headings.append("score")
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    cells = []
    for row in rows:
        about = [row.evaluation, row.label().replace("\n", " "), str(len(row.runs)), row.score or ""]
        metrics = [
            row.metrics[name].format(partial(format_metric, name)) if name in row.metrics else "" for name in names
        ]
        cells.append(about[: len(headings)] + metrics)

    row_per_run = len(names) <= MAX_METRIC_COLUMNS
    table = Table(caption="shares in percent, nll in nats; mean ± std over seeds", show_header=row_per_run)
    for heading in headings if row_per_run else [""]:
        table.add_column(heading)
    for heading in [name.replace("_", "\n") for name in names] if row_per_run else [""] * len(rows):
        table.add_column(heading, justify="right", overflow="fold")
    for line in cells if row_per_run else zip([*headings, *map(metric_label, names)], *cells, strict=True):
        table.add_row(*line)
    return table


def write_summary(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Write the rows as JSON: {"rows": [fields of SummaryRow, ...]}."""
    text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    with explain_write_errors(path):
        write_atomically(path, text)
