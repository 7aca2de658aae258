"""Progress of a sweep, live on a terminal and as plain lines elsewhere, and the table of its results."""

import statistics
import time
from collections import Counter

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import console, print_line
from fastssl.sweep.grid import SweepRun, short_names
from fastssl.sweep.progress import Task, images_per_epoch, is_finished, last_knn, read_progress

FAILURES_SHOWN = 10


class SweepDisplay:
    """Shows the tasks of one sweep. Use as a context manager."""

    def __init__(self, title: str, tasks: list[Task]):
        self.title = title
        self.console = console()
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.total_steps = {
            task.run.name: task.run.recipe.train.epochs
            * images_per_epoch(task.run.recipe)
            // task.run.recipe.train.batch_size
            for task in tasks
        }
        self.start_time = time.monotonic()
        self.start_steps = self._steps_done(tasks)

    def __enter__(self) -> "SweepDisplay":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def print_state(self, task: Task) -> None:
        """Print one line for a task that has just changed its state."""
        if task.state == "running":
            state = f"running on {task.device}"
        elif task.state == "failed":
            state = f"failed: {task.error}"
        elif task.state == "waiting" and task.error:
            state = f"waiting to be tried again: {task.error}"
        else:
            state = task.state
        print_line(self.console, f"{time.strftime('%H:%M:%S')}  {task.run.name}  {state}")

    def show(self, tasks: list[Task]) -> None:
        """Refresh the panel."""
        if self.live:
            parts = Group(self._counts(tasks), self._running(tasks), failures(tasks))
            self.live.update(Panel(parts, title=Text(self.title)))

    def _counts(self, tasks: list[Task]) -> Text:
        counts = Counter(task.state for task in tasks)
        locked = sum(task.locked for task in tasks if task.state == "waiting")
        parts = [
            f"{counts['waiting']} waiting" + (f" ({locked} locked by another process)" if locked else ""),
            f"{counts['running']} running",
            f"{counts['finished']} finished",
            f"{counts['failed']} failed",
            f"ETA {self._eta(tasks)}",
        ]
        return Text("   ".join(parts))

    def _running(self, tasks: list[Task]) -> Table:
        table = Table("run", "on", "step", "loss", "kNN %", "images/s", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for task in tasks:
            if task.state == "running":
                progress = read_progress(task.run)
                table.add_row(
                    task.run.name,
                    task.device,
                    f"{progress.step}/{self.total_steps[task.run.name]}",
                    "" if progress.loss is None else f"{progress.loss:.4g}",
                    "" if progress.knn is None else f"{100 * progress.knn:.1f}",
                    "" if progress.images_per_second is None else f"{progress.images_per_second:,.0f}",
                )
        return table

    def _steps_done(self, tasks: list[Task]) -> int:
        """Steps of all tasks but the failed ones."""
        finished = sum(self.total_steps[task.run.name] for task in tasks if task.state == "finished")
        return finished + sum(read_progress(task.run).step for task in tasks if task.state in ("waiting", "running"))

    def _eta(self, tasks: list[Task]) -> str:
        """Time until all steps but those of failed runs are done, at the average speed so far."""
        done = self._steps_done(tasks)
        if done <= self.start_steps:
            return "?"
        left = sum(self.total_steps[task.run.name] for task in tasks if task.state != "failed") - done
        seconds = int((time.monotonic() - self.start_time) / (done - self.start_steps) * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def failures(tasks: list[Task]) -> Text:
    """The failed runs, each with its error."""
    failed = [task for task in tasks if task.state == "failed"]
    lines = [f"{task.run.name}: {task.error}" for task in failed[:FAILURES_SHOWN]]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"and {len(failed) - FAILURES_SHOWN} more")
    return Text("\n".join(lines), style="red")


def results_table(runs: list[SweepRun]) -> Table:
    """For every setting: number of finished runs, mean and standard deviation of the last kNN accuracy over seeds."""
    table = Table("grid", "setting", "runs finished", "kNN %")
    groups: dict[tuple[str, str], list[SweepRun]] = {}
    for run in runs:
        shorts = dict(zip(run.values, short_names(list(run.values))))
        setting = ", ".join(f"{shorts[key]}={value}" for key, value in run.values.items() if key != "seed")
        groups.setdefault((run.grid, setting), []).append(run)
    for (grid, setting), group in groups.items():
        finished = [run for run in group if is_finished(run)]
        accuracies = [100 * knn for run in finished if (knn := last_knn(run)) is not None]
        table.add_row(grid, Text(setting), f"{len(finished)} of {len(group)}", mean_and_deviation(accuracies))
    return table


def mean_and_deviation(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
