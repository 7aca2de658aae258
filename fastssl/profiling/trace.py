"""A trace of a few steps, for ui.perfetto.dev or chrome://tracing: loader threads, copies, views, steps, kernels."""

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
CLOCK = "fastssl clock"  # name of the marks that align our clock with the profiler's
PROCESS = 0  # the process id under which our spans are shown; torch's events have the system's ids


def write_trace(path: Path, training: Training, device: torch.device) -> None:
    """Write a gzipped Chrome trace: torch's operations and kernels, and above them our named spans by thread.

    All processes take part in the steps, and the main process writes.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    training.start()
    training()  # so that the loader is not further ahead than in the middle of an epoch
    synchronize(device)
    with recorded() as spans, torch.profiler.profile(activities=activities) as profiler:
        marks = [_mark(f"{CLOCK} {number}") for number in range(5)]
        for _ in range(STEPS):
            training()
        synchronize(device)
    if not is_main_process():
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        trace = json.loads(exported.read_text())
    events = trace["traceEvents"]
    # In the shortest mark, the thread was not interrupted between the two clocks.
    _, start, name = min(marks)
    offset = next(event["ts"] for event in events if event.get("name") == name) - start * 1e6
    events += _events(spans, offset)
    data = gzip.compress(json.dumps(trace).encode(), compresslevel=6)
    with explain_write_errors(path):
        write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _mark(name: str) -> tuple[float, float, str]:
    """Put a mark into the trace. Returns how long it took, when it began (time.perf_counter()), and its name."""
    start = time.perf_counter()
    with torch.profiler.record_function(name):
        pass
    return time.perf_counter() - start, start, name


def _events(spans: list[Span], offset: float) -> list[dict[str, object]]:
    """Return spans as trace events of one process, with a track for each thread.

    offset: microseconds from time.perf_counter() to the trace's clock.
    """
    threads = {name: track for track, name in enumerate(sorted({s.thread for s in spans}, key=_thread_order), 1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": PROCESS, "tid": 0, "name": "process_name", "args": {"name": "fastssl"}},
        {"ph": "M", "pid": PROCESS, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}},
    ]
    for name, track in threads.items():
        events.append({"ph": "M", "pid": PROCESS, "tid": track, "name": "thread_name", "args": {"name": name}})
    for s in spans:
        events.append({
            "ph": "X", "cat": "fastssl", "pid": PROCESS, "tid": threads[s.thread], "name": s.name,
            "ts": s.start * 1e6 + offset, "dur": (s.end - s.start) * 1e6,
        })  # fmt: skip
    return events


def _thread_order(name: str) -> tuple[int, str]:
    """Sort the main thread first, then the reader, then the decoding threads."""
    if name == "MainThread":
        return 0, name
    return (1, name) if "reader" in name else (2, name)
