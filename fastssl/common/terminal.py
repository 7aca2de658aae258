"""How far a long job is, on stderr: a live bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY = 10.0  # seconds


@contextmanager
def progress(title: str, total: int | None, unit: str = "images", done: int = 0) -> Iterator[Callable[..., None]]:
    """Gives a function to call with the number done since its last call, and the bytes if they matter.

    Shows the rate and the time left; of a `total` that is not known, how many so far. `done` were
    done before.
    """
    console = Console(stderr=True)
    start = last_line = time.monotonic()
    before, size = done, 0
    title_column = TextColumn("{task.description}", markup=False)  # paths may hold brackets
    columns = title_column, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")

        def advance(count: int = 1, size_B: int = 0) -> None:
            nonlocal done, size, last_line
            done, size = done + count, size + size_B
            now = time.monotonic()
            a_second = (done - before) / (now - start)
            rate = f"{a_second:,.1f} {unit}/s" + (f", {size / 1e6 / (now - start):,.1f} MB/s" if size else "")
            bar.update(task, completed=done, rate=rate)
            is_last = total is not None and done >= total
            if not console.is_terminal and (is_last or now - last_line >= PLAIN_LINE_EVERY):
                last_line = now
                line = f"{title}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}, {rate}"
                line += f", {(total - done) / a_second:,.0f} s left" if total else ""
                console.print(line, soft_wrap=True, highlight=False)

        yield advance
