"""Cores, memory and the number of workers, with the quotas of containers and clusters."""

import os
from pathlib import Path

import pytest

from fastssl.common import system
from fastssl.common.errors import UserError


def test_cores_are_shared_by_the_processes_of_torchrun(tmp_path, monkeypatch):
    fake_cgroups(tmp_path, monkeypatch, None, {})
    assert system.available_cores() == system.resolve_workers(None) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert system.available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert system.available_cores() == 1


def test_the_number_of_workers():
    assert system.resolve_workers(5) == 5
    with pytest.raises(UserError, match="--workers must be 1 or more, got 0"):
        system.resolve_workers(0)


# --- quotas of cgroups --------------------------------------------------------------------------

NO_LIMIT_V1 = "9223372036854771712\n"
GIB = 1 << 30


def fake_cgroups(tmp_path: Path, monkeypatch, groups: str | None, files: dict[str, str]) -> None:
    """Write /proc/self/cgroup and files below /sys/fs/cgroup, on a machine with 8 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(system, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "CGROUPS", tmp_path / "cgroup")
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


V1 = "4:memory:/job/step\n2:cpu,cpuacct:/job/step\n0::/\n"
QUOTAS = {
    "a container of version 2": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "half a core": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "two and a half": ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
    "none": ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    "more than the cores": ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
    "that of a parent": ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
    "the least of all": ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2),
    "not that of others": ("0::/a\n", {"a/cpu.max": "max 100000\n", "b/cpu.max": "100000 100000\n"}, 8),
    "hybrid": ("0::/a\n", {"unified/a/cpu.max": "400000 100000\n"}, 4),
    "the path is that of the host": ("0::/docker/0123\n", {"cpu.max": "100000 100000\n"}, 1),
    "the path is above the mount": ("0::/../../job\n", {"cpu.max": "100000 100000\n"}, 1),
    "no /proc": (None, {"cpu.max": "100000 100000\n"}, 1),
    "version 1": (V1, {"cpu,cpuacct/job/step/cpu.cfs_quota_us": "150000\n",
                       "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000\n"}, 2),
    "version 1, linked name": (V1, {"cpu/job/cpu.cfs_quota_us": "300000\n",
                                    "cpu/job/cpu.cfs_period_us": "100000\n"}, 3),
    "version 1 without": (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    "damaged": ("0::/\n", {"cpu.max": "what 0\n"}, 8),
    "empty": ("", {"cpu.max": ""}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_of_cpu_time_limits_the_cores(tmp_path, monkeypatch, case):
    groups, files, expected = QUOTAS[case]
    fake_cgroups(tmp_path, monkeypatch, groups, files)
    assert system.usable_cores() == system.available_cores() == system.resolve_workers(None) == expected


def test_processes_of_torchrun_share_a_quota(tmp_path, monkeypatch):
    fake_cgroups(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "400000 100000\n"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert system.available_cores() == 2


MEMORY = {
    "a container of version 2": ("0::/\n", {"memory.max": f"{GIB}\n", "memory.current": "1000\n"}, GIB - 1000),
    "a job of version 1": (
        V1,
        {"memory/job/memory.limit_in_bytes": f"{GIB}\n", "memory/job/memory.usage_in_bytes": "4096\n",
         "memory/memory.limit_in_bytes": NO_LIMIT_V1, "memory/memory.usage_in_bytes": "5000\n"},
        GIB - 4096,
    ),
    "without the page cache": (
        "0::/a\n",
        {"a/memory.max": f"{GIB}\n", "a/memory.current": "9000\n",
         "a/memory.stat": "anon 1\ninactive_file 5000\nactive_file 1000\n"},
        GIB - 3000,
    ),
    "version 1 without the page cache": (
        V1,
        {"memory/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.usage_in_bytes": "9000\n",
         "memory/memory.stat": "inactive_file 1\nactive_file 1\ntotal_inactive_file 5000\ntotal_active_file 0\n"},
        GIB - 4000,
    ),
    "full": ("0::/\n", {"memory.max": "4096\n", "memory.current": "5000\n"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY)
def test_a_limit_of_memory_counts_if_it_is_less_than_the_machines(tmp_path, monkeypatch, case):
    groups, files, expected = MEMORY[case]
    fake_cgroups(tmp_path, monkeypatch, groups, files)
    assert system.free_memory() == expected
    assert system.total_memory() == (4096 if case == "full" else GIB)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "1000\n"}, {"memory.max": "1"}])
def test_the_memory_is_the_machines_without_a_limit(tmp_path, monkeypatch, files):
    fake_cgroups(tmp_path, monkeypatch, "0::/\n", files)
    assert 1e6 < system.free_memory() < system.total_memory()


@pytest.mark.parametrize(
    "cpuinfo, has_bf16",
    [
        ("model name\t: A\nflags\t\t: fpu avx512f avx512_bf16 sse2\n", True),
        ("model name\t: A\nflags\t\t: fpu amx_tile amx_bf16\n", True),
        ("model name\t: avx512_bf16\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n", False),
        (None, False),
    ],
)
def test_whether_the_cpu_has_bf16(tmp_path, monkeypatch, cpuinfo, has_bf16):
    monkeypatch.setattr(system, "PROC", tmp_path)
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert system.cpu_has_bf16() is has_bf16


def test_the_name_of_the_cpu(monkeypatch):
    assert system.cpu_name()

    def refused(path):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refused)
    assert system.cpu_name() == "cpu"
