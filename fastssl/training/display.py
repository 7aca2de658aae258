"""What a person sees during training: a live panel on a terminal, plain lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class Display:
    """Shows the log steps of one run. Use as a context manager."""

    def __init__(self, title: str, first_step: int, total_steps: int):
        self.console = Console()
        self.live = None
        self.title, self.total_steps = title, total_steps
        self.first_step, self.began = first_step, time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=total_steps, completed=first_step, eta="?")
            self.latest: dict = {}
            self.live = Live(self._panel(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def step(self, step: int) -> None:
        """Move the bar; a log step brings the figures."""
        if self.live:
            self.bar.update(self.task, completed=step, eta=self._eta(step))

    def log(self, metrics: dict) -> None:
        if self.live:
            self.latest |= metrics
            self.live.update(self._panel())
        else:
            figures = "  ".join(f"{key} {_short(value)}" for key, value in metrics.items() if key != "step")
            step = metrics["step"]
            self.say(f"step {step}/{self.total_steps}  {figures}  eta {self._eta(step)}")

    def say(self, message: str) -> None:
        try:
            self.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)
        except OSError:
            pass  # the output is a file on a disk that is full, or its reader is gone: no reason to stop

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "?"
        seconds = int((time.monotonic() - self.began) / done * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for key, value in self.latest.items():
            if key != "step":
                table.add_row(key.replace("_", " "), _short(value))
        return Panel(Group(table, self.bar), title=Text(self.title))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
