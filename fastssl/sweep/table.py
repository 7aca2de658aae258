"""Progress of a sweep, as live bars on a terminal and as lines elsewhere, and the table of its results."""

import statistics
import time
from collections import Counter

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastssl.common.terminal import Advance, console, count_of, listed, print_line, printable, time_in_words
from fastssl.sweep.grid import SweepRun, short_names
from fastssl.sweep.progress import Task, images_per_epoch, is_finished, last_knn, log_path, read_progress

PLAIN_LINE_EVERY = 120.0  # s
RUNS_NAMED = 4  # in such a line


class SweepDisplay:
    """Shows the tasks of one sweep. Use as a context manager.

    Every change of a task's state is printed as a line. A terminal also shows a bar for the steps of the whole sweep,
    with the time left, and one for each running run; elsewhere, a line says the same every PLAIN_LINE_EVERY seconds.
    """

    def __init__(self, title: str, tasks: list[Task]):
        self.console = console()
        self.tasks = tasks
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=600,  # seconds; the speed changes when runs start and end
        )
        self.sweep_bar = self.bars.add_task(printable(title), status="")
        self.run_bars: dict[str, TaskID] = {}
        self.last_line = time.monotonic()
        self.first_line: tuple[float, int] | None = None  # its time, and the steps of the sweep that were done then
        self.total_steps: dict[str, int] = {}
        for task in tasks:
            train = task.run.recipe.train
            self.total_steps[task.run.name] = train.epochs * images_per_epoch(task.run.recipe) // train.batch_size

    def __enter__(self) -> "SweepDisplay":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def print_state(self, task: Task) -> None:
        """Print one line for a task that has just changed its state."""
        if task.state == "running":
            state = f"running on {task.device}, output in {log_path(task.run)}"
        elif task.state == "finished":
            finished = sum(each.state == "finished" for each in self.tasks)
            state = f"finished: {finished} of {count_of(len(self.tasks), 'run')}"
        elif task.state == "failed":
            state = f"failed: {task.error}"
        elif task.state == "waiting" and task.error:
            state = f"waiting to be tried again: {task.error}"
        else:
            state = task.state
        print_line(self.console, f"{time.strftime('%H:%M:%S')}  {task.run.name}  {state}")

    def show(self, tasks: list[Task]) -> None:
        """Update the bars, or print a line if it is due."""
        if not self.console.is_terminal and time.monotonic() - self.last_line < PLAIN_LINE_EVERY:
            return
        # Steps of failed runs will not be made.
        total = sum(self.total_steps[task.run.name] for task in tasks if task.state != "failed")
        steps_done = sum(self._steps_done(task) for task in tasks if task.state != "failed")
        if not self.console.is_terminal:
            self._print_steps(tasks, steps_done, total)
            return
        for task in tasks:
            if task.state == "running":
                self._show_run(task)
            elif task.run.name in self.run_bars:
                self.bars.remove_task(self.run_bars.pop(task.run.name))
        counts = Counter("locked by another process" if task.locked else task.state for task in tasks)
        status = "steps, runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        self.bars.update(self.sweep_bar, total=total, completed=steps_done, status=status)

    def _steps_done(self, task: Task) -> int:
        return self.total_steps[task.run.name] if task.state == "finished" else read_progress(task.run).step

    def _print_steps(self, tasks: list[Task], done: int, total: int) -> None:
        """Print the steps of the running runs, and from the second line on the time left of the sweep."""
        self.last_line = time.monotonic()
        runs = [f"{task.run.name} {self._steps_done(task):,}" for task in tasks if task.state == "running"]
        left = ""
        self.first_line = self.first_line or (self.last_line, done)
        since, before = self.first_line
        if done > before:
            seconds = (self.last_line - since) / (done - before) * (total - done)
            left = f", about {time_in_words(seconds)} left"
        steps_of_runs = listed(runs[:RUNS_NAMED], len(runs))
        print_line(self.console, f"{time.strftime('%H:%M:%S')}  {done:,} of {total:,} steps ({steps_of_runs}){left}")

    def _show_run(self, task: Task) -> None:
        name = task.run.name
        if name not in self.run_bars:
            self.run_bars[name] = self.bars.add_task(printable(name), total=self.total_steps[name], status="")
        progress = read_progress(task.run)
        status = f"on {task.device}"
        if progress.loss is not None:
            status += f", loss {progress.loss:.4g}"
        if progress.knn is not None:
            status += f", kNN {100 * progress.knn:.1f} %"
        if progress.images_per_second is not None:
            status += f", {progress.images_per_second:,.0f} images/s"
        self.bars.update(self.run_bars[name], completed=progress.step, status=status)


class TimedLongEnough(Exception):
    """Ends the timing of runs before they have taken all of their steps."""


class TimingDisplay(SweepDisplay):
    """Shows on how many images runs that are timed together have trained, also without a terminal.

    Args:
        seconds: after which `show` raises TimedLongEnough,
        steps: if every run has logged this one.
    """

    advance: Advance  # of `progress`, whose total is the sum of `images_in`

    def __init__(self, tasks: list[Task], seconds: float, steps: int):
        super().__init__("timing", tasks)
        self.done = 0
        self.ends = time.monotonic() + seconds
        self.steps = steps

    def images_in(self, task: Task) -> int:
        """Number of images in all steps of a run."""
        return self.total_steps[task.run.name] * task.run.recipe.train.batch_size

    def print_state(self, task: Task) -> None:
        """Print a line for a run that has failed: the others are in a temporary folder."""
        if task.state == "failed":
            super().print_state(task)

    def show(self, tasks: list[Task]) -> None:
        """Report the images of the steps that were logged since the last call."""
        steps = [read_progress(task.run).step for task in tasks]
        done = sum(step * task.run.recipe.train.batch_size for step, task in zip(steps, tasks))
        if done > self.done:
            self.advance(done - self.done)
            self.done = done
        if time.monotonic() > self.ends and min(steps) >= self.steps:
            raise TimedLongEnough


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
        table.add_row(grid, setting, f"{len(finished)} of {len(group)}", mean_and_deviation(accuracies))
    return table


def mean_and_deviation(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
