"""Named stretches of time in every thread: what the meters of training read, and what a timeline is drawn of.

    with stretch("decode"):
        ...

adds to the totals of this process. Within `recorded()`, each stretch is kept too, with its thread and its time, and
stands in the traces of torch's profiler. One stretch costs 3 microseconds, so they are a batch long, not a sample.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Total(NamedTuple):
    """Of all stretches of one name, over all threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Span(NamedTuple):
    name: str
    thread: str
    start: float  # seconds of time.perf_counter()
    end: float


_totals: dict[str, Total] = {}
_lock = threading.Lock()
_recording: list[Span] | None = None


class span:
    """A context manager around what is to be known by `name`."""

    def __init__(self, name: str):
        self.name = name
        self._mark = torch.profiler.record_function(name) if _recording is not None else None

    def __enter__(self) -> None:
        if self._mark:
            self._mark.__enter__()
        self.cpu_start, self.start = time.thread_time(), time.perf_counter()

    def __exit__(self, *error) -> None:
        end, cpu_end = time.perf_counter(), time.thread_time()
        with _lock:
            seconds, cpu_seconds = _totals.get(self.name, Total())
            _totals[self.name] = Total(seconds + end - self.start, cpu_seconds + cpu_end - self.cpu_start)
            if _recording is not None:
                _recording.append(Span(self.name, threading.current_thread().name, self.start, end))
        if self._mark:
            self._mark.__exit__(*error)


def take_totals() -> dict[str, Total]:
    """By name, since the last time that somebody asked."""
    global _totals
    with _lock:
        totals, _totals = _totals, {}
    return totals


@contextmanager
def recorded() -> Iterator[list[Span]]:
    """The list that all stretches go into while this lasts, in the order of their ends."""
    global _recording
    _recording = spans = []
    try:
        yield spans
    finally:
        _recording = None
