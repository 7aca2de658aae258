"""A run directory may hold other people's files, or come from somebody else: nothing outside the run is touched."""

import os
import subprocess
import sys

import pytest
import torch
from training_runs import FORKS, small

from fastssl import cli
from fastssl.common.errors import UserError
from fastssl.recipe import load_recipe
from fastssl.training import train
from fastssl.training.run_dir import WRITTEN, choose_run_dir, locked_run_dir


def recipe_in(path):
    return load_recipe("recipes/barlow.yaml", ["data.train=gone.beton", f"run.dir={path}"])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_of_the_user_in_a_run_directory_stay(tmp_path):
    """Once every `.*.part*` was deleted, in the directory and in checkpoints/."""
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        for name in (".thesis.part", ".video.mp4.part", ".download.part3", ".archive.1.partial", "notes.txt"):
            (folder / name).write_text("of the user")
    before = contents(tmp_path)
    with locked_run_dir(tmp_path):
        assert before.items() <= contents(tmp_path).items()
    assert before.items() <= contents(tmp_path).items()


RUN_MARKS = ("recipe.yaml", "checkpoints/last.pt", "checkpoints/previous.pt")  # `auto` continues what has one
OVERWRITTEN = [*WRITTEN, *RUN_MARKS[1:], "checkpoints/mine.pt"]


@pytest.mark.parametrize(
    "name, resume",
    [(name, None) for name in OVERWRITTEN] + [(name, "auto") for name in OVERWRITTEN if name not in RUN_MARKS],
)
def test_a_new_run_overwrites_no_file(tmp_path, name, resume):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of the user")
    with pytest.raises(UserError, match="already holds a run|is in the way of a new run"):
        choose_run_dir(recipe_in(tmp_path), resume, restarted=False)


def test_a_run_killed_before_its_first_file_starts_over(tmp_path):
    with locked_run_dir(tmp_path / "run"):
        pass
    assert not choose_run_dir(recipe_in(tmp_path / "run"), None, restarted=False).resumes


def test_a_lock_file_of_another_program_is_not_truncated(tmp_path):
    for text in ("a lock of mine\n", "x" * 5000):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(UserError, match=r"\.lock is a file of another program"):
            with locked_run_dir(tmp_path):
                pass
        assert (tmp_path / ".lock").read_text() == text


KINDS = ("symbolic link", "broken link", "hard link", "named pipe")
LINKED = [(name, kind) for name in (".lock", "metrics.jsonl") for kind in KINDS]
LINKED += [("checkpoints", kind) for kind in KINDS[:2]]


@pytest.mark.parametrize("name, kind", LINKED)
def test_nothing_outside_a_run_directory_is_written(canvas, tmp_path, name, kind):
    """A run that came in an archive: `.lock` was opened through a link, and the file that it led to was truncated."""
    outside = tmp_path / "outside"
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if name == "checkpoints":
        outside.mkdir()
    else:
        outside.write_text("precious")
    if kind == "symbolic link":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "not there")
    elif kind == "hard link":
        os.link(outside, path)
    else:
        os.mkfifo(path)
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1", "probe.every=0"))
    expected = "is in the way of a new run" if name == "metrics.jsonl" else f"{name} is a .*remove it, or use another"
    with pytest.raises(UserError, match=expected):
        train(recipe)
    assert not (tmp_path / "not there").exists()
    assert outside.read_text() == "precious" if outside.is_file() else not list(outside.iterdir())


@pytest.fixture(scope="module")
def finished(canvas, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train(load_recipe("recipes/barlow.yaml", small(canvas, run, "train.epochs=1", "probe.every=0")))
    return run


def resume(run, stderr):
    torch.set_num_threads(1)
    sys.argv = ["fastssl", "train", "--resume", str(run)]
    with open(stderr, "w") as sys.stderr:
        cli.main()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "recipe.yaml", "environment.json", "checkpoints/last.pt"])
def test_named_pipes_in_a_run_that_goes_on_do_not_hang(finished, tmp_path, name):
    """In a process of its own, as some of these waits outlived SIGTERM."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    (run / name).unlink()
    os.mkfifo(run / name)
    process = FORKS.Process(target=resume, args=(run, tmp_path / "stderr"))
    process.start()
    process.join(60)
    is_running = process.is_alive()
    process.kill()
    assert not is_running
    stderr = (tmp_path / "stderr").read_text()
    assert "Traceback" not in stderr
    if name in ("environment.json", "checkpoints/last.pt"):  # what they hold is written again, and previous.pt is read
        assert process.exitcode == 0, stderr
    else:
        assert (
            process.exitcode == 2
            and name in stderr
            and [line.split(": ")[0] for line in stderr.splitlines()] == ["error", "hint"]
        ), stderr
