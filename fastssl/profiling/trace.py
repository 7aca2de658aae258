"""A timeline of some steps, for ui.perfetto.dev or chrome://tracing: loader threads, copies, views, step, kernels."""

import gzip
import json
import tempfile
import time
from pathlib import Path

import torch

from fastssl.common.distributed import is_main_process
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.loading.spans import Span, recorded
from fastssl.profiling.end_to_end import Training
from fastssl.profiling.timing import synchronize

STEPS = 3
CLOCK = "fastssl clock"  # the name of marks whose time is known on both clocks
PROCESS = 0  # number of the process that our threads are shown as; torch's own have the system's numbers


def write_trace(path: Path, training: Training, device: torch.device) -> None:
    """Chrome's trace format, gzipped: torch's operations and kernels, and above them our named stretches by thread.

    All processes take part in the steps, and the first one writes.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    training.start()
    training()  # whatever the loader had decoded ahead is not what a step in the middle finds
    synchronize(device)
    with recorded() as spans, torch.profiler.profile(activities=activities) as profile:
        marks = [marked(f"{CLOCK} {number}") for number in range(5)]
        for _ in range(STEPS):
            training()
        synchronize(device)
    if not is_main_process():
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(exported))
        trace = json.loads(exported.read_text())
    events = trace["traceEvents"]
    _, start, name = min(marks)  # the shortest: between its two clocks nothing came
    offset = next(event["ts"] for event in events if event.get("name") == name) - start * 1e6
    events += events_of(spans, offset)
    data = gzip.compress(json.dumps(trace).encode(), compresslevel=6)
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_bytes(data))


def marked(name: str) -> tuple[float, float, str]:
    """A mark in the trace: how long it took, and when it began, in seconds of time.perf_counter()."""
    start = time.perf_counter()
    with torch.profiler.record_function(name):
        pass
    return time.perf_counter() - start, start, name


def events_of(spans: list[Span], offset: float) -> list[dict]:
    """The stretches as events of one process with a track for each thread. offset: from perf_counter, microseconds."""
    threads = {name: number for number, name in enumerate(sorted({s.thread for s in spans}, key=_place), 1)}

    def named(kind: str, number: int, value: str) -> dict:
        return {"ph": "M", "pid": PROCESS, "tid": number, "name": kind, "args": {"name": value}}

    events = [named("process_name", 0, "fastssl"), *(named("thread_name", n, name) for name, n in threads.items())]
    events.append({"ph": "M", "pid": PROCESS, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}})
    for s in spans:
        events.append({
            "ph": "X", "cat": "fastssl", "pid": PROCESS, "tid": threads[s.thread], "name": s.name,
            "ts": s.start * 1e6 + offset, "dur": (s.end - s.start) * 1e6,
        })  # fmt: skip
    return events


def _place(thread: str) -> tuple[int, str]:
    """The main thread first, then the reader, then those that decode."""
    return (0 if thread == "MainThread" else 1 if "reader" in thread else 2), thread
