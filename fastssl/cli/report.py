"""`fastssl report`: compare runs in one file."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Runs = Annotated[list[Path], Argument(metavar="RUN", help="Run directories, or folders that hold some, as of a sweep.")]
Out = Annotated[
    Path, Option(metavar="FILE", help="File to write: .html, .md for Markdown or .csv for the values of every run.")
]

LONGEST_COMMAND = 300  # characters on the terminal; a command may name many runs


Baseline = Annotated[
    Path | None,
    Option(
        metavar="RUN", help="Compare all variants with that of this run.",
        show_default="each with the deterministic one of its objective",
    ),
]  # fmt: skip


def report(runs: Runs, out: Out = Path("report.html"), baseline: Baseline = None) -> None:
    """Compare trained runs: their evaluations, with differences and their noise over seeds, their curves and commands.

    Runs that differ in their seed alone are one row. Nothing is measured: what a run lacks is listed with the command
    that measures it.

    Examples:
      fastssl report runs/mine --out report.html
      fastssl report runs/zprob runs/barlow --out table.md
      fastssl report runs/mine --baseline runs/mine/zprob_barlow/seed=0
    """
    from fastssl.common.terminal import console, print_line, printable
    from fastssl.reporting import write_report

    written = write_report(runs, out, baseline)
    for sentence in written.findings:
        print(printable(sentence))
    for line in written.remarks:
        print_line(console(stderr=True), f"Note: {line}.")
    print(printable(f"{out} compares {written.title}."))
    if written.missing:
        is_short = all(len(command) <= LONGEST_COMMAND for command in written.missing)
        print("Not measured yet:" if is_short else "Not measured yet; the report has the whole commands:")
    for command in written.missing:
        short = command if len(command) <= LONGEST_COMMAND else f"{command[:LONGEST_COMMAND]} ..."
        print(printable(f"  {short}"))
