"""How a stage is timed: in windows, one window of each stage in turn, so that a drift of the machine's speed affects
all stages alike."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastssl.common.distributed import broadcast_from_main, world_size
from fastssl.profiling.profile import Measurement, Rate, StageResult

NOISE = 0.02  # share of a stage below which the difference of two stages is noise


class Window(NamedTuple):
    images: int  # of this process
    seconds: float
    cpu_seconds: float  # of all threads of this process
    page_faults: int  # without a disk read


@dataclass
class StageTimer:
    """Times work that runs alone. `work` does one batch and returns its number of images."""

    work: Callable[[], int]
    device: torch.device
    seconds: float  # length of a window
    min_batches: int = 1  # in a window
    skipped_batches: int = 1  # at the start of each window, not counted
    after: Callable[[], None] = lambda: None  # called after each window
    batches: int = 0  # in a window, the same in all processes; set by warm_up
    expected: float = 0.0  # seconds that `measure` takes; set by warm_up
    windows: list[Window] = field(default_factory=list)

    def warm_up(self) -> None:
        """Compile, fill caches, and choose the number of batches in a window."""
        self.work()
        self.after()
        took = self._time(self.min_batches).seconds / self.min_batches
        self.batches = broadcast_from_main(lambda: max(self.min_batches, math.ceil(self.seconds / took)))
        self.expected = took * (self.skipped_batches + self.batches)

    def measure(self) -> None:
        self.windows.append(self._time(self.batches))

    def _time(self, batches: int) -> Window:
        for _ in range(self.skipped_batches):
            self.work()
        synchronize(self.device)
        faults, start, cpu_start = _page_faults(), time.perf_counter(), time.process_time()
        images = sum(self.work() for _ in range(batches))
        synchronize(self.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        window = Window(images, seconds, cpu_seconds, _page_faults() - faults)
        self.after()
        return window

    def images_per_second(self) -> Rate:
        """Return the rate of all processes together, which do the same at the same time."""
        return Rate.of([world_size() * window.images / window.seconds for window in self.windows])

    def result(self) -> StageResult:
        cpu_seconds = Measurement.of([window.cpu_seconds / window.images for window in self.windows])
        return StageResult(images_per_second=self.images_per_second(), cpu_seconds=cpu_seconds)


def difference_result(longer: StageTimer, shorter: StageTimer) -> StageResult:
    """Return the rates of what `longer` does in addition to `shorter`, which cannot be timed alone."""
    seconds, cpu_seconds = [], []
    for a, b in zip(longer.windows, shorter.windows):
        whole = a.seconds / a.images
        seconds.append(max(NOISE * whole, whole - b.seconds / b.images))
        cpu_seconds.append(max(0.0, a.cpu_seconds / a.images - b.cpu_seconds / b.images))
    rates = Rate.of([world_size() / second for second in seconds])
    return StageResult(images_per_second=rates, cpu_seconds=Measurement.of(cpu_seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
