"""What a sweep will do, and about how long it will take: `fastssl sweep --dry-run`."""

import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastssl.common.errors import UserError
from fastssl.recipe import Recipe
from fastssl.sweep.grid import Run, Sweep, short_names
from fastssl.sweep.local import Task, run_here, tasks_of, visible_devices
from fastssl.sweep.progress import images_per_epoch, read_progress
from fastssl.sweep.table import SweepDisplay, results_table

TIMED_STEPS = 30


@dataclass
class BuildEstimate:
    """One grid's share."""

    tasks: list[Task]
    images: int | None = None  # still to train on; None: data.train is not there
    rate: float | None = None  # images/s of one run
    source: str = ""  # where the rate comes from

    @property
    def hours_of_runs(self) -> float | None:
        """Of one run after the other."""
        return None if self.images is None or self.rate is None else self.images / self.rate / 3600


def dry_run(
    sweep: Sweep, runs: list[Run], *, per_gpu: int = 1, jobs: int | None = None, images_per_second: float | None = None
) -> None:
    """Print every grid, its runs and whether they are finished, and predicted hours.

    jobs: of a cluster, at a time; None: on this machine. The rate of a grid's runs is images_per_second, else what its
    runs have logged so far, else, on this machine, what `per_gpu` of them reach beside each other in a few steps in a
    temporary folder.
    """
    forecasts: dict[str, BuildEstimate] = {}
    for task in tasks_of(runs):
        forecasts.setdefault(task.run.grid, BuildEstimate([])).tasks.append(task)
    reason = fill_in(forecasts, images_per_second, per_gpu, here=jobs is None)

    for grid, forecast in forecasts.items():
        finished = sum(task.state == "finished" for task in forecast.tasks)
        print(f"{grid}: {len(forecast.tasks)} runs, {finished} finished")
        for line in describe_axes([task.run for task in forecast.tasks]):
            print(f"    {line}")
        if forecast.hours_of_runs is not None:
            print(f"    {forecast.hours_of_runs:,.1f} hours at {forecast.rate:,.0f} images/s ({forecast.source})")
        for task in forecast.tasks:
            print(f"    {task.state:<8}  {task.run.name}")

    total = sum(len(forecast.tasks) for forecast in forecasts.values())
    finished = sum(task.state == "finished" for forecast in forecasts.values() for task in forecast.tasks)
    if finished:
        Console().print(results_table(runs))
    print(f"{total} runs in {sweep.folder}, {finished} of them finished; the recipes of all are valid.")
    if reason:
        print(f"No hours are predicted: {reason}")
        return
    devices = visible_devices([run.recipe for run in runs])
    places = min((jobs or len(devices)) * per_gpu, max(1, total - finished))
    hours = sum(forecast.hours_of_runs for forecast in forecasts.values()) / places
    where = f"{jobs} jobs" if jobs else "the CPU" if devices == ["cpu"] else f"{len(devices)} GPUs"
    print(
        f"Predicted: {hours:,.1f} hours. Runs at a time: {places} ({where}, {per_gpu} on each). Assumed: a run "
        "keeps its rate, no place waits for a run, and probes and checkpoints cost nothing."
    )


def fill_in(forecasts: dict[str, BuildEstimate], given: float | None, per_gpu: int, here: bool) -> str | None:
    """Images and rate of each grid. Returns what is missing where hours cannot be predicted."""
    try:
        for forecast in forecasts.values():
            forecast.images = sum(images_left(task) for task in forecast.tasks)
    except UserError as error:
        return str(error)
    for grid, forecast in forecasts.items():
        logged = [rate for task in forecast.tasks if (rate := read_progress(task.run).images_per_second)]
        if given:
            forecast.rate, forecast.source = given, "--images-per-second"
        elif logged:
            forecast.rate, forecast.source = statistics.harmonic_mean(logged), f"{len(logged)} runs of the sweep"
        elif not here:
            return f"no run of {grid} has logged its rate, and the cluster's is not known here: --images-per-second."
        elif not Path(file := forecast.tasks[0].run.recipe.data.train).exists():
            return f"there is no {file} to time runs with; build it, or give their rate with --images-per-second."
        else:
            chosen = random.Random(0).sample(forecast.tasks, min(per_gpu, len(forecast.tasks)))
            forecast.rate = timed([task.run for task in chosen], per_gpu)
            forecast.source = f"{TIMED_STEPS} steps of {' and '.join(task.run.name for task in chosen)}"
            if forecast.rate is None:
                return f"the timed runs of {grid} failed."
    return None


def images_left(task: Task) -> int:
    """Images that the run has still to train on. Raises UserError where data.train is needed to know, and not there."""
    if task.state == "finished":
        return 0
    recipe = task.run.recipe
    if recipe.data.limit and not recipe.data.subset and not Path(recipe.data.train).exists():
        an_epoch = recipe.data.limit // recipe.train.batch_size * recipe.train.batch_size
    else:
        an_epoch = images_per_epoch(recipe)
    return max(0, recipe.train.epochs * an_epoch - read_progress(task.run).step * recipe.train.batch_size)


def timed(runs: list[Run], per_gpu: int) -> float | None:
    """Images/s of one of these runs while all of them train beside each other; None where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(shortened(run, Path(folder) / str(number))) for number, run in enumerate(runs)]
        with SweepDisplay("timing", tasks) as display:
            signals = run_here(tasks, display, per_gpu=per_gpu, retries=0)
        if signals:
            raise KeyboardInterrupt
        rates = [read_progress(task.run).images_per_second for task in tasks]
        return statistics.harmonic_mean(rates) if all(rates) else None


def shortened(run: Run, folder: Path) -> Run:
    """The run with so few steps that they take seconds; the first ones, which compile, are not in its last figure."""
    keys = run.recipe.model_dump(mode="json")
    limit = min(TIMED_STEPS * run.recipe.train.batch_size, images_per_epoch(run.recipe))
    keys["run"]["dir"] = str(folder)
    keys["data"]["limit"] = limit
    keys["train"]["epochs"] = -(-TIMED_STEPS * run.recipe.train.batch_size // limit)
    keys["probe"]["every"] = 0
    keys["log"] = {"every": TIMED_STEPS // 3}
    return Run(run.name, run.grid, run.values, Recipe.model_validate(keys))


def describe_axes(runs: list[Run]) -> list[str]:
    """Every axis of a grid with its values."""
    lines = []
    for key, short in zip(runs[0].values, short_names(list(runs[0].values))):
        values = dict.fromkeys(str(run.values[key]) for run in runs)
        lines.append(f"{short}: {', '.join(values)}")
    return lines
