"""metrics.jsonl, environment.json and the other records of a run directory from elsewhere: odd lines are left out."""

import json
import math
import os
import shutil
import sys
import types

import pytest
from training_runs import losses_of, metrics_of, small

from fastssl.common.errors import UserError
from fastssl.common.files import LARGEST_LOG, LONGEST_LINE, UnsafeFile, read_lines
from fastssl.common.slurm import read_jobs
from fastssl.export.source import last_probe
from fastssl.recipe import load_recipe
from fastssl.sweep.grid import SweepRun
from fastssl.sweep.progress import last_knn, read_progress
from fastssl.training import train
from fastssl.training.tracking import parse_metrics

ODD_LINES = [
    "", "null", "7", "[1]", '"step"', "{", '{"step": 1', '{"step": 1.0, "loss": 1}', '{"step": true, "loss": 1}',
    '{"step": -1, "loss": 1}', '{"step": "1", "loss": 1}', '{"step": NaN, "loss": 1}', '{"step": 1e400, "loss": 1}',
    '{"step": ' + "9" * 400 + ', "loss": 1}', '{"step": ' + "9" * 5000 + ', "loss": 1}', '{"loss": 1}', "[" * 10**5,
    '{"step":' * 10**4, '{"a": {"step": 1}}', "\x00", "\ud800", "x" * (LONGEST_LINE + 10),
]  # fmt: skip
ODD_VALUES = {
    "a": math.nan, "b": math.inf, "c": 10**400, "d": "1", "e": True, "f": [1], "g": {"x": 1}, "h": -math.inf,
    "knn": "x",
}  # fmt: skip


def write_lines(path, lines):
    path.write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))


def test_odd_lines_and_values_are_skipped():
    assert list(parse_metrics(ODD_LINES)) == []
    (entry,) = parse_metrics([json.dumps({"step": 3, "loss": None, "ok": 1.5, **ODD_VALUES})])
    assert entry == {"step": 3, "loss": None, "ok": 1.5}


def test_lines_are_read_one_by_one_and_long_ones_are_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    long = b"y" * (3 * LONGEST_LINE)
    for content, lines in (
        (b"", []), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\r\n\nb", ["a", "", "b"]), (b"\xff\n", ["\ufffd"]),
        (b"a\n" + long + b"\nb\n", ["a", "b"]), (long, []), (b"a\n" + long, ["a"]),
        (b"z" * (LONGEST_LINE - 1) + b"\nb", ["z" * (LONGEST_LINE - 1), "b"]),
        (b"z" * LONGEST_LINE + b"\nb", ["b"]),
    ):  # fmt: skip
        path.write_bytes(content)
        assert list(read_lines(path)) == lines, content[:20]
    with open(path, "wb") as file:
        file.write(b"a\n")
        file.truncate(1 << 30)
    assert list(read_lines(path)) == ["a"]  # a line of 1 GB
    os.truncate(path, LARGEST_LOG + 1)
    with pytest.raises(UnsafeFile, match="larger than"):
        list(read_lines(path))


@pytest.fixture(scope="module")
def half(canvas, tmp_path_factory):
    """A run of one epoch, to be extended."""
    return train(
        load_recipe("recipes/barlow.yaml", small(canvas, tmp_path_factory.mktemp("half") / "run", "train.epochs=1"))
    )


@pytest.fixture
def run(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def resumed(run, *keys):
    recipe = load_recipe(str(run / "recipe.yaml"), ["train.epochs=2", f"run.dir={run}", *keys])
    return train(recipe, resume=run)


def test_a_run_goes_on_and_is_shown_among_odd_lines(run):
    good = (run / "metrics.jsonl").read_text().splitlines()
    probe = json.dumps({"step": 3, "epoch": 0, "knn": 0.5, **{k: v for k, v in ODD_VALUES.items() if k != "knn"}})
    future = json.dumps({"step": 2**50, "loss": 1.0})
    write_lines(run / "metrics.jsonl", [good[2], *ODD_LINES, good[1], good[0], probe, future])
    sweep_run = SweepRun("x", "x", {}, load_recipe(str(run / "recipe.yaml"), [f"run.dir={run}"]))
    assert last_knn(sweep_run) == 0.5 and read_progress(sweep_run).step == 2**50
    assert last_probe(run / "metrics.jsonl", 3) == {"step": 3, "epoch": 0, "knn": 0.5}
    resumed(run)
    assert sorted(step for step, _ in losses_of(run)) == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(line, dict) for line in metrics_of(run))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b"7", b'{"earlier": 3}', b'{"earlier": "abc"}', b'{"earlier": [1, 2]}',
        b'{"earlier": {"a": 1}}', b"[" * 10**6, b'{"a": ' * 10**4, b"\xff\xfe", b'{"earlier": null}',
        b'{"x": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_an_odd_environment_is_left_out(run, content):
    (run / "environment.json").write_bytes(content)
    resumed(run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["earlier"] == [] and environment["step"] == 3


def test_a_metrics_file_that_is_too_large_is_one_sentence(run):
    os.truncate(run / "metrics.jsonl", LARGEST_LOG + 1)
    with pytest.raises(UserError, match="metrics.jsonl is larger than"):
        resumed(run)
    assert (run / "metrics.jsonl").stat().st_size == LARGEST_LOG + 1


@pytest.mark.parametrize("content", ["", "../x", "a b", "\x1b[2J", "x" * 1000, "a\nb"])
def test_an_odd_id_of_a_tracker_is_one_sentence(run, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=None))
    (run / "wandb_id.txt").write_text(content)
    with pytest.raises(UserError, match="wandb_id.txt holds no id of a W&B run: remove it"):
        resumed(run, "log.to=[wandb]")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 3}', b'{"a": null}', b"[" * 10**6, b"\xff"])
def test_an_odd_list_of_jobs_is_one_sentence(tmp_path, content):
    path = tmp_path / "jobs.json"
    assert read_jobs(path) == {}
    path.write_bytes(b'{"a": "17_3"}')
    assert read_jobs(path) == {"a": "17_3"}
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"jobs.json cannot be read, .* remove it when none is\.$"):
        read_jobs(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_jobs(path)
