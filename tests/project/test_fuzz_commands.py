"""The fuzz of the commands: some cases of each kind, and that it finds the faults that it looks for."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz_commands():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("fuzz_commands")


@pytest.fixture(scope="module")
def base(fuzz_commands, canvas, canvas_jpeg, canvas_bc4, full, tmp_path_factory):
    """What the cases start from, with the data sets of the other tests."""
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    folder.mkdir()
    for name, data in {"raw": canvas, "jpeg": canvas_jpeg, "bc4": canvas_bc4, "full": full}.items():
        (folder / name).symlink_to(data)
    fuzz_commands.train_base(folder)
    return folder


def fuzz_for(seconds, fuzz_commands, base, seed):
    tallies = fuzz_commands.fuzz(base, list(fuzz_commands.KINDS), seed, minutes=seconds / 60)
    assert sum(tally.failures for tally in tallies.values()) == 0, fuzz_commands.report(tallies)
    return tallies


def test_five_seconds_of_hostile_files(fuzz_commands, base):
    """records/robustness.md has ten minutes."""
    assert set(fuzz_for(5, fuzz_commands, base, seed=1)) == set(fuzz_commands.KINDS)


@pytest.mark.slow
def test_a_minute_of_hostile_files(fuzz_commands, base):
    tallies = fuzz_for(60, fuzz_commands, base, seed=2)
    for tally in tallies.values():
        assert tally.cases >= 5 and tally.codes[2], "no file of this kind was refused"


def run_with(monkeypatch, fuzz_commands, base, tmp_path, main):
    """The failures of a case whose command does `main()`."""
    monkeypatch.setattr(fuzz_commands.cli, "main", main)
    tmp_path.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    outcome = fuzz_commands.run_case(tmp_path / "root", base, "run", 0, 0)
    return [what for what, _ in outcome.failures]


def end(code, text=""):
    def main():
        print(text, file=sys.stderr)
        sys.exit(code)

    return main


def change(path, then=lambda path: path.write_text("changed")):
    def main():
        then(Path(path))
        raise SystemExit(0)

    return main


def fail():
    raise KeyError("step")


FAULTS = {
    "traceback": fail,
    "exit code": end(1, "error: something"),
    "message": end(2, "error: two\nlines"),
    "message, escape sequence": end(2, "error: \x1b[2J"),
    "message, none": end(2),
    "message, too long": end(2, "error: " + "x" * 2000),
    "touched": change("../outside/precious.txt"),
    "touched, removed": change("../outside/folder/last.pt", Path.unlink),
    "touched, new": change("../outside/new"),
    "touched, of the user": change("run/notes.txt"),
    "touched, part of the user": change("run/.film.mp4.part", Path.unlink),
    "leftover": change(f"run/.last.pt.{os.getpid()}.part.pt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzz_finds(fault, fuzz_commands, base, tmp_path, monkeypatch):
    assert run_with(monkeypatch, fuzz_commands, base, tmp_path, FAULTS[fault]) == [fault.partition(",")[0]]


def test_the_fuzz_finds_nothing_where_nothing_is_wrong(fuzz_commands, base, tmp_path, monkeypatch):
    assert run_with(monkeypatch, fuzz_commands, base, tmp_path, end(0)) == []
    assert (
        run_with(monkeypatch, fuzz_commands, base, tmp_path / "two", end(2, "error: x is missing\nhint: make it")) == []
    )


def ends_itself(connection, base):
    connection.recv()  # the case with which the fuzz waits for the imports
    connection.send(None)
    connection.recv()
    os._exit(0)


def is_killed(connection, base):
    connection.recv()
    connection.send(None)
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(connection, base):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.recv()
    connection.send(None)
    connection.recv()
    time.sleep(1000)


@pytest.mark.parametrize("target, what", [(ends_itself, "crash"), (is_killed, "crash"), (hangs, "hang")])
def test_the_fuzz_finds_dead_and_endless_processes(target, what, fuzz_commands, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_commands, "HANG", 1)
    process = fuzz_commands.Child(target, tmp_path)
    for _ in range(2):  # the next case has a new process
        outcome = process.run(tmp_path, "run", 0, 0)
        assert [failure for failure, _ in outcome.failures] == [what]
