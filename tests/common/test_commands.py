"""Commands in messages: what a shell does with them is what is meant."""

import shlex
import sys
from pathlib import Path

import pytest

from fastssl.common import commands
from fastssl.common.commands import command, training_command


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A Python environment with both programs, and a PATH without them."""
    for name in ("python", "fastssl", "torchrun"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    for variable in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_the_program_is_named_as_the_shell_finds_it(environment, tmp_path_factory, monkeypatch):
    assert command("doctor") == f"{environment}/fastssl doctor"
    monkeypatch.setenv("PATH", str(environment))
    assert command("doctor") == "fastssl doctor"
    other = tmp_path_factory.mktemp("other")
    (other / "fastssl").write_text("")
    (other / "fastssl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:{environment}")  # the shell finds the one of another environment
    assert command("doctor") == f"{environment}/fastssl doctor"
    (environment / "fastssl").unlink()
    assert command("doctor") == f"{environment}/python -m fastssl doctor"


@pytest.mark.parametrize("path", ["runs/a", "runs/my run", "runs/it's", "a;b $(c)"])
def test_paths_survive_the_shell(environment, path):
    assert shlex.split(training_command("--resume", Path(path)))[1:] == ["train", "--resume", path]
    assert shlex.split(command("eval", "knn", Path(path)))[1:] == ["eval", "knn", path]


def test_under_torchrun_the_command_starts_as_many_processes(environment, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("PATH", str(environment))
    train = "-m fastssl train --resume runs/a"
    assert training_command("--resume", "runs/a") == f"torchrun --nproc-per-node 8 {train}"
    assert command("eval", "knn", "runs/a") == "fastssl eval knn runs/a"
    monkeypatch.setattr(commands, "spans_hosts", lambda: True)
    assert shlex.split(training_command("--resume", "runs/a"), comments=True) == ["torchrun", "OPTIONS", *train.split()]
