"""What a person sees of a sweep: a live panel on a terminal, elsewhere a line for each change; results at the end."""

import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastssl.sweep.grid import Run, short_names
from fastssl.sweep.progress import images_per_epoch, is_finished, last_knn, read_progress

if TYPE_CHECKING:
    from fastssl.sweep.local import Task

FAILURES_SHOWN = 10


class SweepDisplay:
    """Shows the tasks of one sweep. Use as a context manager."""

    def __init__(self, title: str, tasks: "list[Task]"):
        self.title = title
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.steps = {task.run.name: steps_of(task.run) for task in tasks}  # of the whole run
        self.began, self.first_steps = time.monotonic(), self._steps_done(tasks)

    def __enter__(self) -> "SweepDisplay":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def say(self, message: str) -> None:
        try:
            self.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)
        except OSError:
            pass  # as in training's Display

    def say_state(self, task: "Task") -> None:
        """One line for a task that has just changed its state."""
        if task.state == "waiting":
            say = f"waits to be tried again: {task.note}" if task.note else "waits again"
        else:
            say = {"running": f"runs on {task.device}", "failed": f"failed: {task.note}"}.get(task.state, task.state)
        self.say(f"{time.strftime('%H:%M:%S')}  {task.run.name}  {say}")

    def show(self, tasks: "list[Task]") -> None:
        """Refresh the panel."""
        if self.live:
            parts = Group(self._counts(tasks), self._running(tasks), failures(tasks))
            self.live.update(Panel(parts, title=Text(self.title)))

    def _counts(self, tasks: "list[Task]") -> Text:
        counts = Counter(task.state for task in tasks)
        parts = [f"{counts[state]} {state}" for state in ("waiting", "running", "finished", "failed")]
        elsewhere = sum(task.elsewhere for task in tasks if task.state == "waiting")
        if elsewhere:
            parts[0] += f" ({elsewhere} in the hands of another process)"
        return Text("   ".join([*parts, f"ETA {self._eta(tasks)}"]))

    def _running(self, tasks: "list[Task]") -> Table:
        table = Table("run", "on", "step", "loss", "kNN %", "images/s", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for task in tasks:
            if task.state == "running":
                progress = read_progress(task.run)
                table.add_row(
                    task.run.name, task.device, f"{progress.step}/{self.steps[task.run.name]}",
                    shown(progress.loss, ".4g"), shown(progress.knn and 100 * progress.knn, ".1f"),
                    shown(progress.images_per_second, ",.0f"),
                )  # fmt: skip
        return table

    def _steps_done(self, tasks: "list[Task]") -> int:
        finished = sum(self.steps[task.run.name] for task in tasks if task.state == "finished")
        return finished + sum(read_progress(task.run).step for task in tasks if task.state in ("waiting", "running"))

    def _eta(self, tasks: "list[Task]") -> str:
        """Time until all steps are done, those of failed runs left out, at the pace so far."""
        done = self._steps_done(tasks)
        if done <= self.first_steps:
            return "?"
        left = sum(self.steps[task.run.name] for task in tasks if task.state != "failed") - done
        seconds = int((time.monotonic() - self.began) / (done - self.first_steps) * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def steps_of(run: Run) -> int:
    return run.recipe.train.epochs * images_per_epoch(run.recipe) // run.recipe.train.batch_size


def shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def failures(tasks: "list[Task]") -> Text:
    """The failed runs, each with its last words."""
    failed = [task for task in tasks if task.state == "failed"]
    lines = [f"{task.run.name}: {task.note}" for task in failed[:FAILURES_SHOWN]]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"and {len(failed) - FAILURES_SHOWN} more")
    return Text("\n".join(lines), style="red")


def results_table(runs: list[Run]) -> Table:
    """For every setting, over its seeds: how many runs are finished, mean and standard deviation of the last kNN."""
    table = Table("grid", "setting", "runs finished", "kNN %")
    settings: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        settings.setdefault((run.grid, setting_of(run)), []).append(run)
    for (grid, setting), same in settings.items():
        finished = [run for run in same if is_finished(run)]
        accuracies = [100 * knn for knn in map(last_knn, finished) if knn is not None]
        table.add_row(grid, Text(setting), f"{len(finished)} of {len(same)}", mean_and_deviation(accuracies))
    return table


def setting_of(run: Run) -> str:
    """The run's values on all axes but the seed."""
    shorts = dict(zip(run.values, short_names(list(run.values))))
    return ", ".join(f"{shorts[key]}={value}" for key, value in run.values.items() if key != "seed")


def mean_and_deviation(values: list[float]) -> str:
    if len(values) < 2:
        return shown(values[0], ".1f") if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
