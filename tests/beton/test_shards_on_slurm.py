"""Shards that a SLURM job array builds: with a fake SLURM, and with submitit's local executor."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastssl.beton import BuildOptions, build_beton
from fastssl.beton.partial_build import partial_folder
from fastssl.beton.shards import Shard, shard_path
from fastssl.beton.slurm import ShardJob, submit_build
from fastssl.common.errors import UserError


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def submitted_ids(out: Path) -> dict[str, str]:
    ids = json.loads((out / "slurm/jobs.json").read_text())
    assert len({name.partition(", build ")[2] for name in ids}) == 1
    return {name.partition(",")[0]: job_id for name, job_id in ids.items()}


@pytest.fixture
def command(photos, tmp_path, fastssl):
    """Run build-beton on 61 photographs in three shards."""

    def run(*options):
        shards = ("--canvas", 32, "--shards", 3, "--workers", 1)
        return fastssl("build-beton", "imagefolder", "--source", photos, "--out", tmp_path / "out", *shards, *options)

    return run


def test_missing_shards_are_submitted_once_and_the_state_is_shown(command, photos, tmp_path, slurm_commands):
    pytest.importorskip("submitit")
    out, script, queue = tmp_path / "out", slurm_commands / "script", slurm_commands / "queue"
    slurm = ("--executor", "slurm", "--parallel", 2, "--cpus", 6, "--time-limit", "4:30", "--partition", "cpu")
    code, said, _ = command(*slurm)
    assert code == 0 and "0 of 3 shards are complete, 0 were queued or running already, 3 are submitted now." in said
    assert "Job array 17 builds the shards 0, 1, 2." in said
    lines = script.read_text().splitlines()
    for line in ("array=0-2%2", "time=270", "cpus-per-task=6", "partition=cpu", "signal=USR2@120"):
        assert f"#SBATCH --{line}" in lines
    assert "gpus" not in script.read_text()
    assert submitted_ids(out) == {"0 of 3": "17_0", "1 of 3": "17_1", "2 of 3": "17_2"}
    assert (out / "list-of-00003/header.json").exists()  # no job has to list the source

    script.unlink()
    queue.write_text("17_0\n17_1\n17_2\n")
    assert "0 of 3 shards are complete, 3 were queued or running already, 0 are submitted now." in command(*slurm)[1]
    assert not script.exists()

    build_beton("imagefolder", photos, out, canvas=32, shards=3, shard=1, workers=1)
    queue.write_text("17_2\n")
    _, said, _ = command(*slurm)
    assert "1 of 3 shards are complete, 1 were queued or running already, 1 are submitted now." in said
    assert "The job 17_0 of shard 0 had ended before it was complete: see its log in" in said
    assert "#SBATCH --array" not in script.read_text()  # submitit submits one job as such
    assert submitted_ids(out) == {"2 of 3": "17_2", "0 of 3": "17"}

    for shard in (0, 2):
        build_beton("imagefolder", photos, out, canvas=32, shards=3, shard=shard, workers=1)
    (out / "train-of-00003.beton.json").unlink()
    script.unlink()
    code, said, err = command(*slurm)
    assert code == 0 and "3 of 3 shards are complete" in said and "train-*-of-00003.beton holds 48 images" in said
    assert not script.exists() and (out / "train-of-00003.beton.json").exists()
    assert "Uses the list of 60 images" in err

    (out / "train-00002-of-00003.beton").unlink()
    queue.write_text("")
    (slurm_commands / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    code, _, err = command(*slurm)
    assert code == 2 and "SLURM refused the jobs" in err and "invalid partition" in err


def test_jobs_of_another_build_do_not_count_as_those_of_this_one(command, tmp_path, slurm_commands):
    pytest.importorskip("submitit")
    slurm, queue = ("--executor", "slurm"), slurm_commands / "queue"
    assert "3 are submitted now" in command(*slurm)[1]
    queue.write_text("17_0\n17_2\n")
    (slurm_commands / "script").unlink()
    for others in (("--canvas", 64), ("--shards", 2), ("--limit", 30)):
        code, _, err = command(*others, *slurm)
        assert code == 2 and "2 jobs of a build with other options into" in err and "17_0, 17_2" in err
        assert "scancel 17`" in err
    assert not (slurm_commands / "script").exists()
    assert "2 were queued or running already, 1 are submitted now" in command("--workers", 2, *slurm)[1]
    queue.write_text("")
    assert "0 were queued or running already, 3 are submitted now" in command("--canvas", 64, *slurm)[1]


@pytest.mark.parametrize(
    "option", [("--partition", "gpu"), ("--cpus", 8), ("--parallel", 2), ("--time-limit", "1:00")], ids=lambda o: o[0]
)
def test_options_of_slurm_are_refused_without_it(option, command, fastssl):
    for code, _, err in (command(*option), fastssl("sweep", "ablation_cifar10", "--dry-run", *option)):
        assert code == 2 and f"{option[0]} is of --executor slurm" in err


def test_what_cannot_be_submitted_is_one_sentence(command, photos, tmp_path, monkeypatch, slurm_commands):
    for options, message in (({}, "builds shards"), ({"shards": 3, "shard": 1}, "all shards that are missing")):
        with pytest.raises(UserError, match=message):
            submit_build("imagefolder", photos, tmp_path / "out", BuildOptions(**options))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "submitit", None)
        code, _, err = command("--executor", "slurm")
        assert code == 2 and "pip install submitit" in err
    code, _, err = command("--executor", "slurm", "--time-limit", "x")
    assert code == 2 and "--time-limit x is not a time" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = command("--executor", "slurm")
    assert code == 2 and "There is no SLURM here" in err


def test_an_array_of_jobs_builds_all_shards(photos, tmp_path):
    """With submitit's local executor, the jobs at the same time."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(tmp_path / "jobs" / "%j", cluster="local")
    executor.update_parameters(timeout_min=10)
    options = [BuildOptions(canvas=32, shards=3, shard=shard, workers=1) for shard in range(3)]
    with executor.batch():
        jobs = [executor.submit(ShardJob("imagefolder", photos, tmp_path / "out", each)) for each in options]
    assert [job.result() for job in jobs] == [None, None, None]
    build_beton("imagefolder", photos, tmp_path / "in_turn", canvas=32, shards=3, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "in_turn")
    assert (tmp_path / "out/train-of-00003.beton.json").exists()  # the last of them has written it


