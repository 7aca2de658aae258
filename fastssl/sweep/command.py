"""`fastssl sweep`: from the file to finished runs on this machine."""

import signal

from rich.console import Console

from fastssl.recipe import UserError
from fastssl.training.signals import COME_AGAIN, INTERRUPTED

from .grid import Run, Sweep
from .local import run_here, tasks_of
from .table import SweepDisplay, results_table


def run_sweep(sweep: Sweep, runs: list[Run], *, per_gpu: int = 1, retries: int = 2) -> int:
    """Run what is not finished yet, on this machine, and show the results. Returns the exit code.

    0: all runs are finished. 1: some have failed for good. 75 and 130: stopped by SIGTERM or Ctrl-C; the same call
    goes on.
    """
    tasks = tasks_of(runs)
    make_folder(sweep)
    with SweepDisplay(f"{sweep.name}  ({sweep.folder})", tasks) as display:
        signals = run_here(tasks, display, per_gpu=per_gpu, retries=retries)
    finished = sum(task.state == "finished" for task in tasks)
    Console().print(results_table(runs))
    if signals:
        print(f"Stopped with {finished} of {len(runs)} runs finished; the same command goes on from here.")
        return INTERRUPTED if signals[0] == signal.SIGINT else COME_AGAIN
    failed = [task for task in tasks if task.state == "failed"]
    print(f"{finished} of {len(runs)} runs are finished, in {sweep.folder}.")
    for task in failed:
        print(f"Failed: {task.run.name}: {task.note} (all it said: {task.run.dir / 'output.log'})")
    if failed:
        print("The same command tries the failed runs again.")
    return 1 if failed else 0


def make_folder(sweep: Sweep) -> None:
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {sweep.folder} cannot be made ({error.strerror}): set another `dir`.") from None
