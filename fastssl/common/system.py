"""The machine: its CPU, and the cores and the memory that this process may use."""

import os
from pathlib import Path

from fastssl.common.errors import UserError


def cpu_name() -> str:
    """Return the model name of the CPU, "cpu" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "cpu")


def available_cores() -> int:
    """Return the cores that this process may use: its share where torchrun started several on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def resolve_workers(workers: int | None) -> int:
    """Return the number of worker processes: `workers`, or one for each available core if it is None."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be 1 or more.")
    return available_cores() if workers is None else workers


def total_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Return the bytes that the page cache may grow to: the machine's, or the container's where that is less."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = 1024 * int(lines["MemAvailable"].split()[0])
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
