"""How far a long job is, on stderr: a live bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY = 10.0  # seconds


@contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number done since its last call; shows the rate and the time left."""
    console = Console(stderr=True)
    start = last_line = time.monotonic()
    done = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int = 1) -> None:
            nonlocal done, last_line
            done += count
            now = time.monotonic()
            rate = f"{done / (now - start):,.1f} {unit}/s"
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and (done >= total or now - last_line >= PLAIN_LINE_EVERY):
                last_line = now
                left = (total - done) * (now - start) / done
                line = f"{title}: {done:,} of {total:,} {unit}, {rate}, {left:,.0f} s left"
                console.print(line, soft_wrap=True, highlight=False)

        yield advance
