"""Runs on this machine: several in parallel on each GPU, each in its own process."""

import os
import shlex
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch

from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from fastssl.common.system import usable_cores
from fastssl.common.terminal import console, print_line
from fastssl.recipe import Recipe
from fastssl.sweep.child import EXIT_BUSY, EXIT_USER_ERROR, run_child
from fastssl.sweep.grid import Sweep, SweepRun
from fastssl.sweep.progress import Task, is_finished, is_locked, last_log_line, log_path, make_tasks
from fastssl.sweep.table import SweepDisplay, results_table
from fastssl.training.residence import RUNS_PER_GPU

SPAWN = get_context("spawn")  # CUDA does not survive a fork
GRACE = 120  # seconds that stopped runs have to save their checkpoints
POLL = 0.5  # seconds between two checks of the processes
STOP_ON = (signal.SIGINT, signal.SIGTERM)
CPU = "cpu"


@contextmanager
def collect_signals(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Record these signals, in the order of their arrival, instead of letting them end the process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_locally(sweep: Sweep, runs: list[SweepRun], *, per_gpu: int = 1, retries: int = 2) -> int:
    """Train the runs that are not finished on this machine and print the results.

    Returns the exit code: 0 if all runs are finished, 1 if some have failed for good, 75 or 130 after SIGTERM or
    Ctrl-C. The same call resumes the sweep. For the options see `run_tasks`.
    """
    tasks = make_tasks(runs)
    display = SweepDisplay(f"{sweep.name}  ({sweep.folder})", tasks)
    sweep.make_folder()
    with display:
        signals = run_tasks(tasks, display, per_gpu=per_gpu, retries=retries)
    finished = sum(task.state == "finished" for task in tasks)
    console().print(results_table(runs))
    if signals:
        print(f"Stopped with {finished} of {len(runs)} runs finished; the same command resumes the sweep.")
        return EXIT_INTERRUPTED if signals[0] == signal.SIGINT else EXIT_REQUEUE
    failed = [task for task in tasks if task.state == "failed"]
    print_line(console(), f"{finished} of {len(runs)} runs are finished, in {sweep.folder}.")
    if finished:
        folder = shlex.quote(str(sweep.folder))
        print_line(console(), f"Evaluate: fastssl eval knn {folder}    Compare: fastssl report {folder}")
    for task in failed:
        print_line(console(), f"Failed: {task.run.name}: {task.error} (full output: {log_path(task.run)})")
    if failed:
        print("The same command tries the failed runs again.")
    return 1 if failed else 0


def run_tasks(
    tasks: list[Task], display: SweepDisplay, *, per_gpu: int, retries: int, stop_on: Iterable[int] = STOP_ON
) -> list[int]:
    """Train every waiting task until it is finished or has failed. Returns the signals that stopped this, if any.

    Args:
        per_gpu: number of runs in parallel on each visible GPU, or on the CPU where there is no GPU. The runs divide
            the cores among them.
        retries: how often a run that crashed is resumed from its last checkpoint. A run that ends with a UserError is
            not tried again.
        stop_on: signals after which every run saves a checkpoint and ends.
    """
    devices = visible_devices([task.run.recipe for task in tasks])
    cores = max(1, usable_cores() // (len(devices) * per_gpu))
    try:
        with collect_signals(stop_on) as signals:
            while not signals:
                for task in tasks:
                    if task.process and not task.process.is_alive():
                        update_ended(task, retries)
                        display.print_state(task)
                running = [task for task in tasks if task.state == "running"]
                for device in devices:
                    free = per_gpu - sum(task.device == device for task in running)
                    for task in next_tasks(tasks, free):
                        start(task, device, cores, per_gpu)
                        display.print_state(task)
                        running.append(task)
                display.show(tasks)
                if all(task.state in ("finished", "failed") for task in tasks):
                    break
                # Returns early when a process ends.
                wait([task.process.sentinel for task in running if task.process], timeout=POLL)
            if signals:
                stop_all(tasks, signals, display)
    finally:
        # Processes are left here only after an exception.
        for task in tasks:
            if task.process:
                task.process.kill()
                task.process.join()
    return signals


def visible_devices(recipes: list[Recipe]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; ["cpu"] if none exists or is needed."""
    count = torch.cuda.device_count()
    if count == 0 or all(recipe.train.device == "cpu" for recipe in recipes):
        return [CPU]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def next_tasks(tasks: list[Task], count: int) -> list[Task]:
    """Up to `count` waiting tasks in whose directory no other process trains."""
    found: list[Task] = []
    for task in tasks:
        if task.state == "waiting" and len(found) < count:
            task.locked = is_locked(task.run)
            if not task.locked and is_finished(task.run):  # another process has finished it in the meantime
                task.state = "finished"
            elif not task.locked:
                found.append(task)
    return found


def start(task: Task, device: str, cores: int, per_gpu: int) -> None:
    """Start the task's process on a device that it shares with others, with that many threads."""
    recipe = task.run.recipe
    if recipe.data.workers is None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": cores})})
    task.process = SPAWN.Process(target=run_child, args=(recipe, os.getpid()), name=task.run.name)
    with child_environment(device, cores, per_gpu):
        task.process.start()
    task.state = "running"
    task.device = device
    task.locked = False


@contextmanager
def child_environment(device: str, cores: int, per_gpu: int) -> Iterator[None]:
    """Set what a process that is started now inherits: its GPU, its share of it, its threads, and SIGINT ignored.

    A terminal sends Ctrl-C to all processes. The sweep handles it and stops the runs; a run that received it during its
    imports would die with a traceback.
    """
    before = dict(os.environ)
    if device != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
        os.environ[RUNS_PER_GPU] = str(per_gpu)
    for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(threads, str(cores))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(before)


def update_ended(task: Task, retries: int) -> None:
    """Set the state of a task whose process has ended, from the run's files and the exit code."""
    assert task.process
    task.process.join()
    code = task.process.exitcode or 0
    task.process = None
    if is_finished(task.run):
        task.state = "finished"
    elif code in (EXIT_BUSY, EXIT_REQUEUE, EXIT_INTERRUPTED, -signal.SIGTERM):
        task.state = "waiting"  # stopped from outside, which is no failure of the run
    else:
        task.failures += 1
        task.error = f"killed by {signal.Signals(-code).name}" if code < 0 else last_log_line(task.run)
        task.state = "failed" if code == EXIT_USER_ERROR or task.failures > retries else "waiting"


def stop_all(tasks: list[Task], signals: list[int], display: SweepDisplay) -> None:
    """Let every running task save a checkpoint and end. A further signal kills them without waiting for that."""
    running = {task.process: task for task in tasks if task.process}
    if running:
        print_line(display.console, f"Stopping: {len(running)} runs save their checkpoints.")
    for process in running:
        process.terminate()
    before = len(signals)
    waited = 0.0
    while waited < GRACE and len(signals) == before and any(process.is_alive() for process in running):
        wait([process.sentinel for process in running if process.is_alive()], timeout=POLL)
        waited += POLL
    for process, task in running.items():
        process.kill()  # does nothing to a process that has ended
        update_ended(task, retries=0)
        if task.state == "failed":
            task.state = "waiting"  # the next call tries it again
