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
    training()  # so that the loader is not further ahead than in the middle of an epoch
    synchronize(device)
    with recorded() as spans, torch.profiler.profile(activities=activities) as profiler:
        marks = []  # how long each took, when it began (time.perf_counter()), and its name
        for number in range(5):
            start = time.perf_counter()
            with torch.profiler.record_function(f"{CLOCK} {number}"):
                pass
            marks.append((time.perf_counter() - start, start, f"{CLOCK} {number}"))
        for _ in range(STEPS):
            training()
        synchronize(device)
    training.close()
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
    with explain_write_errors(path):
        write_atomically(path, gzip.compress(json.dumps(trace).encode(), compresslevel=6))


def _events(spans: list[Span], offset: float) -> list[dict[str, object]]:
    """Return spans as trace events. offset: microseconds from time.perf_counter() to the trace's clock."""
    # The main thread comes first, then the reader, then the decoding threads.
    names = sorted({s.thread for s in spans}, key=lambda name: (name != "MainThread", "reader" not in name, name))
    threads = {name: track for track, name in enumerate(names, 1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": PROCESS, "tid": 0, "name": "process_name", "args": {"name": "fastssl"}},
        {"ph": "M", "pid": PROCESS, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}},
    ]
    for name, track in threads.items():
        events.append({"ph": "M", "pid": PROCESS, "tid": track, "name": "thread_name", "args": {"name": name}})
    for s in spans:
        times = {"ts": s.start * 1e6 + offset, "dur": (s.end - s.start) * 1e6}
        events.append({"ph": "X", "cat": "fastssl", "pid": PROCESS, "tid": threads[s.thread], "name": s.name} | times)
    return events
