"""The machine: cores and memory that this process may use."""

import os
from pathlib import Path

from fastssl.common.errors import UserError


def available_cores() -> int:
    """The cores it may use, shared evenly with the processes that torchrun started beside it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def free_memory() -> int:
    """Bytes that the page cache may grow to: the machine's, or the container's where that is less."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = 1024 * int(lines["MemAvailable"].split()[0])
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def resolve_workers(workers: int | None) -> int:
    """The number of worker processes: as asked for, else one for each core this process may use."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be 1 or more.")
    return len(os.sched_getaffinity(0)) if workers is None else workers
