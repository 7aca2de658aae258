"""A report as Markdown, or its values as CSV."""

import csv
import io
from collections.abc import Sequence

from fastssl.reporting.report import Report
from fastssl.reporting.tables import DIFFERENCE_COLUMNS, Cell, ReportTable

CSV_COLUMNS = (
    "variant", "seed", "run", "evaluation", "metric", "measure", "value", "low", "high", "test_images",
)  # fmt: skip


def as_markdown(report: Report) -> str:
    """Return the findings, the tables and the commands as Markdown."""
    lines = [f"# {_escaped(report.title)}", "", *(f"- {_escaped(each)}" for each in report.findings), ""]
    for table in [*report.tables, *report.heat_maps, report.runs]:
        lines += [f"## {_escaped(table.title)}", "", _escaped(table.caption), ""]
        lines += cells_as_markdown(table)
        if table.differences:
            lines += ["Differences to the baselines:", ""]
            lines += markdown_table(DIFFERENCE_COLUMNS, [[_escaped(text) for text in row] for row in table.differences])
    if report.missing:
        lines += ["## Not measured yet", "", *map(_code, report.missing), ""]
    if report.remarks:
        lines += ["## Left out, or not readable", "", *(f"- {_escaped(text)}" for text in report.remarks), ""]
    lines += ["## Commands", "", *(_code(f"{command}    # {name}") for name, command in report.commands)]
    return "\n".join(lines) + "\n"


def cells_as_markdown(table: ReportTable) -> list[str]:
    """Return the lines of a table without its title, and an empty one."""
    return markdown_table(
        [table.corner, *table.columns], [[_escaped(name), *map(_marked, cells)] for name, cells in table.rows]
    )


def _marked(cell: Cell) -> str:
    mark = {"better": " ▲", "worse": " ▼", "": ""}[cell.mark]
    return f"**{_escaped(cell.text)}**{mark}" if cell.mark else _escaped(cell.text)


def _code(text: str) -> str:
    """Return a line of an indented block, which no line break in the text ends."""
    return "    " + " ".join(text.splitlines())


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one. The cells of rows must have been escaped."""
    lines = [[_escaped(head) for head in heads], ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _escaped(text: str) -> str:
    """Escape what would end a cell, or be read as HTML or emphasis."""
    text = " ".join(text.split())
    for character in "\\|<*_`":
        text = text.replace(character, f"\\{character}")
    return text


def as_csv(report: Report) -> str:
    """Return a line for each value of each run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    variant_of = {run.dir: (variant.label, run.seed) for variant in report.variants for run in variant.runs}
    for measure, found in report.values.items():
        for run_dir, each in found.items():
            low, high = each.result.get("intervals", {}).get(measure.metric, ["", ""])
            label, seed = variant_of[run_dir]
            images = each.result["val"]["images"]
            writer.writerow(
                [label, seed, run_dir, measure.evaluation, measure.metric, measure.title, each.value, low, high, images]
            )
    return out.getvalue()
