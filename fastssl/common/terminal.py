"""Output for a person: the console, a table of pairs, and the progress of long work."""

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

WIDTH_OF_FILES = 160  # columns of tables that go to a file or a pipe
PLAIN_LINE_EVERY = 10.0  # seconds
SHORT = 2.0  # seconds: a reader of a log does not miss lines about work that took less


class PlainConsole(Console):
    """A console that shows text as it is: paths and class names may hold [brackets], :colons: or control characters."""

    def render_str(self, text: str, **options: Any) -> Text:  # of messages, cells and titles
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def console(stderr: bool = False) -> Console:
    """Return a console that shows text as it is.

    Without a terminal, tables are WIDTH_OF_FILES wide unless the environment variable COLUMNS is set.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else WIDTH_OF_FILES
    result = PlainConsole(stderr=stderr, width=width, markup=False, emoji=False)
    if result.width < 1:  # COLUMNS=0, or a terminal that does not know its size: rich would print nothing
        result.width = WIDTH_OF_FILES
    return result


def print_line(console: Console, message: str, wrap: bool = True) -> None:
    """Print one message, not highlighted. Long work goes on where it cannot be written."""
    try:
        console.print(line_text(console, message, wrap), highlight=False, markup=False, emoji=False, soft_wrap=True)
    except OSError:
        pass  # stdout is a file on a full disk, or a pipe whose reader has ended


def line_text(console: Console, message: str, wrap: bool = True) -> str:
    """Return a message as `print_line` prints it, all printable.

    In a file it is one line. On a terminal it is wrapped between words, never inside a path; without `wrap` the
    terminal breaks it, as a command that is to be copied has to stay one line.
    """
    text = printable(message)
    if wrap and console.is_terminal:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    return text


def print_error(message: str, hint: str | None = None, *, label: str = "error") -> None:
    """Print what is wrong on stderr, and on a line of its own what to do, all printable.

        error: recipes/x.yaml: train.epochs must be an integer, got 'abc'
        hint: write a whole number, such as train.epochs=100

    On a terminal, labels have a color and lines are wrapped between words, never inside a path or a command.
    """
    stderr = console(stderr=True)
    lines = [_labeled(stderr, label, "bold red" if label.startswith("error") else "bold yellow", message)]
    if hint:
        lines.append(_labeled(stderr, "hint", "bold cyan", hint))
    try:
        # One call for both lines, so that several processes do not mix theirs.
        stderr.print(Text("\n").join(lines), soft_wrap=True)
    except OSError:
        pass  # stderr is a file on a full disk, or a pipe whose reader has ended


def _labeled(console: Console, label: str, style: str, message: str) -> Text:
    start = f"{label}: "
    text = start + printable(message)
    if console.is_terminal:
        # A command in backticks, which is to be copied, stays in one piece: no printable text holds a \0.
        text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), text[len(start) :])
        text = textwrap.fill(
            text, console.width, initial_indent=start, subsequent_indent=" " * len(start),
            break_long_words=False, break_on_hyphens=False,
        ).replace("\0", " ")  # fmt: skip
    result = Text(text)
    result.stylize(style, 0, len(label) + 1)
    return result


def printable(text: str) -> str:
    """Replace control characters and broken UTF-8 by escapes, so that a name cannot command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def time_in_words(seconds: float) -> str:
    """Return a time for a sentence: under 1 s, 12 s, 3 min 18 s, 2 h 07 min, 3 d 04 h."""
    whole = int(seconds)
    if whole < 1:
        return "under 1 s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 86_400} d {whole // 3600 % 24:02} h"


