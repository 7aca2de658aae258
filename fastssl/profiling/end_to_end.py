"""The leg `end_to_end`: loader, views and step together, as `fastssl train` runs them, and the wait for each batch."""

import contextlib
import subprocess
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from fastssl.profiling.device_stages import take_step
from fastssl.profiling.loader_stages import AHEAD, endless
from fastssl.profiling.timing import Stage, figure_of, wait_for
from fastssl.training.meters import Meter
from fastssl.training.setup import Run


class Training:
    """A leg's work: one step of training with its data."""

    def __init__(self, run: Run, epoch: int):
        self.run, self.epoch = run, epoch
        self.meter = _Waits(run.device)
        self.begin()

    def begin(self) -> None:
        self.batches = endless(self.run.state.loader)
        self.watched = self.meter.watch(self.batches)

    def __call__(self) -> int:
        return take_step(self.run, list(islice(self.watched, self.run.recipe.train.accumulate)), self.epoch)

    def close(self) -> None:
        """Stop decoding ahead: it would go on while something else is measured."""
        self.watched.close()
        self.batches.close()


class _Waits(Meter):
    """Keeps every wait of its own."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.kept: list = []

    def _count_wait(self, asked, received) -> None:
        self.kept.append((asked, received))

    def take_waits(self) -> list[float]:
        """Seconds that each batch since the last call was waited for: by the GPU where there is one."""
        wait_for(self.device)
        kept, self.kept = self.kept, []
        if self.device.type == "cuda":
            return [asked.elapsed_time(received) / 1000 for asked, received in kept]
        return [received - asked for asked, received in kept]


class EndToEnd:
    """The leg's windows, with the waits and the cores' load of each."""

    def __init__(self, run: Run, epoch: int, cores: int, seconds: float):
        self.training = Training(run, epoch)
        begin, end = self.training.begin, self.training.close
        self.leg = Stage(self.training, run.device, seconds, least=2, dropped=AHEAD, begin=begin, end=end)
        self.cores = cores
        self.waits: list[list[float]] = []
        self.gpu: list[list[float]] = []

    def measure(self) -> None:
        with watched_gpu(self.leg.device) as lines:
            self.leg.measure()
        self.gpu += lines
        micro_batches = self.leg.repeats * self.training.run.recipe.train.accumulate
        self.waits.append(self.training.meter.take_waits()[-micro_batches:])

    def result(self) -> dict:
        windows, waits = self.leg.windows, np.concatenate(self.waits)
        shares = [sum(waited) / window.seconds for waited, window in zip(self.waits, windows)]
        busy = sum(w.cpu_seconds for w in windows) / sum(w.seconds for w in windows) / self.cores
        return {
            **self.leg.rates(),
            "data_wait": figure_of(shares),
            "wait_seconds": {f"p{q}": float(np.percentile(waits, q)) for q in (50, 95, 99)},
            "cores_busy": busy,
            "gpu": gpu_figures(self.gpu),
        }


@contextlib.contextmanager
def watched_gpu(device: torch.device) -> Iterator[list[list[float]]]:
    """Lines of utilisation (%), SM clock and its maximum (MHz) and power (W), five a second, as nvidia-smi gives them;
    none where it is not there."""
    lines: list[list[float]] = []
    fields = "utilization.gpu,clocks.sm,clocks.max.sm,power.draw"
    if device.type != "cuda":
        yield lines
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield lines
        return
    try:
        yield lines
    finally:
        process.terminate()
        for line in process.communicate()[0].splitlines():
            with contextlib.suppress(ValueError):  # "[N/A]", or a line that was cut off
                lines.append([float(value) for value in line.split(",")])


def gpu_figures(lines: list[list[float]]) -> dict | None:
    complete = np.array([line for line in lines if len(line) == 4])
    if len(complete) == 0:
        return None
    utilisation, clock, most, power = np.median(complete, axis=0)
    return {"utilisation": utilisation / 100, "sm_clock_mhz": clock, "max_sm_clock_mhz": most, "power_w": power}
