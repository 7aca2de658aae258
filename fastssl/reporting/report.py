"""What a report shows: made from run directories, written by page.py and text.py."""

import json
import os
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fastssl.common.files import expand_user, open_regular
from fastssl.common.terminal import count_of, progress
from fastssl.profiling.tables import headline as profile_headline
from fastssl.reporting.measures import (
    EVALUATIONS,
    Found,
    Measure,
    OfRun,
    Values,
    collect_measures,
    compare_with_untrained,
    kind_of,
)
from fastssl.reporting.runs import Run, find_runs, read_run
from fastssl.reporting.tables import NONE, Cell, ReportTable, heat_maps, interval_of, result_tables, with_sign
from fastssl.reporting.variants import Variant, group_runs, start_of

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
    untrained, left_out_untrained = _untrained(variants, values)
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
        missing=_missing(runs, paths),
        remarks=[*unfinished, *remarks, *left_out, *left_out_untrained, *(line for run in runs for line in run.unread)],
        commands=[(str(run.dir), _command(run)) for run in runs],
        environment=_environment(runs),
    )


def _findings(tables: Sequence[ReportTable], variants: Sequence[Variant]) -> list[str]:
    """Return what the tables say of the differences, or why they say nothing."""
    sentences = [sentence for table in tables for sentence in table.findings]
    if not sentences and any(variant.baseline for variant in variants):
        sentences.append("No variant is compared with its baseline: that takes two seeds of both, and evaluations.")
    return sentences


def _untrained(variants: Sequence[Variant], values: Values) -> tuple[list[str], list[str]]:
    """Say what the weights reach that the runs started from, where `fastssl eval --untrained` has measured it.

    Returns that sentence, if any, with one for each variant that is not better, and those on what is left out.
    """
    runs = [run for variant in variants for run in variant.runs]
    untrained, remarks = collect_measures([replace(run, results=run.untrained) for run in runs])
    # A title may also name the images, where several were tested on.
    trained = {(measure.evaluation, measure.images, measure.metric): found for measure, found in values.items()}
    reached = []
    sentences = []
    for measure, found in untrained.items():
        if measure.group != "accuracy":
            continue
        # Variants start from the same encoders: each counts once, and may be measured in one variant's runs only.
        of_start = {start_of(run.recipe): (run, found[run.dir]) for run in runs if run.dir in found}
        mean = statistics.fmean(each.value for _, each in of_start.values())
        reached.append(f"{measure.title} {measure.info.format(mean)} ({count_of(len(of_start), 'encoder')})")
        of_trained = trained.get((measure.evaluation, measure.images, measure.metric), {})
        sentences += [_not_better(measure, variant, of_trained, of_start) for variant in variants]
    if not reached:
        return [], remarks
    return [f"Untrained encoders reach: {', '.join(reached)}.", *filter(None, sentences)], remarks


def _not_better(
    measure: Measure, variant: Variant, found: dict[Path, Found], untrained: dict[str, OfRun]
) -> str | None:
    """Return a sentence if training has not made a variant better, by more than the noise where that is known."""
    compared = compare_with_untrained(measure, variant, found, untrained)
    if compared is None:
        return None
    mean, difference = compared
    if difference is None:
        shown = with_sign(mean, measure)
        return None if mean > 0 else f"{variant.label} is not better than untrained in {measure.title}: {shown}."
    if difference.low > 0:
        return None
    return (
        f"{variant.label} is not better than untrained in {measure.title} by more than the noise: "
        f"{with_sign(mean, measure)} ({interval_of(difference, measure)})."
    )


def _runs_table(variants: Sequence[Variant]) -> ReportTable:
    columns = ["seed", "epochs", "images/s", "data wait", "hours", "precision", "threads", "device", "profile"]
    rows = []
    for variant in variants:
        for run in variant.runs:
            seconds = max((curve.seconds[-1] for curve in run.curves.values()), default=None)
            profile = profile_headline(run.profile)["training speed"] if run.profile else NONE
            bottleneck = f"{profile}; {run.profile.bottleneck.sentence}" if run.profile else NONE
            texts = [
                str(run.seed), str(run.recipe.train.epochs), _median(run, "images_per_second", "{:,.0f}"),
                _median(run, "data_wait", "{:.1%}"), NONE if seconds is None else f"{seconds / 3600:.2f}",
                *(str(run.environment.get(key, NONE)) for key in ("precision", "torch_threads", "device")), bottleneck,
            ]  # fmt: skip
            rows.append((f"{variant.label}: {run.dir}", [Cell(text) for text in texts]))
    caption = (
        "images/s and data wait (the share of the time that training waited for images): medians over the log. "
        "threads: of torch on the CPU; runs that ran at the same time divided the cores of the machine."
    )
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


def _missing(runs: Sequence[Run], paths: Sequence[Path]) -> list[str]:
    """Return the commands that measure what some runs lack; of unfinished runs, those that finish them.

    paths: those that the report was asked for. The commands name folders in them where these hold nothing else.
    """
    commands = [f"fastssl train --resume {shlex.quote(str(run.dir))}" for run in runs if not run.is_finished]
    finished = [run for run in runs if run.is_finished]
    for evaluation in EVALUATIONS:
        lacking = [
            run for run in finished
            if not any(kind_of(result["evaluation"]) == evaluation for result in run.results.values())
        ]  # fmt: skip
        if lacking:
            commands.append(
                f"fastssl eval {evaluation} {shlex.join(map(str, _in_folders(lacking, finished, paths)))}"
                f"{NEEDED_OPTIONS.get(evaluation, '')}"
            )
    return commands


def _in_folders(chosen: Sequence[Run], runs: Sequence[Run], paths: Sequence[Path]) -> list[Path]:
    """Name the chosen ones of runs by the highest folders, in `paths`, whose runs are all chosen."""
    folders = {Path(os.path.normpath(expand_user(path))) for path in paths}

    def from_top(run: Run) -> list[Path]:
        parents = [each for each in run.dir.parents if not folders.isdisjoint([each, *each.parents])]
        return [*reversed(parents), run.dir]

    all_of = Counter(path for run in runs for path in from_top(run))
    chosen_of = Counter(path for run in chosen for path in from_top(run))
    named = (next(path for path in from_top(run) if chosen_of[path] == all_of[path]) for run in chosen)
    return list(dict.fromkeys(named))


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
