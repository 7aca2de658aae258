"""What training measures of itself: its speed, its waits for data, its compilations."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import torch

from fastssl.common.distributed import all_gather_values, world_size
from fastssl.loading import Batch, BetonLoader
from fastssl.loading.spans import Total, span, take_totals

Moment = float | torch.cuda.Event  # seconds of time.perf_counter(); on a GPU, an event in its stream


class MeterReading(NamedTuple):
    """What one process has measured of its loading and training since its last reading."""

    images: int  # of this process
    seconds: float
    waited: float  # seconds in which the GPU had nothing to do; without a GPU, in which the loop waited for the loader
    spans: dict[str, Total]  # time of the loader's threads and of the loop's parts, by name


class Meter:
    """Measures images per second and the time spent waiting for the loader, since the last reading.

    On a GPU the loop runs ahead of the device, so the time that the loop waits means nothing. There, two events are
    recorded in the stream around each wait, and the device was idle for the time between them. Only `read` waits for
    the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.images = 0  # of all processes: the loop adds a global batch per step
        self.waited = 0.0
        self.since = time.perf_counter()
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not yet reached by the device
        take_totals()

    def watch(self, loader: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Yield the loader's batches. The time spent in the loader counts as waiting."""
        batches = iter(loader)
        while True:
            with span("wait for data"):
                asked = self._now()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self._count_wait(asked, self._now())
            yield batch

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count_wait(self, asked: Moment, received: Moment) -> None:
        if isinstance(asked, torch.cuda.Event) and isinstance(received, torch.cuda.Event):
            self._waits.append((asked, received))
            while self._waits and self._waits[0][1].query():  # the device has passed both events
                first, second = self._waits.popleft()
                self.waited += first.elapsed_time(second) / 1000
        elif isinstance(asked, float) and isinstance(received, float):
            self.waited += received - asked

    def read(self) -> MeterReading:
        """Return the reading of this process, and restart. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.waited += sum(asked.elapsed_time(received) for asked, received in self._waits) / 1000
        seconds = time.perf_counter() - self.since
        reading = MeterReading(self.images // world_size(), seconds, self.waited, take_totals())
        self.restart()
        return reading


def speed_metrics(reading: MeterReading, loader: BetonLoader) -> dict[str, float]:
    """Return the metrics of all processes from the reading of each: data_wait is that of the one that waits most."""
    own = torch.tensor([reading.waited / reading.seconds, loader.bad_samples], dtype=torch.float64)
    data_wait_R, bad_samples_R = all_gather_values(own).unbind(1)
    speed = reading.images * world_size() / reading.seconds
    metrics = {"images_per_second": speed, "data_wait": data_wait_R.max().item()}
    # With resident data every process decodes the whole file.
    bad_samples = int(bad_samples_R.max() if loader.resident else bad_samples_R.sum())
    return metrics | ({"bad_samples": bad_samples} if bad_samples else {})


class DataWaitWarning:
    """Warns once per run that training waits for data, after several readings in a row with a long wait."""

    SHARE = 0.1  # of the time: what counts as a long wait
    READINGS = 3
    SECONDS = 20.0  # of these readings together, so that the start of a run gives no warning

    def __init__(self, explain: Callable[[MeterReading], str]):
        """explain: returns the sentence with the cause, from the reading of this process."""
        self.explain = explain
        self.readings = 0
        self.seconds = 0.0
        self.given = False

    def check(self, data_wait: float, reading: MeterReading) -> str | None:
        """Return the warning if it is due now. data_wait: the share of the time since the last reading."""
        if data_wait <= self.SHARE:
            self.readings = 0
            self.seconds = 0.0
            return None
        self.readings += 1
        self.seconds += reading.seconds
        if self.given or self.readings < self.READINGS or self.seconds < self.SECONDS:
            return None
        self.given = True
        return f"Warning: {data_wait:.0%} of the time is spent waiting for data. {self.explain(reading)}"


def compile_counts() -> dict[str, int]:
    """Return what torch.compile did in this process. Each graph beyond the expected ones has cost a compilation."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    breaks = sum(sum(counters[cause].values()) for cause in ("graph_break", "unimplemented"))
    recompiled = sum(compilation.recompile_reason is not None for compilation in get_compilation_metrics())
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, "recompiled": recompiled}
