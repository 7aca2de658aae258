"""Runs on this machine: several at a time on each GPU, each in a process of its own."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Literal

import torch

from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from fastssl.recipe import Recipe
from fastssl.sweep.child import BUSY, USER_ERROR, run_child
from fastssl.sweep.grid import Run
from fastssl.sweep.progress import is_finished, is_locked, last_words
from fastssl.sweep.table import SweepDisplay

SPAWN = get_context("spawn")  # CUDA does not survive a fork
GRACE = 120  # seconds that stopped runs have for their checkpoints
POLL = 0.5  # seconds between looks at the runs
CPU = "cpu"


@dataclass
class Task:
    """A run on its way through the sweep."""

    run: Run
    state: Literal["waiting", "running", "finished", "failed"] = "waiting"
    elsewhere: bool = False  # it waits because another process trains in its directory
    failures: int = 0
    note: str = ""  # why it failed last
    device: str = ""  # of the running process: a GPU as CUDA_VISIBLE_DEVICES names it, or "cpu"
    process: BaseProcess | None = None


@dataclass
class Stop:
    """The signals that ask the sweep to stop, as they come in."""

    signals: list[int] = field(default_factory=list)

    @contextmanager
    def on(self, numbers: Iterable[int]) -> Iterator[None]:
        before = {number: signal.signal(number, lambda got, _: self.signals.append(got)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def tasks_of(runs: list[Run]) -> list[Task]:
    """One task a run; finished runs are known by their files. Raises UserError where a directory holds another run."""
    return [Task(run, "finished" if is_finished(run) else "waiting") for run in runs]


def run_here(
    tasks: list[Task],
    display: SweepDisplay,
    *,
    per_gpu: int = 1,
    retries: int = 2,
    stop_on: Iterable[int] = (signal.SIGINT, signal.SIGTERM),
) -> list[int]:
    """Take every waiting task to its end. Returns the signals that stopped it before; empty if none did.

    per_gpu: runs at a time on each visible GPU; without one, on the CPU, whose cores they divide between them.
    retries: how often a run that crashed is continued from its last checkpoint. A run that ends with an error of the
    user's is not tried again. When a signal of `stop_on` comes, every run saves a checkpoint and ends.
    """
    devices = visible_devices([task.run.recipe for task in tasks])
    cores = max(1, len(os.sched_getaffinity(0)) // (len(devices) * per_gpu))
    stop = Stop()
    try:
        with stop.on(stop_on):
            while not stop.signals:
                for task in tasks:
                    if task.process and not task.process.is_alive():
                        settle(task, retries)
                        display.say_state(task)
                running = [task for task in tasks if task.state == "running"]
                for device in devices:
                    free = per_gpu - sum(task.device == device for task in running)
                    for task in next_tasks(tasks, free):
                        start(task, device, cores)
                        display.say_state(task)
                        running.append(task)
                display.show(tasks)
                if all(task.state in ("finished", "failed") for task in tasks):
                    break
                wait([task.process.sentinel for task in running], timeout=POLL)
            if stop.signals:
                end_all(tasks, stop, display)
    finally:
        for task in tasks:
            if task.process:  # after an exception or a second signal
                task.process.kill()
                task.process.join()
    return stop.signals


def visible_devices(recipes: list[Recipe]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; ["cpu"] without one or without need."""
    count = torch.cuda.device_count()
    if count == 0 or all(recipe.train.device == "cpu" for recipe in recipes):
        return [CPU]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def next_tasks(tasks: list[Task], count: int) -> list[Task]:
    """Up to `count` waiting tasks that nobody else works at."""
    found = []
    for task in tasks:
        if len(found) == count:
            break
        if task.state != "waiting":
            continue
        task.elsewhere = is_locked(task.run)
        if not task.elsewhere:
            if is_finished(task.run):  # that other process has done it meanwhile
                task.state = "finished"
            else:
                found.append(task)
    return found


def start(task: Task, device: str, cores: int) -> None:
    recipe = task.run.recipe
    if recipe.data.workers is None:
        data = recipe.data.model_copy(update={"workers": cores})
        recipe = recipe.model_copy(update={"data": data})
    task.process = SPAWN.Process(target=run_child, args=(recipe, os.getpid()), name=task.run.name)
    with inherited(device, cores):
        task.process.start()
    task.state, task.device, task.elsewhere = "running", device, False


@contextmanager
def inherited(device: str, cores: int) -> Iterator[None]:
    """What a process that starts now inherits: its GPU, its threads, and deaf ears for the terminal's Ctrl-C.

    The sweep itself answers Ctrl-C; a run that heard it too, while it still imports, would die with a traceback.
    """
    before = dict(os.environ)
    if device != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(threads, str(cores))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(before)


def settle(task: Task, retries: int) -> None:
    """What becomes of a task whose process has ended."""
    task.process.join()
    code = task.process.exitcode
    task.process = None
    if is_finished(task.run):
        task.state = "finished"
    elif code in (BUSY, EXIT_REQUEUE, EXIT_INTERRUPTED, -signal.SIGTERM):  # it is not the run's fault
        task.state = "waiting"
    else:
        task.failures += 1
        task.note = f"killed by {signal.Signals(-code).name}" if code < 0 else last_words(task.run)
        task.state = "failed" if code == USER_ERROR or task.failures > retries else "waiting"


def end_all(tasks: list[Task], stop: Stop, display: SweepDisplay) -> None:
    """Let every running task save a checkpoint and end; a second signal does not wait for that."""
    running = [task for task in tasks if task.process]
    if running:
        display.say(f"Stopping: {len(running)} runs save their checkpoints.")
    for task in running:
        task.process.terminate()
    first, waited = len(stop.signals), 0.0
    while waited < GRACE and len(stop.signals) == first and any(task.process.is_alive() for task in running):
        wait([task.process.sentinel for task in running if task.process.is_alive()], timeout=POLL)
        waited += POLL
    for task in running:
        task.process.kill()  # nothing happens to those that have ended
        settle(task, retries=0)
        if task.state == "failed":
            task.state = "waiting"  # the next call tries it again
