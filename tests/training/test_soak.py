"""Long use: memory, threads and open files stay where they were after the start."""

import itertools
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from training_runs import FORKS, PATIENCE, metrics_of, small, train_jobs, wait_for_line

from fastssl.loading import BetonLoader
from fastssl.recipe import load_recipe

GROWTH = 24 << 20  # bytes; a leaked batch of 16 views has 0.4 MB, so 2,000 steps of a leak have 800 MB


class Usage(NamedTuple):
    memory: int  # bytes
    threads: int
    files: int


def usage_of(pid: int) -> Usage:
    status = Path(f"/proc/{pid}/status").read_text()
    rss, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads"))
    return Usage(1024 * rss, threads, len(os.listdir(f"/proc/{pid}/fd")))


@pytest.mark.slow
def test_two_thousand_steps_with_probes_and_checkpoints(canvas, tmp_path):
    more = ["train.epochs=680", "probe={every: 40, k: 3}", "checkpoint.every=50", "log.every=10", "train.ema=0.9"]
    jobs = [("hprob_barlow", small(canvas, tmp_path / "run", *more))]
    process = FORKS.Process(target=train_jobs, args=(jobs,))
    process.start()
    samples: dict[int, list[Usage]] = {}  # by hundreds of steps
    wait_for_line(process, tmp_path / "run", 1)
    end = time.monotonic() + PATIENCE
    while process.exitcode is None and time.monotonic() < end:
        try:
            usage = usage_of(process.pid)
            samples.setdefault(metrics_of(tmp_path / "run")[-1]["step"] // 100, []).append(usage)
        except (OSError, ValueError, IndexError):  # the process has just ended, or the last line is being written
            pass
        time.sleep(0.2)
    process.join(PATIENCE)
    assert process.exitcode == 0 and metrics_of(tmp_path / "run")[-1]["step"] == 2040
    # The smallest memory of each hundred steps: a probe and a save take some for a moment.
    floor = {hundred: Usage(*map(min, zip(*usages))) for hundred, usages in samples.items() if hundred < 20}
    early, late = floor[5], floor[max(floor)]
    assert len(floor) >= 15
    assert late.memory - early.memory < GROWTH, floor
    assert (late.threads, late.files) == (early.threads, early.files), floor


def abort_epochs(path, crop, sender):
    """Begin 200 epochs and leave each after some batches; send the usage after 50 and after all."""
    views = load_recipe("recipes/barlow.yaml", ["views.size=32"]).views
    loader = BetonLoader(path, 8, crop=crop, views=views, workers=2, device="cpu")
    for epoch in range(200):
        loader.set_epoch(epoch)
        batches = iter(loader)
        for _ in itertools.islice(batches, epoch % 4):
            pass
        del batches
        if epoch in (49, 199):
            time.sleep(0.2)  # threads of the last epoch end
            sender.send(usage_of(os.getpid()))


@pytest.mark.slow
@pytest.mark.parametrize("layout, crop", [("canvas", "gpu"), ("canvas_jpeg", "gpu"), ("full", "cpu")])
def test_two_hundred_epochs_that_are_aborted(layout, crop, request):
    path = request.getfixturevalue(layout) / "train.beton"
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=abort_epochs, args=(path, crop, sender))
    process.start()
    sender.close()
    early, late = receiver.recv(), receiver.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert late.memory - early.memory < GROWTH
    assert (late.threads, late.files) == (early.threads, early.files)
