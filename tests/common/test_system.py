"""Cores, memory and the number of workers."""

import os
from pathlib import Path

import pytest

from fastssl.common import system
from fastssl.common.errors import UserError


def test_cores_are_shared_by_the_processes_of_torchrun(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert system.available_cores() == system.resolve_workers(None) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert system.available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert system.available_cores() == 1


def test_the_number_of_workers():
    assert system.resolve_workers(5) == 5
    with pytest.raises(UserError, match="--workers is 0"):
        system.resolve_workers(0)


def test_free_memory_is_that_of_the_container_if_it_is_less(monkeypatch):
    everywhere = system.free_memory()
    assert 0 < everywhere < system.total_memory()
    limits = {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: limits[str(path)])
    assert system.free_memory() > 1e6
    limits["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert system.free_memory() == 4000


def test_the_name_of_the_cpu(monkeypatch):
    assert system.cpu_name()

    def refused(path):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refused)
    assert system.cpu_name() == "cpu"
