"""What training shows: a live panel on a terminal, and lines that form a table where the output is a file or a pipe."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console, ConsoleRenderable, Group
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import console, print_line, printable

LINE = 80  # columns of a log line
LINES_PER_HEADER = 20
REFRESHES = 2  # of the panel per second; one takes 4 ms
WIDEST = 100  # columns of the panel
# The panel leaves these columns of the window free: the terminal shows ^C there, where it does not move the panel.
FREE = 3
GROUP = 26  # columns of a group of metrics in the panel, at least
LOSSES = 1024  # of the curve, at most
BAR_COLOR = "rgb(0,135,175)"  # readable on light and on dark backgrounds, as is the grey of the rest
BLOCKS = "▁▂▃▄▅▆▇█"


class Column(NamedTuple):
    """A figure of the log lines."""

    metric: str  # its name in metrics.jsonl
    heading: str
    width: int = 6


# In this order; a line has those that the run computes.
COLUMNS = (
    Column("loss", "loss"), Column("accuracy", "accuracy", 8), Column("kl_h", "kl_h"), Column("kl_z", "kl_z"),
    Column("sigma_h", "sigma_h", 7), Column("sigma_z", "sigma_z", 7), Column("std_z", "std_z"), Column("lr", "lr"),
    Column("images_per_second", "images/s", 8), Column("data_wait", "wait", 4),
)  # fmt: skip
LEFT_OUT_FIRST = ("kl_h", "kl_z", "lr", "std_z")  # where a line would be longer than LINE
TIME_LEFT = Column("", "left")

# What the panel shows next to the terms of the loss, in two further groups.
EMBEDDING = ("accuracy", "kl_h", "kl_z", "sigma_h", "sigma_z", "std_z", "rankme_h", "rankme_z", "knn")
SPEED = ("images_per_second", "data_wait", "lr", "grad_norm", "skipped_steps", "bad_samples")
ONLY_IN_FILE = ("epoch", "seconds", "graphs", "graph_breaks", "recompiled")  # and those of EMBEDDING's further figures
ONLY_IN_FILE_PREFIXES = ("kl_per_dim_", "sigma_min_", "sigma_max_", "sigma_clamped_")


class LogTable:
    """The lines of a log: a table without borders, with its header again every LINES_PER_HEADER lines."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.columns: list[Column] = []  # chosen at the first line
        self.count = 0

    def lines(self, step: int, metrics: Mapping[str, float], time_left: str) -> Iterator[str]:
        """Yield the line of a step, after the header if it is due."""
        if not self.columns:
            self.columns = self._choose(metrics)
        if self.count % LINES_PER_HEADER == 0:
            yield self._join("step", [column.heading for column in self.columns])
        self.count += 1
        cells = [shown(column.metric, metrics[column.metric]) for column in self.columns[:-1]]
        yield self._join(f"{step}/{self.total_steps}", [*cells, time_left])

    def _choose(self, metrics: Mapping[str, float]) -> list[Column]:
        columns = [*(column for column in COLUMNS if column.metric in metrics), TIME_LEFT]
        for name in LEFT_OUT_FIRST:
            if self._step_width() + sum(2 + column.width for column in columns) <= LINE:
                break
            columns = [column for column in columns if column.metric != name]
        return columns

    def _join(self, step: str, cells: Sequence[str]) -> str:
        aligned = (cell.rjust(column.width) for cell, column in zip(cells, self.columns))
        return "  ".join([step.rjust(self._step_width()), *aligned])

    def _step_width(self) -> int:
        return max(len("step"), 2 * len(str(self.total_steps)) + 1)


