"""How a leg is timed: in windows, a window of each leg in turn, so that a machine whose speed drifts drifts for all."""

import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastssl.common.distributed import broadcast_from_main, world_size

NOISE = 0.02  # share of a leg that the difference of two legs does not resolve


class Window(NamedTuple):
    images: int  # of this process
    seconds: float
    cpu_seconds: float  # of all threads of this process
    page_faults: int  # in which the system only had to hand out memory


@dataclass
class Stage:
    """Work that is timed alone: `work` does one batch and returns its images."""

    work: Callable[[], int]
    device: torch.device
    seconds: float  # of a window
    least: int = 1  # batches of a window
    dropped: int = 1  # batches at the start of each window that do not count
    begin: Callable[[], None] = lambda: None  # what comes before them
    end: Callable[[], None] = lambda: None  # what comes behind the window
    repeats: int = 0
    windows: list[Window] = field(default_factory=list)

    def warm_up(self) -> None:
        """Compile, fill caches, and settle how many batches make a window, the same in all processes."""
        self.begin()
        self.work()
        self.end()
        self.begin()  # anew, as a loader has decoded ahead meanwhile
        for _ in range(self.dropped):
            self.work()
        wait_for(self.device)
        start = time.perf_counter()
        for _ in range(self.least):
            self.work()
        wait_for(self.device)
        took = (time.perf_counter() - start) / self.least
        self.end()
        self.repeats = broadcast_from_main(lambda: max(self.least, math.ceil(self.seconds / took)))

    def measure(self) -> None:
        self.begin()
        for _ in range(self.dropped):
            self.work()
        wait_for(self.device)
        faults_before, start, cpu_start = page_faults(), time.perf_counter(), time.process_time()
        images = sum(self.work() for _ in range(self.repeats))
        wait_for(self.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        self.windows.append(Window(images, seconds, cpu_seconds, page_faults() - faults_before))
        self.end()

    def rates(self) -> dict:
        return rates_of(self.windows)

    def images_per_second(self) -> dict:
        return self.rates()["images_per_second"]


def rates_of(windows: list[Window]) -> dict:
    """Images/s of all processes, which do the same at the same time; CPU-seconds of one image."""
    return {
        "images_per_second": figure_of([world_size() * window.images / window.seconds for window in windows]),
        "cpu_seconds": figure_of([window.cpu_seconds / window.images for window in windows]),
        "missing": None,
    }


def rates_of_difference(longer: Stage, shorter: Stage) -> dict:
    """The rates of what the first leg does beside the second; of less than NOISE of it nothing is known."""
    pairs = list(zip(longer.windows, shorter.windows))
    seconds = [max(NOISE * a.seconds / a.images, a.seconds / a.images - b.seconds / b.images) for a, b in pairs]
    cpu_seconds = [max(0.0, a.cpu_seconds / a.images - b.cpu_seconds / b.images) for a, b in pairs]
    return {
        "images_per_second": figure_of([world_size() / second for second in seconds]),
        "cpu_seconds": figure_of(cpu_seconds),
        "missing": None,
    }


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def figure_of(windows: list[float]) -> dict:
    """Median, least, largest, and all of the windows' values."""
    return {"median": statistics.median(windows), "low": min(windows), "high": max(windows), "windows": windows}


def missing(why: str) -> dict:
    """A leg that this run or this machine does not have."""
    return {"images_per_second": None, "cpu_seconds": None, "missing": why}
