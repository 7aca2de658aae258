"""`fastssl sweep --dry-run`: the runs of a sweep and a prediction of the time and disk that they take."""

import random
import statistics
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastssl.beton.shards import exists
from fastssl.common.errors import UserError
from fastssl.common.files import read_lines
from fastssl.common.terminal import console, count_of, print_line, printable, progress, rounded, time_in_words
from fastssl.models import SSLModel
from fastssl.recipe import Recipe
from fastssl.sweep.grid import Sweep, SweepRun, short_names
from fastssl.sweep.local import CPU, run_tasks, visible_devices
from fastssl.sweep.progress import Task, images_per_epoch, make_tasks, read_progress
from fastssl.sweep.table import TimedLongEnough, TimingDisplay, results_table
from fastssl.training.tracking import parse_metrics

TIMED_STEPS = 30
LOG_EVERY = 5  # of these steps
LONGEST = 60.0  # s of timing, if every run has logged twice by then: its first steps compile


@dataclass
class GridEstimate:
    """The runs of one grid and what is known of their duration."""

    tasks: list[Task] = field(default_factory=list)
    images: int | None = None  # that its runs have still to train on; None: data.train does not exist
    rate: float | None = None  # images/s of one run
    source: str = ""  # where the rate comes from

    @property
    def hours(self) -> float | None:
        """Hours that the runs would take one after the other."""
        return None if self.images is None or self.rate is None else self.images / self.rate / 3600


def dry_run(
    sweep: Sweep,
    runs: list[SweepRun],
    *,
    per_gpu: int = 1,
    jobs: int | None = None,
    images_per_second: float | None = None,
    verbose: bool = False,
) -> None:
    """Print the axes of every grid, the states of its runs, and the predicted time and disk.

    The throughput of a grid's runs is `images_per_second` if given, else what its runs have logged so far, else, on
    this machine, what `per_gpu` of them reach in parallel during a few steps in a temporary folder.

    Args:
        jobs: number of parallel jobs of a cluster; None: the sweep runs on this machine.
        verbose: list every run.
    """
    estimates: dict[str, GridEstimate] = {}
    for task in make_tasks(runs):
        estimates.setdefault(task.run.grid, GridEstimate()).tasks.append(task)
    missing = estimate_rates(estimates, images_per_second, per_gpu, here=jobs is None)

    finished = 0
    for grid, estimate in estimates.items():
        states = Counter(task.state for task in estimate.tasks)
        finished += states["finished"]
        of_states = "".join(f", {count:,} {state}" for state, count in states.items() if state != "waiting")
        print(printable(f"{grid}: {count_of(len(estimate.tasks), 'run')}{of_states}"))
        grid_runs = [task.run for task in estimate.tasks]
        rows = {}
        for key, short in zip(grid_runs[0].values, short_names(list(grid_runs[0].values))):
            rows[short] = ", ".join(dict.fromkeys(str(run.values[key]) for run in grid_runs))
        if estimate.hours is not None and estimate.rate is not None:
            rows["time"] = _time_of_runs(estimate.hours, len(estimate.tasks) - states["finished"])
            rows["time"] += f" at {rounded(estimate.rate)} images/s ({estimate.source})"
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            print(printable(f"  {name:<{width}}  {text}"))
        for task in estimate.tasks if verbose else ():
            print(printable(f"  {task.state:<8}  {task.run.name}"))

    screen = console()
    if finished:
        screen.print(results_table(runs))
    print_line(screen, f"Runs: {len(runs):,} in {sweep.folder}, {finished:,} finished. The recipes of all are valid.")
    run_B = bytes_of_run(runs[0].recipe)
    print_line(screen, f"Disk: about {len(runs) * run_B / 1e9:,.1f} GB, {run_B / 1e6:,.0f} MB for each run.")
    if missing:
        print_line(screen, f"Time: not predicted, because {missing}")
    else:
        devices = visible_devices([run.recipe for run in runs])
        parallel = min((jobs or len(devices)) * per_gpu, max(1, len(runs) - finished))
        seconds = 3600 * sum(estimate.hours or 0 for estimate in estimates.values()) / parallel
        if jobs:
            where = count_of(jobs, "job")
        else:
            where = "the CPU" if devices == ["cpu"] else count_of(len(devices), "GPU")
        at_a_time = f"{count_of(parallel, 'run')} in parallel ({where}, {per_gpu} on each)"
        if parallel == 1:
            at_a_time = "1 run at a time" + (" on the CPU" if where == "the CPU" else "")
        assumed = "if every run keeps its rate and the devices are always busy; probes and checkpoints come on top"
        print_line(screen, f"Time: {time_in_words(seconds)} with {at_a_time}, {assumed}.")
    if not verbose:
        print_line(screen, "--verbose lists every run.")


def _time_of_runs(hours: float, count: int) -> str:
    """The time of one run, and of all of them if there are several."""
    each = time_in_words(3600 * hours / max(1, count))
    return f"{each} a run, {time_in_words(3600 * hours)} one after the other," if count > 1 else each