class Display:
    """Shows the progress and the latest metrics of one run. Use as a context manager."""

    def __init__(self, title: str, first_step: int, total_steps: int, epochs: int = 1):
        self.console = console()
        self.title = printable(title)
        self.current = first_step
        self.total_steps = total_steps
        self.epochs = epochs
        self.began = time.monotonic()
        # The first step compiles kernels, so the time left is estimated from its end.
        self.first_step: int | None = None
        self.first_step_at = self.began
        self.activity = ""
        self.latest: dict[str, float] = {}
        self.losses: list[float] = []  # every `losses_every`-th one, at most LOSSES
        self.losses_every = 1
        self.losses_seen = 0
        self.table = LogTable(total_steps)
        self.live = PanelLive(self)

    def __enter__(self) -> "Display":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Draw the panel for the last time: what is printed from now on is below it."""
        self.live.stop()

    def step(self, step: int) -> None:
        """Note that a step was taken."""
        self.current = step
        if self.first_step is None:
            self.first_step = step
            self.first_step_at = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, or those of the probe: in the panel, or as a line."""
        if self.live.is_started:
            # A new dictionary: the thread that draws the panel may be reading the old one.
            self.latest = {**self.latest, **metrics}
            self._remember(metrics.get("loss", math.nan))
        elif "loss" in metrics:
            for line in self.table.lines(step, metrics, self._time_left()):
                self.print(line)
        else:
            found = ", ".join(f"{name} {shown(name, value)}" for name, value in metrics.items() if name != "epoch")
            self.print(f"Probe after epoch {metrics['epoch'] + 1:.0f}: {found}")

    def _remember(self, loss: float) -> None:
        """Note a loss for the curve."""
        if not math.isfinite(loss):
            return
        self.losses_seen += 1
        if self.losses_seen % self.losses_every == 0:
            self.losses.append(loss)
        if len(self.losses) == LOSSES:
            self.losses = self.losses[1::2]
            self.losses_every *= 2

    def print(self, message: str) -> None:
        print_line(self.console, message)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Show in the panel what is done between two steps."""
        self.activity = activity
        try:
            yield
        finally:
            self.activity = ""

    def _time_left(self) -> str:
        """Return the time to the last step, "?" before the second step of this process."""
        done = self.current - (self.first_step or self.current)
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self.first_step_at) / done * (self.total_steps - self.current))

    def __rich__(self) -> ConsoleRenderable:
        """The panel, drawn REFRESHES times per second by the thread of `live`."""
        width = panel_width(self.console)
        inside = width - 4
        epoch = min(self.epochs, self.current * self.epochs // max(1, self.total_steps) + 1)
        steps = f"step {self.current:,} of {self.total_steps:,}"
        epochs = f"epoch {epoch} of {self.epochs}"
        elapsed = duration(time.monotonic() - self.began)
        times = f"{elapsed} elapsed, {self.activity or self._time_left() + ' left'}"
        parts: list[ConsoleRenderable] = []
        if len(steps) + len(epochs) + len(times) + 4 <= inside:
            parts.append(spread(f"{steps}  {epochs}", times))
        else:
            parts += [spread(steps, ""), spread(times, "")]
        parts.append(self._bar())
        metrics = self._metrics(inside)
        if self.latest and len(parts) + metrics.row_count + 4 <= self.console.height:  # with borders and a line above
            parts += [Text(f"loss {sparkline(self.losses, inside - 5)}", no_wrap=True), metrics]
        title = Text(self.title)
        title.truncate(inside - 2, overflow="ellipsis")  # a longer one would make the panel wider
        return Panel(Group(*parts), title=title, title_align="left", width=width)

    def _bar(self) -> Table:
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", width=4)
        share = self.current / max(1, self.total_steps)
        line = ProgressBar(
            self.total_steps, self.current, style="grey50", complete_style=BAR_COLOR, finished_style=BAR_COLOR
        )
        bar.add_row(line, f"{math.floor(100 * share)}%")
        return bar

    def _metrics(self, width: int) -> Table:
        latest = {name: value for name, value in self.latest.items() if not is_only_in_file(name)}
        terms = [name for name in latest if name not in (*EMBEDDING, *SPEED)]
        groups = [terms, [name for name in EMBEDDING if name in latest], [name for name in SPEED if name in latest]]
        if width < 3 * GROUP - 6:
            groups = [[column.metric for column in COLUMNS if column.metric in latest]]
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in groups:
            table.add_column(no_wrap=True)
            table.add_column(no_wrap=True, justify="right", style="bold", min_width=8)
            table.add_column(ratio=1)
        for row in range(max(map(len, groups))):
            cells: list[str] = []
            for names in groups:
                name = names[row] if row < len(names) else ""
                cells += [label(name), shown(name, latest[name]) if name else "", ""]
            table.add_row(*cells)
        return table


class PanelLive(Live):
    """Draws the panel of a display again and again, in the same place.

    Where a window becomes narrower, the terminal wraps the lines that were drawn before, so the panel is higher than
    the lines that rich erases.
    """

    def __init__(self, display: Display):
        super().__init__(display, console=display.console, refresh_per_second=REFRESHES)
        self.drawn_width = 0

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        rows = math.ceil(self.drawn_width / max(1, self.console.width))  # of the window, for each line of the panel
        _, height = self._live_render._shape or (0, 0)  # rich below 14.1 has no property for it
        wrapped = max(0, rows - 1) * height
        up = (ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)
        self.drawn_width = panel_width(self.console)
        return [Control(ControlType.CARRIAGE_RETURN, *(up * wrapped)), *super().process_renderables(renderables)]


def panel_width(console: Console) -> int:
    return max(20, min(WIDEST, console.width - FREE))


def spread(left: str, right: str) -> Table:
    """Return one line with a text at its left end and one at its right end."""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(left, right)
    return line


def is_only_in_file(name: str) -> bool:
    return name in ONLY_IN_FILE or name.startswith(ONLY_IN_FILE_PREFIXES)


def label(name: str) -> str:
    """Return the name of a metric as the panel shows it."""
    named = {"images_per_second": "images/s", "data_wait": "data wait", "skipped_steps": "skipped steps"}
    return named.get(name, name)


def shown(name: str, value: float) -> str:
    """Return the value of a metric in at most eight characters."""
    if name in ("data_wait", "accuracy", "knn") and math.isfinite(value):
        return f"{value:.0%}" if name == "data_wait" else f"{value:.2%}"
    if name == "images_per_second" and 100 <= value < 999_999.5:
        return f"{value:,.0f}"
    return str(value) if isinstance(value, int) else number(value)


def number(value: float) -> str:
    """Return up to four digits of a number in at most six characters (7 below 1e-99): 66.21, 0.0412, 12345, 3.2e-4."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if 1e-3 <= size < 99_999.5:
        decimals = min(max(3 - math.floor(math.log10(size)), 0), 3 if value < 0 else 4)
        text = f"{value:.{decimals}f}"
        return text if len(text) <= 6 else f"{value:.{decimals - 1}f}"  # -9.9996 is rounded to -10.000
    for digits in (1, 0):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if len(text) <= 6:
            break
    return text


def duration(seconds: float) -> str:
    """Return a time in at most six characters, up to 999 days: 1:05, 2h07m, 3d04h."""
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02}"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86_400}d{seconds // 3600 % 24:02}h"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of finite values in up to `width` characters, each the mean of equally many values."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means, default=0), max(means, default=0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
