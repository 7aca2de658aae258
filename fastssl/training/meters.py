"""What training measures of itself: its speed, its waits for data, its compilations."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, cast

import torch

from fastssl.common.distributed import all_gather_values, world_size
from fastssl.loading import Batch
from fastssl.loading.spans import Total, span, take_totals

Moment = float | torch.cuda.Event  # seconds of time.perf_counter(); on a GPU, an event in its stream


class MeterReading(NamedTuple):
    """What one process has measured of its loading and training since its last reading."""

    images: int  # of this process
    seconds: float
    waited: float  # seconds in which the GPU had nothing to do; without a GPU, in which the loop waited for the loader
    spans: dict[str, Total]  # time of the loader's threads and of the loop's parts, by name


class Interval(NamedTuple):
    """What was recorded between two readings. On a GPU, `read` waits until the device has passed its end."""

    images: int  # of this process
    begin: Moment
    end: Moment
    waits: list[tuple[Moment, Moment]]  # for batches, those that `waited` does not contain yet
    waited: float
    spans: dict[str, Total]

    def read(self) -> MeterReading:
        if isinstance(self.end, torch.cuda.Event):
            self.end.synchronize()
        waited = self.waited + sum(seconds_between(asked, received) for asked, received in self.waits)
        return MeterReading(self.images, seconds_between(self.begin, self.end), waited, self.spans)


def seconds_between(first: Moment, second: Moment) -> float:
    """On a GPU, the device must have passed both."""
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return first.elapsed_time(second) / 1000
    assert isinstance(first, float) and isinstance(second, float)
    return second - first


class Meter:
    """Measures images per second and the time spent waiting for the loader, since the last reading.

    On a GPU the loop runs ahead of the device, so the times of the loop mean nothing. There, events are recorded in the
    stream: two around each wait, between which the device was idle, and one at each reading.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        take_totals()
        self._begin_at(self._now())

    def _begin_at(self, now: Moment) -> None:
        self.images = 0  # of all processes: the loop adds a global batch per step
        self.waited = 0.0
        self._waits: deque[tuple[Moment, Moment]] = deque()  # on a GPU: those that the device has not passed yet
        self._begin = now

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
        if isinstance(received, float):
            self.waited += seconds_between(asked, received)
            return
        self._waits.append((asked, received))
        while self._waits and cast(torch.cuda.Event, self._waits[0][1]).query():  # the device has passed both
            self.waited += seconds_between(*self._waits.popleft())

    def take(self) -> Interval:
        """Return what was recorded since the last call, and restart. Does not wait for the device."""
        now = self._now()
        interval = Interval(
            self.images // world_size(), self._begin, now, list(self._waits), self.waited, take_totals()
        )
        self._begin_at(now)
        return interval

    def read(self) -> MeterReading:
        """Return the reading of this process, and restart. Waits for the device."""
        return self.take().read()


def speed_metrics(reading: MeterReading, bad_samples: int, resident: bool) -> dict[str, float]:
    """Return the metrics of all processes from the reading of each: data_wait is that of the one that waits most.

    bad_samples, resident: of the loader.
    """
    own = torch.tensor([reading.waited / reading.seconds, bad_samples], dtype=torch.float64)
    data_wait_R, bad_samples_R = all_gather_values(own).unbind(1)
    speed = reading.images * world_size() / reading.seconds
    metrics = {"images_per_second": speed, "data_wait": data_wait_R.max().item()}
    # With resident data every process decodes the whole file.
    bad_samples = int(bad_samples_R.max() if resident else bad_samples_R.sum())
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
        return f"warning: {100 * data_wait:.0f} % of the time is spent waiting for data. {self.explain(reading)}"


def compile_counts() -> dict[str, int]:
    """Return what torch.compile did in this process. Each graph beyond the expected ones has cost a compilation."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    breaks = sum(sum(counters[cause].values()) for cause in ("graph_break", "unimplemented"))
    recompiled = sum(compilation.recompile_reason is not None for compilation in get_compilation_metrics())
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, "recompiled": recompiled}
