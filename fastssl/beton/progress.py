"""How far a build is: a live bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY = 10.0  # seconds


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[], None]]:
    """Gives a function to call once an image; shows images/s and the time left on stderr."""
    console = Console(stderr=True)
    start = time.monotonic()

    if not console.is_terminal:
        done, last_line = 0, start

        def advance_plain() -> None:
            nonlocal done, last_line
            done += 1
            now = time.monotonic()
            if now - last_line >= PLAIN_LINE_EVERY:
                last_line = now
                rate = done / (now - start)
                left = (total - done) / rate
                print(
                    f"{title}: {done:,} of {total:,} images, {rate:,.0f} images/s, "
                    f"{left:,.0f} s left",
                    file=sys.stderr,
                )

        yield advance_plain
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, rate="-")

        def advance() -> None:
            rate = (bar.tasks[0].completed + 1) / (time.monotonic() - start)
            bar.update(task, advance=1, rate=f"{rate:,.0f}")

        yield advance
