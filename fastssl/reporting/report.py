"""What a report shows: made from run directories, written by page.py and text.py."""

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fastssl.common.files import open_regular
from fastssl.common.terminal import count_of, progress
from fastssl.profiling.tables import headline as profile_headline
from fastssl.reporting.measures import EVALUATIONS, Values, collect_measures, kind_of
from fastssl.reporting.runs import Run, find_runs, read_run
from fastssl.reporting.tables import NONE, Cell, ReportTable, heat_maps, result_tables
from fastssl.reporting.variants import Variant, group_runs

LARGEST_VIEWS = 2 << 20  # bytes of a views.png that a page holds
PNG = b"\x89PNG\r\n\x1a\n"
# Options of `fastssl eval` that have no default.
NEEDED_OPTIONS = {"transfer": " --to NAME=DATA", "ood": " --near NEAR.beton --far FAR.beton"}


class Views(NamedTuple):
    png: bytes
    caption: str


@dataclass(frozen=True)
class Report:
    """All that a report shows, as text."""

    title: str
    findings: list[str]  # sentences: which variants differ from their baselines
    variants: list[Variant]
    values: Values
    tables: list[ReportTable]
    heat_maps: list[ReportTable]
    runs: ReportTable
    views: Views | None
    missing: list[str]  # commands
    remarks: list[str]  # what is left out, and what could not be read
    commands: list[tuple[str, str]]  # run -> what started it
    environment: str


def make_report(paths: Sequence[Path], baseline: Path | None = None) -> Report:
    """Read the runs in `paths`, and compare them.

    Args:
        paths: run directories, and folders that hold some, such as those of sweeps.
        baseline: one of the run directories, with whose variant all others are compared; None: each stochastic variant
            is compared with the deterministic one of the same objective.

    Raises:
        UserError: there is no run in one of them, a recipe is damaged, or `baseline` is none of the runs.
    """
    found = find_runs(paths)
    runs = []
    with progress("Reading runs", len(found), "runs") as advance:
        for path in found:
            runs.append(read_run(path))
            advance(1)
    variants, remarks = group_runs(runs, baseline)
    runs = [run for variant in variants for run in variant.runs]
    values, left_out = collect_measures(runs)
    untrained, left_out_untrained = _untrained(runs)
    tables = result_tables(values, variants)
    unfinished = [
        f"{run.dir} is not finished: its results are those of its last checkpoint"
        for run in runs
        if not run.is_finished
    ]
    return Report(
        title=f"{count_of(len(variants), 'variant')}, {count_of(len(runs), 'run')}",
        findings=[*_findings(tables, variants), *untrained],
        variants=variants,
        values=values,
        tables=tables,
        heat_maps=heat_maps(values, variants),
        runs=_runs_table(variants),
        views=_views(runs),
        missing=_missing(runs),
        remarks=[*unfinished, *remarks, *left_out, *left_out_untrained, *(line for run in runs for line in run.unread)],
        commands=[(str(run.dir), _command(run)) for run in runs],
        environment=_environment(runs),
    )


def _findings(tables: Sequence[ReportTable], variants: Sequence[Variant]) -> list[str]:
    """Say for each table with comparisons how many of them are outside the noise."""
    sentences = []
    for table in tables:
        marks = [cell.mark for _, cells in table.rows for cell in cells]
        if table.differences:
            better, worse = marks.count("better"), marks.count("worse")
            sentences.append(
                f"{table.title}: {better} better and {worse} worse than their baselines by more than the noise, "
                f"of {count_of(len(table.differences), 'difference')}."
            )
    if not sentences and any(variant.baseline for variant in variants):
        sentences.append("No variant is compared with its baseline: that takes two seeds of both, and evaluations.")
    return sentences


def _untrained(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Say what the weights reach that the runs started from, where `fastssl eval --untrained` has measured it.

    Returns that sentence, if any, and those on what is left out.
    """
    values, remarks = collect_measures([replace(run, results=run.untrained) for run in runs])
    reached = []
    for measure, found in values.items():
        if measure.group == "accuracy":
            mean = statistics.fmean(each.value for each in found.values())
            reached.append(f"{measure.title} {measure.info.format(mean)} ({count_of(len(found), 'run')})")
    return [f"Untrained encoders reach: {', '.join(reached)}."] if reached else [], remarks


def _runs_table(variants: Sequence[Variant]) -> ReportTable:
    columns = ["seed", "epochs", "images/s", "data wait", "hours", "precision", "cores", "device", "profile"]
    rows = []
    for variant in variants:
        for run in variant.runs:
            seconds = max((curve.seconds[-1] for curve in run.curves.values()), default=None)
            profile = profile_headline(run.profile)["training speed"] if run.profile else NONE
            bottleneck = f"{profile}; {run.profile.bottleneck.sentence}" if run.profile else NONE
            texts = [
                str(run.seed), str(run.recipe.train.epochs), _median(run, "images_per_second", "{:,.0f}"),
                _median(run, "data_wait", "{:.1%}"), NONE if seconds is None else f"{seconds / 3600:.2f}",
                *(str(run.environment.get(key, NONE)) for key in ("precision", "cores", "device")), bottleneck,
            ]  # fmt: skip
            rows.append((f"{variant.label}: {run.dir}", [Cell(text) for text in texts]))
    caption = "images/s and data wait (the share of the time that training waited for images): medians over the log."
    return ReportTable("Runs", caption, "run", columns, rows)


def _median(run: Run, metric: str, form: str) -> str:
    curve = run.curves.get(metric)
    return NONE if curve is None else form.format(statistics.median(curve.value.tolist()))


def _views(runs: Sequence[Run]) -> Views | None:
    """Return the first sheet of views that can be read."""
    for run in runs:
        path = run.dir / "views.png"
        try:
            with open_regular(path) as file:
                content: bytes = file.read(LARGEST_VIEWS + 1)
        except OSError:
            continue
        if content.startswith(PNG) and len(content) <= LARGEST_VIEWS:
            return Views(content, f"Views of the first images of {run.dir}, those of one image next to each other.")
    return None


def _missing(runs: Sequence[Run]) -> list[str]:
    """Return the commands that measure what some runs lack; of unfinished runs, those that finish them."""
    commands = [f"fastssl train --resume {shlex.quote(str(run.dir))}" for run in runs if not run.is_finished]
    finished = [run for run in runs if run.is_finished]
    for evaluation in EVALUATIONS:
        lacking = [
            run for run in finished
            if not any(kind_of(result["evaluation"]) == evaluation for result in run.results.values())
        ]  # fmt: skip
        if lacking:
            commands.append(
                f"fastssl eval {evaluation} {shlex.join(str(run.dir) for run in lacking)}"
                f"{NEEDED_OPTIONS.get(evaluation, '')}"
            )
    return commands


def _command(run: Run) -> str:
    command = run.environment.get("command")
    if not isinstance(command, list) or not command:
        return "not known"
    return shlex.join(["fastssl", *map(str, command[1:])])


def _environment(runs: Sequence[Run]) -> str:
    """Return what the runs were made with, each kind of machine and software once."""
    keys = ("git", "python", "packages", "machine", "cpu", "cores", "torch_threads", "device", "cuda", "precision")
    kinds: dict[str, list[str]] = {}
    for run in runs:
        kind = json.dumps({key: run.environment.get(key) for key in keys}, indent=1, ensure_ascii=False)
        kinds.setdefault(kind, []).append(str(run.dir))
    return "\n\n".join(f"{', '.join(names)}:\n{kind}" for kind, names in kinds.items())
