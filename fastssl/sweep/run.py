"""`fastssl sweep`: from the file to finished runs, here or on a cluster."""

import signal

from rich.console import Console

from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, UserError
from fastssl.sweep.grid import JOBS_FOLDER, Run, Sweep
from fastssl.sweep.local import run_here, tasks_of
from fastssl.sweep.progress import images_per_epoch, last_words, log_of
from fastssl.sweep.slurm import submit
from fastssl.sweep.table import SweepDisplay, results_table


def run_locally(sweep: Sweep, runs: list[Run], *, per_gpu: int = 1, retries: int = 2) -> int:
    """Run what is not finished yet, on this machine, and show the results. Returns the exit code.

    0: all runs are finished. 1: some have failed for good. 75 and 130: stopped by SIGTERM or Ctrl-C; the same call
    goes on.
    """
    tasks = tasks_of(runs)
    display = SweepDisplay(f"{sweep.name}  ({sweep.folder})", tasks)
    make_folder(sweep)
    with display:
        signals = run_here(tasks, display, per_gpu=per_gpu, retries=retries)
    finished = sum(task.state == "finished" for task in tasks)
    Console().print(results_table(runs))
    if signals:
        print(f"Stopped with {finished} of {len(runs)} runs finished; the same command goes on from here.")
        return EXIT_INTERRUPTED if signals[0] == signal.SIGINT else EXIT_REQUEUE
    failed = [task for task in tasks if task.state == "failed"]
    print(f"{finished} of {len(runs)} runs are finished, in {sweep.folder}.")
    for task in failed:
        print(f"Failed: {task.run.name}: {task.note} (all it said: {task.run.dir / 'output.log'})")
    if failed:
        print("The same command tries the failed runs again.")
    return 1 if failed else 0


def submit_to_slurm(sweep: Sweep, runs: list[Run], **options) -> int:
    """Submit what is neither finished nor queued (options: see `submit`) and show how far the sweep is."""
    for run in runs:
        images_per_epoch(run.recipe)  # a file that is not there is said now, not by every job
    make_folder(sweep)
    submission = submit(sweep, runs, **options)
    Console().print(results_table(runs))
    finished = sum(task.state == "finished" for task in submission.tasks)
    print(
        f"{finished} of {len(runs)} runs are finished, {len(submission.queued)} were queued or running already, "
        f"{len(submission.submitted)} are submitted now."
    )
    for run in runs:
        if run.name in submission.submitted:
            before = f"  (a job before this one ended with: {last_words(run)})" if log_of(run).exists() else ""
            print(f"{submission.submitted[run.name]}  {run.name}{before}")
    if finished < len(runs):
        print(f"The jobs' logs are in {sweep.folder / JOBS_FOLDER}. The same command shows how far they are.")
    return 0


def make_folder(sweep: Sweep) -> None:
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {sweep.folder} cannot be made ({error.strerror}): set another `dir`.") from None
