"""A clock that goes backwards, as after a user changed it, a reboot without a battery or a copy to other disks."""

import datetime
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import small

from fastssl.common import terminal
from fastssl.common.terminal import progress
from fastssl.training import run_dir

YEAR = 365 * 24 * 3600


class BackwardsDatetime(datetime.datetime):
    """Each call of now() is a year before the last one."""

    years = itertools.count()

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2026, 1, 1, tzinfo=tz) - datetime.timedelta(days=365 * next(cls.years))


@pytest.fixture
def backwards(monkeypatch):
    """time.time() goes back by a year with every call, and so do the dates that runs record."""
    years, now = itertools.count(), time.time()
    monkeypatch.setattr(time, "time", lambda: now - YEAR * next(years))
    monkeypatch.setattr(run_dir, "datetime", BackwardsDatetime)


def set_times(folder: Path, moment: float) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (moment, moment), follow_symlinks=False)


@pytest.mark.parametrize("moment", [4e9, 0, -1e9], ids=["in the future", "1970", "before 1970"])
def test_runs_and_evaluations_go_on_whatever_the_time_is(canvas, tmp_path, fastssl, backwards, moment):
    data = tmp_path / "data"
    shutil.copytree(canvas, data)
    set_times(data, moment)
    run, straight = tmp_path / "run", tmp_path / "straight"
    overrides = ["probe.every=1", "checkpoint.every=2"]
    for directory, epochs in ((run, 1), (straight, 2)):
        code, _, err = fastssl(
            "train", "recipes/barlow.yaml", *small(data, directory, *overrides, f"train.epochs={epochs}")
        )
        assert code == 0, err
    set_times(run, moment)
    code, out, err = fastssl("train", "--resume", run, "train.epochs=2")
    assert code == 0 and "Resuming barlow after step 3" in out, err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert load_file(run / "encoder.safetensors").keys() == load_file(straight / "encoder.safetensors").keys()
    assert len(json.loads((run / "environment.json").read_text())["earlier"]) == 1
    for _ in range(2):  # the second one with the features that the first one has stored
        code, out, err = fastssl("eval", "knn", run, "--k", "3")
        assert code == 0, err
        set_times(run, moment)
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert saved["step"] == 6 and saved["seconds"] > 0


def test_a_build_goes_on_whatever_the_time_of_its_images(photos, tmp_path, fastssl, backwards):
    images, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, images)
    built = []
    for moment in (4e9, 0, -1e9):
        set_times(images, moment)
        code, _, err = fastssl(
            "build-beton", "imagefolder", "--source", images, "--out", out, "--canvas", "32", "--workers", "1"
        )
        assert code == 0, err
        built.append((out / "train.beton").read_bytes())
        code, _, err = fastssl("inspect", out / "train.beton", "--verify")
        assert code == 0, err
    assert built[0] == built[1] == built[2]


def test_progress_on_a_clock_that_stands_still(capsys, monkeypatch):
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(terminal, "SHORT", 0.0)
    with progress("encoding", 3) as advance:
        advance(0)
        advance(1, size_B=1000)
        advance(2)
    assert "encoding: 3 images in under 1 s" in capsys.readouterr().err
