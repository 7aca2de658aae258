"""The process of one run: its log and lock, its share of the machine, and its end when the sweep ends."""

import ctypes
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from fastssl.common.errors import EXIT_REQUEUE, UserError
from fastssl.evaluation.probe import probe_of
from fastssl.recipe import Recipe
from fastssl.training import train
from fastssl.training.run_dir import RunDirBusy

BUSY = 73  # exit code: another process trains in this directory
USER_ERROR = 2
PR_SET_PDEATHSIG = 1


def run_child(recipe: Recipe, parent: int) -> None:
    """Train `recipe` in recipe.run.dir, from its last checkpoint if there is one; ends in an exit code.

    What it prints goes to output.log.
    """
    end_with(parent)
    run_dir = Path(recipe.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = open(run_dir / "output.log", "a")  # open, and locked, as long as the process lives
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(BUSY)
    except OSError:
        pass  # some network file systems know no locks
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)
    print(f"--- process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    try:
        train(recipe, resume="auto", probe=probe_of(recipe))
    except UserError as error:
        print(f"fastssl: {error}", file=sys.stderr)
        sys.exit(BUSY if isinstance(error, RunDirBusy) else USER_ERROR)


def end_with(parent: int) -> None:
    """Let the system send SIGTERM when the parent dies, even of SIGKILL; training then saves a checkpoint and ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this
        sys.exit(EXIT_REQUEUE)
    # SLURM's requeue signal reaches every process of a job, a closed terminal's every process of the sweep. For a run
    # they mean the same; of the second, training says so itself once it runs.
    for number in (signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