def bytes_of_run(recipe: Recipe) -> int:
    """About the size of a run directory: checkpoints with the state of an Adam optimizer, and the encoder."""
    with torch.device("meta"):
        model = SSLModel(recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checkpoints = 3 if recipe.probe.every else 2  # last.pt and previous.pt; best.pt is that of the probe
    return 4 * (checkpoints * 3 * parameters + sum(parameter.numel() for parameter in model.encoder.parameters()))


def estimate_rates(estimates: dict[str, GridEstimate], given: float | None, per_gpu: int, here: bool) -> str | None:
    """Set images and rate of each grid. Returns the reason if hours cannot be predicted."""
    try:
        for estimate in estimates.values():
            estimate.images = sum(images_left(task) for task in estimate.tasks)
    except UserError as error:
        return str(error)
    for grid, estimate in estimates.items():
        logged = [rate for task in estimate.tasks if (rate := read_progress(task.run).images_per_second)]
        if given:
            estimate.rate = given
            estimate.source = "--images-per-second"
        elif logged:
            estimate.rate = statistics.harmonic_mean(logged)
            estimate.source = f"{count_of(len(logged), 'run')} of the sweep"
        elif not here:
            return f"no run of {grid} has logged its throughput on the cluster; give it with --images-per-second."
        elif not exists(Path(file := estimate.tasks[0].run.recipe.data.train)):
            return f"there is no {file} to time runs with; build it, or give the throughput with --images-per-second."
        else:
            chosen = random.Random(0).sample(estimate.tasks, min(per_gpu, len(estimate.tasks)))
            names = " and ".join(task.run.name for task in chosen)
            on_cpu = (
                ", which may take minutes on a CPU"
                if CPU in visible_devices([task.run.recipe for task in chosen])
                else ""
            )
            print_line(
                console(stderr=True),
                f"Timing {TIMED_STEPS} steps of {names}{on_cpu}; --images-per-second N skips this.",
            )
            estimate.rate = time_runs([task.run for task in chosen], per_gpu)
            if estimate.rate is None:
                return f"the timed runs of {grid} failed."
            estimate.source = f"steps of {names}"
            # At once: the timing of the other grids may take minutes.
            print_line(console(stderr=True), f"{grid}: {rounded(estimate.rate)} images/s in a run.")
    return None


def images_left(task: Task) -> int:
    """Number of images that a run has still to train on. Raises UserError if it depends on a missing data.train."""
    if task.state == "finished":
        return 0
    recipe = task.run.recipe
    if recipe.data.limit and not recipe.data.subset and not exists(Path(recipe.data.train)):
        images = recipe.data.limit // recipe.train.batch_size * recipe.train.batch_size
    else:
        images = images_per_epoch(recipe)
    return max(0, recipe.train.epochs * images - read_progress(task.run).step * recipe.train.batch_size)


def time_runs(runs: list[SweepRun], per_gpu: int) -> float | None:
    """Images/s of one run while all of these train in parallel; None if one fails.

    They train TIMED_STEPS steps, or fewer if these take longer than LONGEST.
    """
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(shorten(run, Path(folder) / str(number))) for number, run in enumerate(runs)]
        display = TimingDisplay(tasks, LONGEST, 2 * LOG_EVERY)
        # No signals: Ctrl-C ends the timing at once, as there is nothing to save.
        with progress("Timing", sum(map(display.images_in, tasks))) as display.advance, suppress(TimedLongEnough):
            run_tasks(tasks, display, per_gpu=per_gpu, retries=0, stop_on=())
        rates = [rate for task in tasks if (rate := last_rate(task.run))]
        return statistics.harmonic_mean(rates) if len(rates) == len(tasks) else None


def last_rate(run: SweepRun) -> float | None:
    """Images/s over the last third of the timed steps: the first ones compile. None if the run has logged nothing."""
    path = run.dir / "metrics.jsonl"
    entries = parse_metrics(read_lines(path) if path.exists() else ())
    # The last line may be of fewer steps.
    whole = (entry for entry in entries if (entry.get("step") or 0) % LOG_EVERY == 0)
    rates = [rate for entry in whole if (rate := entry.get("images_per_second"))]
    last_third = TIMED_STEPS // LOG_EVERY // 3
    return statistics.harmonic_mean((rates[1:] or rates)[-last_third:]) if rates else None


def shorten(run: SweepRun, folder: Path) -> SweepRun:
    """The run in another folder, with only TIMED_STEPS steps. They take seconds on a GPU, up to minutes on a CPU."""
    keys = run.recipe.model_dump(mode="json")
    limit = min(TIMED_STEPS * run.recipe.train.batch_size, images_per_epoch(run.recipe))
    keys["run"]["dir"] = str(folder)
    keys["data"]["limit"] = limit
    keys["train"]["epochs"] = -(-TIMED_STEPS * run.recipe.train.batch_size // limit)
    keys["probe"]["every"] = 0
    keys["log"] = {"every": LOG_EVERY}
    return SweepRun(run.name, run.grid, run.values, Recipe.model_validate(keys))
