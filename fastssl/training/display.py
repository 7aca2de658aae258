"""What training shows: a live panel on a terminal, and lines that form a table where the output is a file or a pipe."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

from rich.console import Console, ConsoleRenderable, Group
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import console, line_text, print_line, printable
from fastssl.training.metric_text import GROUPS, KEY_METRICS, LABELS, duration, is_only_in_file, label, shown

LINE = 80  # columns of a log line
LINES_PER_HEADER = 20
EARLY_LINE = 30.0  # s after the first step without a line
REFRESHES = 2  # of the panel per second; one takes 4 ms
WIDEST = 100  # columns of the panel
# The panel leaves these columns of the window free: the terminal shows ^C there, where it does not move the panel.
FREE = 3
GAP = 4  # columns between two columns of metrics
METRIC = 33, 40  # columns of a metric in the panel, at least and at most
LOSSES = 1024  # of the curve, at most
CURVE = "loss curve "
# A contrast of 4.5 to 1 on white and on black; all other text has the terminal's own color.
COLOR = "rgb(0,125,180)"
BLOCKS = "▁▂▃▄▅▆▇█"


class Column(NamedTuple):
    """A figure of the log lines."""

    metric: str  # its name in metrics.jsonl
    heading: str
    width: int = 6


EPOCH = Column("epoch", "epoch", 5)
LOSS = Column("loss", "loss")
# A line has as many of these as fit, those that the run computes, in this order.
IF_THEY_FIT = (
    Column("accuracy", "accuracy", 8), Column("kl_h", "KL h"), Column("kl_z", "KL z"), Column("std_z", "std z"),
    Column("sigma_h", "sigma h", 7), Column("sigma_z", "sigma z", 7),
)  # fmt: skip
SPEED = (Column("lr", "lr"), Column("images_per_second", "images/s", 8), Column("data_wait", "data wait", 9))
TIME_LEFT = Column("", "ETA")


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
        cells = [self._cell(column, metrics) for column in self.columns[:-1]]
        yield self._join(f"{step}/{self.total_steps}", [*cells, time_left])

    def _cell(self, column: Column, metrics: Mapping[str, float]) -> str:
        value = metrics[column.metric]
        return f"{value + 1:.0f}" if column is EPOCH else shown(column.metric, value)  # people count epochs from 1

    def _choose(self, metrics: Mapping[str, float]) -> list[Column]:
        before, after = ([column for column in part if column.metric in metrics] for part in ((EPOCH, LOSS), SPEED))
        after.append(TIME_LEFT)
        free = LINE - self._step_width() - sum(2 + column.width for column in (*before, *after))
        for column in IF_THEY_FIT:
            if column.metric in metrics and 2 + column.width <= free:
                before.append(column)
                free -= 2 + column.width
        return [*before, *after]

    def _join(self, step: str, cells: Sequence[str]) -> str:
        aligned = (cell.rjust(column.width) for cell, column in zip(cells, self.columns))
        return "  ".join([step.rjust(self._step_width()), *aligned])

    def _step_width(self) -> int:
        return max(len("step"), 2 * len(str(self.total_steps)) + 1)


class Display:
    """Shows the progress and the latest metrics of one run. Use as a context manager."""

    def __init__(
        self,
        title: str,
        first_step: int,
        total_steps: int,
        epochs: int = 1,
        is_stopping: Callable[[], bool] = lambda: False,
        log_every: int = 1,
    ):
        self.console = console()
        self.title = printable(title)
        self.current = first_step
        self.total_steps = total_steps
        self.epochs = epochs
        self.log_every = log_every
        self.is_stopping = is_stopping  # whether a signal has asked for the end, which comes after the step
        self.began = time.monotonic()
        self.has_told_speed = False  # in a line, where there is no panel
        # The first step compiles kernels, so the time left is estimated from its end.
        self.first_step: int | None = None
        self.first_step_at = self.began
        self.activity = ""
        self.latest: dict[str, float] = {}
        self.losses: list[float] = []  # every `losses_every`-th one, at most LOSSES
        self.losses_every = 1
        self.losses_seen = 0
        self.table = LogTable(total_steps)
        self.messages: deque[tuple[str, bool]] = deque(maxlen=5)  # the latest, and whether they are wrapped
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
        """Note that a step was taken. The first one is also a line, as the next may come minutes later.

        If it takes longer than EARLY_LINE seconds, another line says how long a step and all steps take.
        """
        self.current = step
        now = time.monotonic()
        next_line = min(-(-step // self.log_every) * self.log_every, self.total_steps)
        is_silent = not self.live.is_started and step < next_line
        if self.first_step is None:
            self.first_step = step
            self.first_step_at = now
            if is_silent:
                self.print(f"Step {step:,} done; the next line comes after step {next_line:,}.")
        elif is_silent and not self.has_told_speed and now - self.first_step_at >= EARLY_LINE:
            seconds = (now - self.first_step_at) / (step - self.first_step)
            self.print(f"Step {step:,} done, {seconds:.2g} s a step, {self._time_left()} left.")
            self.has_told_speed = True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, or those of the probe: in the panel, or as a line."""
        if self.live.is_started:
            # A new dictionary: the thread that draws the panel may be reading the old one.
            self.latest = {**self.latest, **metrics}
            self._remember(metrics.get("loss", math.nan))
        elif "loss" in metrics:
            self.has_told_speed = True
            for line in self.table.lines(step, metrics, self._time_left()):
                self.print(line)
        else:
            found = ", ".join(
                f"{label(name)} {shown(name, value)}" for name, value in metrics.items() if name != "epoch"
            )
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

    def print(self, message: str, wrap: bool = True) -> None:
        print_line(self.console, message, wrap)
        self.messages.append((message, wrap))

    def messages_above(self) -> list[ConsoleRenderable]:
        """The latest messages, as many as the window has room for above the panel."""
        rows = self.console.height - len(self.console.render_lines(self, pad=False))
        fitting: list[ConsoleRenderable] = []
        for message, wrap in reversed(self.messages):
            text = line_text(self.console, message, wrap)
            rows -= sum(math.ceil(len(line) / self.console.width) for line in text.split("\n"))
            if rows < 0:
                break
            fitting.insert(0, Text(text, no_wrap=True, overflow="ignore"))
        return fitting

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
        lines: list[ConsoleRenderable] = [self._bar(), *self._progress(inside)]
        rows = self.console.height - len(lines) - 3  # its borders, and a line above it
        lines += self._metrics(inside, rows)
        title = Text(self.title)
        title.truncate(inside - 2, overflow="ellipsis")  # a longer one would make the panel wider
        return Panel(Group(*lines), title=title, title_align="left", width=width)

    def _bar(self) -> Table:
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", width=5)
        share = self.current / max(1, self.total_steps)
        line = ProgressBar(self.total_steps, self.current, style="grey50", complete_style=COLOR, finished_style=COLOR)
        bar.add_row(line, f"{math.floor(100 * share)} %")
        return bar

    def _progress(self, width: int) -> list[ConsoleRenderable]:
        """Step, epoch and times, in one line or in two."""
        epoch = min(self.epochs, self.current * self.epochs // max(1, self.total_steps) + 1)
        step = f"step {self.current:,} of {self.total_steps:,}"
        step_and_epoch = f"{step}, epoch {epoch} of {self.epochs}"
        times = f"{duration(time.monotonic() - self.began)} elapsed, {self._doing()}"
        if len(step_and_epoch) + 2 + len(times) <= width:
            return [spread(step_and_epoch, times)]
        return [row(step_and_epoch if len(step_and_epoch) <= width else step), row(times)]

    def _doing(self) -> str:
        if self.is_stopping():
            return "stopping"
        if self.activity:
            return self.activity
        left = self._time_left()
        return "starting" if left == "?" else f"{left} left"

    def _metrics(self, width: int, rows: int) -> list[ConsoleRenderable]:
        """The latest metrics in at most so many rows: all in groups, or as many as fit, the most important at least.

        They stand in two columns where the panel is wide enough.
        """
        latest = {name: value for name, value in self.latest.items() if not is_only_in_file(name)}
        if not latest:
            return []
        narrowest, widest = METRIC
        columns = 2 if width >= 2 * narrowest + GAP else 1
        each = min(widest, (width - GAP * (columns - 1)) // columns)

        groups = [[name for name in group if name in latest] for group in GROUPS.values()]
        groups[-1] += [name for name in latest if name not in LABELS]  # of a probe that is not ours
        blocks: list[list[Text]] = []
        for heading, names in zip(GROUPS, groups):
            if names:
                lines = [metric_line(name, latest[name], each) for name in names]
                blocks.append([row(heading, f"bold {COLOR}"), *lines])
        half = math.ceil(len(blocks) / columns)
        grouped = side_by_side([below_each_other(blocks[i : i + half]) for i in range(0, len(blocks), half)], each)

        in_order = [name for names in groups for name in names]
        room = rows - 1 if rows > 5 else max(0, rows)  # a row for the curve, unless there are few
        chosen = sorted(in_order, key=importance)[: columns * room]
        lines = [metric_line(name, latest[name], each) for name in in_order if name in chosen]
        half = max(1, math.ceil(len(lines) / columns))
        small = side_by_side([lines[i : i + half] for i in range(0, len(lines), half)], each)

        curve = row(CURVE + sparkline(self.losses, width - len(CURVE)))
        for choice in ([Text(), *grouped, Text(), curve], [*grouped, curve], grouped, [*small, curve]):
            if len(choice) <= rows:
                return [*choice]
        return [*small]


class PanelLive(Live):
    """Draws the panel of a display again and again, in the same place, also after the window has another size.

    Where a window becomes narrower, the terminal wraps the lines that were drawn before, so the panel is higher than
    the lines that rich erases. Then, or where the window becomes lower than the panel, its first rows may leave the
    window at the top, where nothing erases them, and come back when the window grows. So from then on each change of
    the size erases the whole window.
    """

    def __init__(self, display: Display):
        super().__init__(display, console=display.console, refresh_per_second=REFRESHES)
        self.display = display
        self.drawn_in = self.console.size
        self.drawn_width = 0
        self.rows_left_window = False

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        with self._lock:
            size = self.console.size
            _, height = self._live_render._shape or (0, 0)  # rich below 14.1 has no property for it
            rows = math.ceil(self.drawn_width / max(1, size.width)) * height  # that the panel takes now
            self.rows_left_window |= rows > min(height, size.height)
            erase: list[ConsoleRenderable] = []
            if size != self.drawn_in and self.rows_left_window:
                # Row by row: what a terminal clears as a whole it may keep above the window.
                down = (ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_DOWN, 1)
                erase = [Control(ControlType.HOME, *(down * size.height), ControlType.HOME)]
                erase += self.display.messages_above()
                self._live_render._shape = None  # nothing is left of it
            self.drawn_in = size
            self.drawn_width = panel_width(self.console)
            return [*erase, *super().process_renderables(renderables)]


def metric_line(name: str, value: float, width: int) -> Text:
    """A metric of the panel: its name at the left, its value at the right end."""
    text = shown(name, value)
    heading = row(label(name))
    heading.truncate(max(1, width - len(text) - 1), overflow="ellipsis")
    return row(f"{heading.plain.ljust(width - len(text))}{text}")


def importance(name: str) -> int:
    """The place of a metric where there is room for some only."""
    return KEY_METRICS.index(name) if name in KEY_METRICS else len(KEY_METRICS)


def row(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def below_each_other(blocks: Iterable[list[Text]]) -> list[Text]:
    """Blocks of lines with an empty line between two of them."""
    return [line for number, block in enumerate(blocks) for line in ([Text()] if number else []) + block]


def side_by_side(columns: Sequence[list[Text]], width: int) -> list[Text]:
    """The lines of one or two columns, each of the first `width` wide."""
    if len(columns) < 2:
        return [line for column in columns for line in column]
    rows = []
    for left, right in zip_longest(*columns, fillvalue=Text()):
        rows.append(Text.assemble(left, " " * (width + GAP - len(left)), right, no_wrap=True, overflow="crop"))
    return rows


def panel_width(console: Console) -> int:
    return max(20, min(WIDEST, console.width - FREE))


def spread(left: str, right: str) -> Table:
    """Return one line with a text at its left end and one at its right end."""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(left, right)
    return line


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of finite values in up to `width` characters, each the mean of equally many values."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means, default=0), max(means, default=0)
    differ = high - low > 1e-9 * max(abs(high), abs(low))  # by more than the rounding of the means
    scale = (len(BLOCKS) - 1) / (high - low) if differ else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
