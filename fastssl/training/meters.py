"""What training measures of itself: its speed, its waiting for data, its compilations."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from fastssl.common.distributed import all_gather_values, world_size
from fastssl.loading import BetonLoader
from fastssl.loading.spans import Total, span, take_totals


class Observed(NamedTuple):
    """What one process has seen of its own loading and training since the last reading."""

    images: int  # of this process
    seconds: float
    waited: float  # seconds of them in which the device had nothing to do, or without one the loop
    spans: dict[str, Total]  # of the loader's threads and the loop's parts, by name


class Meter:
    """Images per second and the share of time spent waiting for the loader, since the last reading.

    On a GPU the loop is ahead of the device, so its own waiting says nothing; there two events stand in the stream
    around each wait, and the device was idle for the time between them. Nothing is waited for, but for `read`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()
        self._waits: deque = deque()  # pairs of events that the device may not have reached
        take_totals()

    def watch(self, loader: Iterable) -> Iterator:
        """The loader's batches; the time inside the loader counts as waiting."""
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

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count_wait(self, asked, received) -> None:
        if self.device.type != "cuda":
            self.waited += received - asked
            return
        self._waits.append((asked, received))
        while self._waits and self._waits[0][1].query():  # the device is behind it
            asked, received = self._waits.popleft()
            self.waited += asked.elapsed_time(received) / 1000

    def observe(self) -> Observed:
        """Of this process, since the last reading. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.waited += sum(asked.elapsed_time(received) for asked, received in self._waits) / 1000
        seconds = time.perf_counter() - self.since
        observed = Observed(self.images // world_size(), seconds, self.waited, take_totals())
        self.restart()
        return observed

    def read(self, loader: BetonLoader) -> tuple[dict[str, float], Observed]:
        """The figures over all processes, the one that waits most for all; and what this one has observed."""
        observed = self.observe()
        mine = torch.tensor([observed.waited / observed.seconds, loader.bad_samples], dtype=torch.float64)
        per_microbatch = all_gather_values(mine)
        speed = observed.images * world_size() / observed.seconds
        figures = {"images_per_second": speed, "data_wait": per_microbatch[:, 0].max().item()}
        bad = per_microbatch[:, 1]
        if bad_samples := int(bad.max() if loader.resident else bad.sum()):  # resident: each decodes the whole file
            figures["bad_samples"] = bad_samples
        return figures, observed


class LongWait:
    """Says once that training waits for data, and why: when it has for several readings and some time."""

    SHARE, READINGS, SECONDS = 0.1, 3, 20.0

    def __init__(self, diagnose: Callable[[Observed], str]):
        self.diagnose = diagnose
        self.readings, self.seconds, self.said = 0, 0.0, False  # in a row with a long wait

    def look(self, data_wait: float, observed: Observed) -> str | None:
        """data_wait: over all processes, since the last reading."""
        if data_wait <= self.SHARE:
            self.readings, self.seconds = 0, 0.0
            return None
        self.readings, self.seconds = self.readings + 1, self.seconds + observed.seconds
        if self.said or self.readings < self.READINGS or self.seconds < self.SECONDS:
            return None
        self.said = True
        return f"Warning: {data_wait:.0%} of the time is spent waiting for data. {self.diagnose(observed)}"


def compile_counts() -> dict[str, int]:
    """What torch.compile has made in this process: each graph beyond the expected ones cost a compilation."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    breaks = sum(sum(counters[cause].values()) for cause in ("graph_break", "unimplemented"))
    recompiled = sum(compilation.recompile_reason is not None for compilation in get_compilation_metrics())
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, "recompiled": recompiled}
