"""What training shows on the terminal: a live panel, or plain lines where the output is a file or a pipe."""

import time
from collections.abc import Mapping

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import console, print_line, printable


class Display:
    """Shows the progress and the latest metrics of one run. Use as a context manager."""

    def __init__(self, title: str, first_step: int, total_steps: int):
        self.console = console()
        self.title = printable(title)
        self.first_step = first_step
        self.current = first_step
        self.total_steps = total_steps
        self.began = time.monotonic()
        self.latest: dict[str, float] = {}
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total_steps, completed=first_step, eta="?")
        self.live = Live(self._panel(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def step(self, step: int) -> None:
        """Move the progress bar."""
        self.current = step
        if self.live.is_started:
            self.bar.update(self.task, completed=step, eta=self._eta())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step: in the panel, or as one line."""
        if self.live.is_started:
            self.latest |= metrics
            self.live.update(self._panel())
        else:
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            self.print(f"step {step}/{self.total_steps}  {values}  eta {self._eta()}")

    def print(self, message: str) -> None:
        print_line(self.console, message)

    def _eta(self) -> str:
        """Return the time left as H:MM:SS, "?" before the first step."""
        done = self.current - self.first_step
        if done <= 0:
            return "?"
        seconds = int((time.monotonic() - self.began) / done * (self.total_steps - self.current))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for name, value in self.latest.items():
            table.add_row(name.replace("_", " "), _short(value))
        return Panel(Group(table, self.bar), title=Text(self.title))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
