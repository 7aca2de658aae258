"""The machine: its CPU, and the cores and the memory that this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastssl.common.errors import UserError

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
MOST_MAPPINGS = 65_530  # Linux's default of vm.max_map_count
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # of /proc/cpuinfo: the instructions that oneDNN uses for products in bf16


def cpu_name() -> str:
    """Return the model name of the CPU, "cpu" where the system does not tell."""
    return next((line.split(": ", 1)[1] for line in _cpu_info() if line.startswith("model name")), "cpu")


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 numbers itself. torch also runs bf16 on others: it converts to fp32."""
    flags = {flag for line in _cpu_info() if line.startswith("flags") for flag in line.split()}
    return not flags.isdisjoint(BF16_FLAGS)


def usable_cores() -> int:
    """Return the cores that this process may use: its set of cores, or its cgroups' quota of CPU time if that is less.

    Containers and clusters limit the time by a quota (docker --cpus=2): the process still sees all cores.
    """
    return min([len(os.sched_getaffinity(0)), *_cpu_quotas()])


def available_cores() -> int:
    """Return the cores that this process may use: its share where torchrun started several on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def resolve_workers(workers: int | None) -> int:
    """Return the number of worker processes: `workers`, or one for each available core if it is None."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be 1 or more, got {workers}", hint="leave out --workers to use all cores")
    return available_cores() if workers is None else workers


def total_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its cgroup's limit if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Return the bytes that the page cache may grow to: the machine's, or what its cgroups leave if that is less."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = 1024 * int(lines["MemAvailable"].split()[0])
    return max(0, min([free, *(limit - used for limit, used in _memory_limits())]))


def most_mappings() -> int:
    """Return how many ranges of addresses Linux lets a process have: the sysctl vm.max_map_count."""
    words = _read(PROC / "sys/vm/max_map_count")
    return int(words[0]) if words and words[0].isdecimal() else MOST_MAPPINGS


def used_mappings() -> int:
    """Return how many ranges of addresses this process has; 0 where the system does not tell."""
    try:
        with open(PROC / "self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _cpu_info() -> list[str]:
    try:
        return (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _cpu_quotas() -> Iterator[int]:
    """Yield the quotas of CPU time, in cores, rounded up, of this process's cgroup and of those above it."""
    for folder in _cgroups("cpu"):
        if v2 := _read(folder / "cpu.max"):
            quota, period = v2[0], v2[-1]
        else:
            quota = "".join(_read(folder / "cpu.cfs_quota_us"))
            period = "".join(_read(folder / "cpu.cfs_period_us"))
        # "max" and -1 mean that there is no quota.
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield max(1, math.ceil(int(quota) / int(period)))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes used) of this process's cgroup and of those above it, as far as they have a limit."""
    for folder in _cgroups("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit or not limit[0].isdecimal() or not used:
            continue
        # The kernel counts the page cache as used, but frees it when there is need.
        words = _read(folder / "memory.stat")
        stat = dict(zip(words[::2], words[1::2]))
        v1 = "total_" if "total_inactive_file" in stat else ""
        cached = sum(int(stat.get(f"{v1}{name}", 0)) for name in ("inactive_file", "active_file"))
        yield int(limit[0]), max(0, int(used[0]) - cached)


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of those above it, in versions 1 and 2, as far as they exist."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    # The files may belong to the root of the mounted tree even where the process is told of no group.
    for line in [*lines, "0::/", f"0:{controller}:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [CGROUPS / controllers, CGROUPS / controller] if controllers else [CGROUPS, CGROUPS / "unified"]
        # In a container the path may be that of the host, outside of what is mounted: then only the root exists.
        group = PurePosixPath(path.replace("..", "").strip("/"))
        for mount in mounts:
            for folder in (group, *group.parents):
                if (mount / folder).is_dir():
                    yield mount / folder


def _read(path: Path) -> list[str]:
    """Return the words of a file; none if it cannot be read."""
    try:
        return path.read_text().split()
    except (OSError, ValueError):
        return []
