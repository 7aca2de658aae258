"""`fastssl report`: compare runs, and write what is found as one file."""

from collections.abc import Sequence
from pathlib import Path

from fastssl.beton.source import as_utf8
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user, explain_write_errors, write_atomically
from fastssl.reporting.page import report_page
from fastssl.reporting.report import Report, make_report
from fastssl.reporting.text import as_csv, as_markdown

FORMATS = {".html": report_page, ".md": as_markdown, ".csv": as_csv}


def write_report(paths: Sequence[Path], out: Path, baseline: Path | None = None) -> Report:
    """Read the runs in `paths`, compare them, and write a report to `out`. Returns what it shows.

    Args:
        paths: run directories, and folders that hold some, such as those of sweeps.
        out: a .html, .md or .csv file. The CSV has a line for each value of each run.
        baseline: one of the run directories, with whose variant all others are compared; None: each stochastic variant
            is compared with the deterministic one of the same objective.

    Raises:
        UserError: there is no run, a recipe is damaged, `baseline` is none of the runs, or `out` cannot be written or
            has another suffix.
    """
    out = expand_user(out)
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in {', '.join(FORMATS)}", hint="write it like --out report.html")
    report = make_report(paths, baseline)
    with explain_write_errors(out):
        write_atomically(out, as_utf8(FORMATS[out.suffix](report)))
    return report
