"""Spans: named intervals of time in a thread.

    with span("decode"):
        ...

adds the length of the interval to the totals of this process, which the metrics of training read with `take_totals`.
Within `recorded()` each span is also collected with its thread, start and end, for a trace, and appears in traces of
torch's profiler. A span costs 3 microseconds, so there is one per batch, not one per sample.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Total(NamedTuple):
    """The sum of all spans with one name, over all threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Span(NamedTuple):
    """One interval in one thread."""

    name: str
    thread: str
    start: float  # seconds of time.perf_counter()
    end: float


_totals: dict[str, Total] = {}
_lock = threading.Lock()
_recording: list[Span] | None = None


class span:
    """Context manager that measures the time within it, under a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._profiler_mark = torch.profiler.record_function(name) if _recording is not None else None

    def __enter__(self) -> None:
        if self._profiler_mark:
            self._profiler_mark.__enter__()
        self.cpu_start = time.thread_time()
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        end = time.perf_counter()
        cpu_end = time.thread_time()
        with _lock:
            total = _totals.get(self.name, Total())
            _totals[self.name] = Total(total.seconds + end - self.start, total.cpu_seconds + cpu_end - self.cpu_start)
            if _recording is not None:
                _recording.append(Span(self.name, threading.current_thread().name, self.start, end))
        if self._profiler_mark:
            self._profiler_mark.__exit__(*error)


def take_totals() -> dict[str, Total]:
    """Return the totals by name since the last call."""
    global _totals
    with _lock:
        totals = _totals
        _totals = {}
    return totals


@contextmanager
def recorded() -> Iterator[list[Span]]:
    """Yield the list that all spans are appended to within this context, in the order of their ends."""
    global _recording
    spans: list[Span] = []
    _recording = spans
    try:
        yield spans
    finally:
        _recording = None