def count_of(count: int, noun: str) -> str:
    """Return a number with its noun: 1 run, 1,200 runs, 2 classes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def listed(shown: Sequence[str], count: int) -> str:
    """The first names of `count`, such as "a, b, ..."."""
    return ", ".join(shown) + (", ..." if count > len(shown) else "")


def size_in_words(size: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def pairs_table(title: str, pairs: Mapping[str, object]) -> Table:
    """Return a table of two columns: names and their values."""
    table = Table(title=Text(printable(title)), title_justify="left", box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(printable(str(value))))
    return table


class Advance(Protocol):
    """Reports `count` more items done, and how many bytes they have (0: bytes are not shown)."""

    def __call__(self, count: int = 1, size_B: int = 0) -> None: ...


class _TimeColumn(TimeRemainingColumn):
    """The time left, and of finished work the time that it took."""

    def render(self, task: Task) -> Text:
        if task.finished and task.finished_time is not None:
            return Text(f"in {time_in_words(task.finished_time)}", style="progress.elapsed")
        return super().render(task)


@contextmanager
def progress(title: str, total: int | None, unit: str = "images", done: int = 0) -> Iterator[Advance]:
    """Show on stderr how far long work is, its rate and the time left, and at its end how long it took.

    On a terminal this is a live bar, elsewhere a plain line every ten seconds, from the second one on with the
    time left. Work of less than SHORT seconds leaves nothing on the screen.

    Args:
        title: what is being done.
        total: the number of items; None where it is unknown.
        unit: what an item is, in the plural.
        done: the number of items that an earlier process has done already.

    Example:
        with progress("encoding", len(images)) as advance:
            for image in images:
                advance(size_B=len(encode(image)))
    """
    stderr = console(stderr=True)
    start = last_line = time.monotonic()
    done_before = done
    # When the first line was printed, and the items until then: before that, processes start and first items are slow
    # (of 200 epochs of linear classifiers, the first four took as long as the next twenty).
    first_line: tuple[float, int] | None = None
    size = 0
    title_column = TextColumn("{task.description}", markup=False)
    columns = title_column, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    time_column = _TimeColumn(table_column=Column(no_wrap=True))  # where the line is long, the bar is shorter
    with Progress(*columns, time_column, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(printable(title), total=total, completed=done, rate="")

        def advance(count: int = 1, size_B: int = 0) -> None:
            nonlocal done, size, last_line, first_line
            done += count
            size += size_B
            now = time.monotonic()
            seconds = max(now - start, 1e-9)  # some clocks have steps
            per_second = (done - done_before) / seconds
            rate = f"{rounded(per_second)} {unit}/s" + (f", {rounded(size / 1e6 / seconds)} MB/s" if size else "")
            bar.update(task, completed=done, rate=rate)
            if stderr.is_terminal:
                return
            if total is not None and done >= total:
                if seconds >= SHORT:
                    print_line(stderr, f"{title}: {done:,} {unit} in {time_in_words(seconds)}, {rate}")
            elif now - last_line >= PLAIN_LINE_EVERY:
                last_line = now
                line = f"{title}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}, {rate}"
                if total is not None and first_line and done > first_line[1]:
                    seconds_left = (total - done) * (now - first_line[0]) / (done - first_line[1])
                    line += f", {time_in_words(seconds_left)} left"
                first_line = first_line or (now, done)
                print_line(stderr, line)

        yield advance
        bar.live.transient = time.monotonic() - start < SHORT


@contextmanager
def numbered_steps(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show on stderr which of `total` steps is being done, for steps that take so different times that their number
    says nothing about the time left.

    On a terminal this is a live line, elsewhere a plain line for each.

    Example:
        with numbered_steps("warming up", 2) as begin:
            begin("loader")
            load()
            begin("training step")
            step()
    """
    stderr = console(stderr=True)
    start = time.monotonic()
    begun = 0
    columns = TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        task = bar.add_task(printable(title), total=None)

        def begin(name: str) -> None:
            nonlocal begun
            begun += 1
            line = f"{title}: {name} ({begun} of {total})"
            bar.update(task, description=printable(line))
            if not stderr.is_terminal:
                print_line(stderr, line)

        yield begin
    if (seconds := time.monotonic() - start) >= SHORT:
        print_line(stderr, f"{title}: done in {time_in_words(seconds)}")


def rounded(rate: float) -> str:
    """Return a rate for a sentence: 1,234 or 12.3 or 0.045."""
    if rate < 1:
        return f"{rate:.2g}"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:,.1f}"
