"""What an evaluation shows and keeps: progress, RUN/eval/<name>.json, the table of its figures."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_LINE_EVERY = 10.0  # seconds


def write_result(run_dir: str | Path, result: dict) -> Path:
    """RUN/eval/<evaluation>.json, written beside and renamed."""
    path = Path(run_dir) / "eval" / f"{result['evaluation']}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, path)
    return path


def result_table(result: dict) -> Table:
    """The figures, shares from 0 to 1, in percent."""
    val = result["val"]
    caption = f"{val['images']:,} images of {val['path']} ({result['layout']} file)"
    title = f"{result['evaluation']}: {result['run']}"
    table = Table(title=title, caption=caption, min_width=max(len(title), len(caption)))
    table.add_column("figure")
    table.add_column("%", justify="right")
    for name, share in result["figures"].items():
        table.add_row(name, f"{100 * share:.2f}")
    return table


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many more are done. Shows on stderr: on a terminal a bar
    with rate and time left, elsewhere a line every ten seconds and one at the end."""
    console = Console(stderr=True)
    start = last_line = time.monotonic()
    done = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            now = time.monotonic()
            rate = f"{done / (now - start):,.1f} {unit}/s"
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and (done >= total or now - last_line >= PLAIN_LINE_EVERY):
                last_line = now
                console.print(
                    f"{title}: {done:,} of {total:,} {unit}, {rate}",
                    soft_wrap=True,
                    highlight=False,
                )

        yield advance
