"""The process of one run of a sweep: it logs to a file, holds a lock, and stops when the sweep's process ends."""

import ctypes
import io
import os
import signal
import sys
import time
from pathlib import Path

from fastssl.common.errors import EXIT_REQUEUE, UserError
from fastssl.common.files import open_regular, try_lock
from fastssl.common.terminal import print_error
from fastssl.evaluation.probe import probe_from_recipe
from fastssl.recipe import Recipe
from fastssl.training import train
from fastssl.training.run_dir import RunDirBusy

EXIT_USER_ERROR = 2
EXIT_BUSY = 73  # another process trains in this directory
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def run_child(recipe: Recipe, parent: int) -> None:
    """Train `recipe` in `recipe.run.dir`, from its last checkpoint if there is one. Ends the process.

    The run stops with the process `parent`, the sweep. Everything that is printed goes to output.log. The exit code is
    0, EXIT_USER_ERROR, EXIT_BUSY or, where a signal stopped the training, EXIT_REQUEUE.
    """
    stop_with_parent(parent)
    run_dir = Path(recipe.run.dir or "")
    run_dir.mkdir(parents=True, exist_ok=True)
    # The log stays open as long as the process lives, and the lock on it tells other sweeps that this run is taken.
    log = open_regular(run_dir / "output.log", "a")
    try:
        try_lock(log)
    except BlockingIOError:
        sys.exit(EXIT_BUSY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    print(f"--- process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    try:
        train(recipe, resume="auto", probe=probe_from_recipe(recipe))
    except UserError as error:
        print_error(error.message, error.hint)
        sys.exit(EXIT_BUSY if isinstance(error, RunDirBusy) else EXIT_USER_ERROR)


def stop_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent dies, even of SIGKILL; training then saves a checkpoint and ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(EXIT_REQUEUE)
    # SLURM sends its requeue signal (SIGUSR2) to every process of a job, and a terminal that closes sends SIGHUP to
    # every process of the sweep. Until training installs its own handlers, both mean what SIGTERM means.
    for number in (signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