def test_a_job_at_its_time_limit_is_requeued_and_resumes(forty_photos, tmp_path):
    """With submitit's local executor. All processes of the job get the requeue signal, as under SLURM."""
    submitit = pytest.importorskip("submitit")
    many, out = tmp_path / "many", tmp_path / "out"
    many.mkdir()
    for number in range(40):
        for photo in sorted(forty_photos.glob("*/*.jpg")):
            os.link(photo, many / f"{number}-{photo.parent.name}-{photo.name}")
    executor = submitit.AutoExecutor(tmp_path / "jobs" / "%j", cluster="local")
    executor.update_parameters(timeout_min=10)
    options = BuildOptions(canvas=192, shards=2, shard=0, workers=1)
    job = executor.submit(ShardJob("imagefolder", many, out, options))
    path = shard_path(out, "train", Shard(0, 2))
    pages = partial_folder(path) / "pages"
    deadline = time.time() + 120
    while not (pages.exists() and pages.stat().st_size):
        assert time.time() < deadline and not job.done()
        time.sleep(0.02)
    (task,) = psutil.Process(int(job.job_id)).children()
    for process in (*task.children(recursive=True), task):
        process.send_signal(signal.SIGUSR2)
    assert job.result() is None
    log = job.paths.stderr.read_text() + job.paths.stdout.read_text()
    assert "a worker process died" not in log
    build_beton("imagefolder", many, tmp_path / "in_turn", canvas=192, shards=2, shard=0, workers=1)
    assert path.read_bytes() == shard_path(tmp_path / "in_turn", "train", Shard(0, 2)).read_bytes()
