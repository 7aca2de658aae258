"""The stage `end_to_end`: loader, views and step together, as `fastssl train` runs them, and the waits for data."""

import contextlib
import subprocess
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from fastssl.profiling.device_stages import take_step
from fastssl.profiling.loader_stages import AHEAD, endless
from fastssl.profiling.profile import GpuCounters, Measurement, Percentiles, StageResult
from fastssl.profiling.timing import StageTimer, synchronize
from fastssl.training.meters import Meter, Moment
from fastssl.training.setup import TrainingRun


class Training:
    """Takes steps of training with its data."""

    def __init__(self, run: TrainingRun, epoch: int):
        self.run, self.epoch = run, epoch
        self.meter = _WaitMeter(run.device)
        self.batches = self.meter.watch(endless(run.state.loader))

    def __call__(self) -> int:
        return take_step(self.run, list(islice(self.batches, self.run.recipe.train.accumulate)), self.epoch)

    def close(self) -> None:
        """Stop decoding ahead, which would go on while another stage is measured, until the next call."""
        self.batches.close()
        self.batches = self.meter.watch(endless(self.run.state.loader))


class _WaitMeter(Meter):
    """Records every single wait for a batch."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.recorded: list[tuple[Moment, Moment]] = []

    def _count_wait(self, asked: Moment, received: Moment) -> None:
        self.recorded.append((asked, received))

    def take_waits(self) -> list[float]:
        """Return the seconds that each batch since the last call was waited for, on a GPU by the GPU."""
        synchronize(self.device)
        recorded, self.recorded = self.recorded, []
        waits = []
        for asked, received in recorded:
            if isinstance(asked, torch.cuda.Event) and isinstance(received, torch.cuda.Event):
                waits.append(asked.elapsed_time(received) / 1000)
            elif isinstance(asked, float) and isinstance(received, float):
                waits.append(received - asked)
        return waits


class EndToEndStage:
    """Times training, with the waits for data and the load of cores and GPU in each window."""

    def __init__(self, run: TrainingRun, epoch: int, cores: int, seconds: float):
        self.training = Training(run, epoch)
        self.cores = cores
        self.timer = StageTimer(
            self.training, run.device, seconds, min_batches=2, skipped_batches=AHEAD, after=self.training.close
        )
        self.waits: list[list[float]] = []  # seconds per batch, by window
        self.gpu_samples: list[list[float]] = []  # utilization in %, SM clock and its maximum in MHz, power in W

    def measure(self) -> None:
        with gpu_counters(self.timer.device, self.gpu_samples):
            self.timer.measure()
        batches = self.timer.batches * self.training.run.recipe.train.accumulate
        self.waits.append(self.training.meter.take_waits()[-batches:])

    def result(self) -> StageResult:
        windows, waits = self.timer.windows, np.concatenate(self.waits)
        p50, p95, p99 = np.percentile(waits, (50, 95, 99)).tolist()
        cpu_seconds, seconds = sum(w.cpu_seconds for w in windows), sum(w.seconds for w in windows)
        result = self.timer.result()
        result.data_wait = Measurement.of([sum(waited) / window.seconds for waited, window in zip(self.waits, windows)])
        result.wait_seconds = Percentiles(p50=p50, p95=p95, p99=p99)
        result.cores_busy = cpu_seconds / seconds / self.cores
        if self.gpu_samples:
            percent, clock, max_clock, power = np.median(self.gpu_samples, axis=0).tolist()
            result.gpu = GpuCounters(
                utilization=percent / 100, sm_clock_mhz=clock, max_sm_clock_mhz=max_clock, power_w=power
            )
        return result


@contextlib.contextmanager
def gpu_counters(device: torch.device, samples: list[list[float]]) -> Iterator[None]:
    """Append five samples per second at the end, none without a GPU or without nvidia-smi."""
    process = None
    if device.type == "cuda":
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        fields = "utilization.gpu,clocks.sm,clocks.max.sm,power.draw"
        query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-lms", "200"]
        with contextlib.suppress(OSError):
            process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield
    finally:
        if process:
            process.terminate()
            for line in process.communicate()[0].splitlines():
                with contextlib.suppress(ValueError):  # "[N/A]"
                    samples.append([float(value) for value in line.split(",")])
            samples[:] = [sample for sample in samples if len(sample) == 4]  # the last line may be incomplete
