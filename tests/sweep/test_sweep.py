"""Sweeps: from a file to runs, and real processes that are killed, stopped and resumed."""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from fastssl.common import terminal
from fastssl.common.errors import UserError
from fastssl.common.slurm import parse_time_limit
from fastssl.common.terminal import time_in_words
from fastssl.recipe import Recipe, load_recipe, shipped_recipes
from fastssl.sweep import child, dry_run, expand, load_sweep, run_locally, submit_to_slurm, table
from fastssl.sweep.estimate import bytes_of_run, last_rate
from fastssl.sweep.progress import Task, is_finished, is_locked, last_knn, last_log_line, log_path, read_progress
from fastssl.sweep.slurm import SlurmJob
from fastssl.training import train

ROOT = Path(__file__).parents[2]
ABLATION = "recipes/sweeps/ablation_cifar10.yaml"
TINY = {
    "views.size": 32, "model.backbone": "test_resnet", "model.projector": {"layers": 2, "hidden": 32, "out": 32},
    "train.batch_size": 16, "train.epochs": 14, "train.device": "cpu", "log.every": 1, "checkpoint.every": 3,
    "probe.every": 0, "optim.warmup_epochs": 1,
}  # fmt: skip


@pytest.fixture
def write_sweep(canvas, tmp_path, monkeypatch):
    """A function that writes a sweep of tiny runs (3 steps per epoch) with the given grids, and returns its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that tests start
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # weights are compared bit for bit

    def write(*grids, **settings):
        data = {"data.train": f"{canvas}/train.beton", "data.val": f"{canvas}/val.beton"}
        values = {"name": "tiny", "dir": "out", "set": {**TINY, **data, **settings}, "grids": list(grids)}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def barlow(**axes):
    return {"recipe": "recipes/barlow.yaml", "axes": axes}


def loaded(path, *overrides):
    sweep = load_sweep(path)
    return sweep, expand(sweep, list(overrides))


# From the file to its runs


def test_the_shipped_ablation_is_the_published_one():
    """2 x 54 runs of Barlow Twins and 2 x 36 of VICReg, every one accepted by load_recipe."""
    _, runs = loaded(ABLATION)
    assert len(runs) == 180 and len({run.dir for run in runs}) == 180
    counts = {grid: sum(run.grid == grid for run in runs) for grid in dict.fromkeys(run.grid for run in runs)}
    assert counts == {"hprob_barlow": 54, "zprob_barlow": 54, "hprob_vicreg": 36, "zprob_vicreg": 36}
    for run in runs:
        recipe, barlow = run.recipe, run.grid.endswith("barlow")
        assert recipe.objective.name == ("barlow_twins" if barlow else "vicreg")
        assert recipe.embedding.stochastic == run.grid[0] and recipe.embedding.mixture_mode == "reference"
        assert recipe.embedding.beta in ((1e-2, 1e-3, 1e-4) if barlow else (1e-3, 1e-4, 1e-5))
        assert recipe.embedding.samples in ((1, 12, 36) if barlow else (1, 12)) and recipe.seed in (1997, 1998, 1999)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.limit) == (200, 256, 40000)
        assert (recipe.optim.name, recipe.optim.lr, recipe.probe.split) == ("adamw", 1e-3, "rest")
    assert runs[0].dir == Path("runs/ablation_cifar10/hprob_barlow/prior=standard_normal,beta=0.01,samples=1,seed=1997")


def test_shipped_sweeps_begin_with_how_to_run_them():
    for path in (shipped_recipes() / "sweeps").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# ") and "# Run:" in text and "# Needs:" in text and "# From:" in text


def test_axes_win_over_the_command_line_over_the_grid_over_the_sweep(write_sweep):
    grid = {**barlow(seed=[1, 2]), "set": {"optim.lr": 0.5, "log.every": 3}}
    path = write_sweep(grid, **{"optim.lr": 0.1, "seed": 9})
    _, runs = loaded(path, "log.every=7", "embedding={beta: 5e-4}")
    assert [run.recipe.seed for run in runs] == [1, 2]
    assert {(r.recipe.optim.lr, r.recipe.log.every, r.recipe.embedding.beta) for r in runs} == {(0.5, 7, 5e-4)}


def test_directories_are_short_readable_and_safe(write_sweep):
    path = write_sweep(
        {
            "recipe": "recipes/zprob_barlow.yaml",
            "name": "mine",
            "axes": {"views.first.blur": [0.0, 1e-3], "views.second.blur": [1.0], "data.val": ["a b/../c"]},
        }
    )
    _, runs = loaded(path)
    assert [run.name for run in runs] == [
        "mine/first.blur=0,second.blur=1,val=a-b-..-c", "mine/first.blur=0.001,second.blur=1,val=a-b-..-c",
    ]  # fmt: skip
    assert runs[1].dir == Path("out") / runs[1].name and runs[1].recipe.views.first.blur == 1e-3


@pytest.mark.parametrize(
    "grids, overrides, says",
    [
        ([{"recipe": "recipes/barlow.yaml", "axis": {}}], [], "unknown key grids.0.axis: did you mean grids.axes"),
        ([barlow(seed=[])], [], "grids.0.axes.seed"),
        ([barlow(seed=[1, 1])], [], "has a value twice"),
        ([barlow(seed=[1]), barlow(seed=[2])], [], "give one another `name:`"),
        ([barlow(**{"optim.lrr": [1]})], [], "Run barlow/lrr=1: .*did you mean optim.lr"),
        ([barlow(**{"embedding.prior": ["vamp"], "embedding.kl": ["mc", "closed"]})], [], "kl=closed: .*no formula"),
        ([barlow(seed=[1])], ["seed=3"], "seed is an axis"),
        ([barlow(embedding=[{"beta": 1}])], ["embedding.beta=3"], "embedding is an axis"),
        ([barlow(seed=[1])], ["run.dir=x"], "leave out run.dir"),
        ([barlow(**{"run.dir": ["a", "b"]})], [], "leave out run.dir"),
        ([{"recipe": "recipes/barlo.yaml"}], [], "did you mean recipes/barlow.yaml"),
        ([{"recipe": "recipes/barlow.yaml", "name": "../up"}], [], "grids.0.name"),
        ([{"recipe": "recipes/barlow.yaml", "name": "slurm"}], [], "rename it"),
    ],
)
def test_a_wrong_sweep_is_reported_in_one_sentence(write_sweep, grids, overrides, says):
    path = write_sweep(*grids)
    with pytest.raises(UserError, match=says) as error:
        loaded(path, *overrides)
    assert "\n" not in str(error.value)


def test_a_run_with_less_than_a_batch_stops_the_sweep_before_it_starts(write_sweep):
    sweep, runs = loaded(write_sweep({**barlow(), "set": {"data.limit": 4}}))
    with pytest.raises(UserError, match="out/barlow would train on 4 images"):
        run_locally(sweep, runs)
    assert not Path("out").exists()


def test_mean_and_deviation_over_seeds():
    assert [table.mean_and_deviation(values) for values in ([], [50.0], [50.0, 52.0])] == ["", "50.0", "51.0 ± 1.4"]


def test_a_terminal_shows_the_steps_of_the_sweep_and_of_its_running_runs(write_sweep, monkeypatch):
    _, runs = loaded(write_sweep(barlow(seed=[1, 2, 3])))
    screen = Console(force_terminal=True, width=160, file=io.StringIO())
    monkeypatch.setattr(table, "console", lambda: screen)
    tasks = [
        Task(runs[0], "finished"),
        Task(runs[1], "running", device="cpu"),
        Task(runs[2], "failed", error="no room"),
    ]
    runs[1].dir.mkdir(parents=True)
    (runs[1].dir / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5, "images_per_second": 2000, "knn": 0.25}\n')
    with table.SweepDisplay("out", tasks) as display:
        display.print_state(tasks[2])
        display.show(tasks)
        sweep_bar, run_bar = display.bars.tasks
        assert (sweep_bar.completed, sweep_bar.total) == (42 + 7, 84)
        assert sweep_bar.fields["status"] == "steps, runs: 1 finished, 1 running, 1 failed"
        assert run_bar.fields["status"] == "on cpu, loss 1.5, kNN 25.0 %, 2,000 images/s"
        tasks[1].state = "waiting"
        display.show(tasks)
        assert len(display.bars.tasks) == 1
    assert "barlow/seed=3  failed: no room" in screen.file.getvalue()


# Dry runs


def test_a_dry_run_of_the_ablation_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep, runs = loaded(ABLATION)
    dry_run(sweep, runs, per_gpu=4, jobs=5, images_per_second=1000)
    out = capsys.readouterr().out
    assert "hprob_barlow: 54 runs\n" in out and "samples  1, 12, 36" in out
    assert "Runs: 180 in runs/ablation_cifar10, 0 finished." in out
    seconds = 180 * 200 * (40000 // 256 * 256) / 1000 / 20
    assert f"Time: {time_in_words(seconds)} with 20 runs in parallel (5 jobs, 4 on each)" in out
    # 15 M parameters of ResNet-18, projector and heads: three checkpoints with two moments each, and the encoder
    assert re.search(r"Disk: about 9[0-9]\.[0-9] GB, 5[0-9]{2} MB for each run", out)
    assert runs[0].name not in out and len(out.splitlines()) < 40
    dry_run(sweep, runs, images_per_second=1000, verbose=True)
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  waiting")]
    assert listed == [["waiting", run.name] for run in runs]
    dry_run(sweep, runs)
    assert "Time: not predicted, because there is no data/cifar10/train.beton" in capsys.readouterr().out
    dry_run(sweep, runs, jobs=5)
    assert "Time: not predicted, because no run of hprob_barlow has logged its throughput" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_predicts_with_no_more_parallel_runs_than_there_are(write_sweep, capsys):
    sweep, runs = loaded(write_sweep(barlow(seed=[1, 2])))
    dry_run(sweep, runs, per_gpu=4, jobs=8, images_per_second=1)
    images = runs[0].recipe.train.epochs * 48
    assert f"Time: {time_in_words(images)} with 2 runs in parallel" in capsys.readouterr().out


def test_damaged_files_of_a_run_are_tolerated(write_sweep):
    """Invalid lines of metrics.jsonl, a run without metrics, and a log that is a folder."""
    _, (run,) = loaded(write_sweep(barlow()))
    assert last_knn(run) is None and read_progress(run).step == 0
    run.dir.mkdir(parents=True)
    text = 'null\n{"step": "x", "knn": 1}\n{"step": 3, "loss": 2.0, "knn": 0.25}\n{"step": 4, "lo'
    (run.dir / "metrics.jsonl").write_text(text)
    assert last_knn(run) == 0.25 and read_progress(run).step == 3
    log_path(run).mkdir()
    assert last_log_line(run) == "it printed nothing"


def test_names_with_characters_beyond_16_bits_reach_the_run(write_sweep):
    _, runs = loaded(write_sweep({**barlow(seed=[1]), "set": {"data.val": "😀.beton"}}))
    assert runs[0].recipe.data.val == "😀.beton"


@pytest.mark.slow
def test_a_dry_run_times_one_run_of_a_grid(write_sweep, capsys, monkeypatch):
    sweep, runs = loaded(write_sweep(barlow(seed=[1, 2, 3]), **{"train.epochs": 1000}))
    monkeypatch.setattr(terminal, "PLAIN_LINE_EVERY", 0)  # seconds
    monkeypatch.setattr(terminal, "SHORT", 0)
    dry_run(sweep, runs)
    out, err = capsys.readouterr()
    assert "images/s (steps of barlow/seed=" in out and " with 1 run at a time" in out
    assert re.search(r"^barlow: [\d.,]+ images/s in a run\.$", err, re.MULTILINE)
    assert not Path("out").exists()
    assert re.search(
        r"^Timing 30 steps of barlow/seed=\d, which may take minutes on a CPU; --images-per-second N skips this\.\n",
        err,
    )
    assert "Timing: 480 images in " in err


def test_the_steps_of_timed_runs_are_shown_as_they_are_logged(write_sweep, capsys):
    """Of both runs together. Only a failed run is a line: the others have nothing that a user could look at."""
    _, runs = loaded(write_sweep(barlow(seed=[1, 2])))
    tasks = [Task(run) for run in runs]
    display = table.TimingDisplay(tasks, 60, 10)
    counts = []
    display.advance = counts.append
    for step in (5, 5, 10):
        for run in runs:
            run.dir.mkdir(parents=True, exist_ok=True)
            (run.dir / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        display.show(tasks)
    size = runs[0].recipe.train.batch_size
    assert counts == [10 * size, 10 * size] and sum(map(display.images_in, tasks)) == 2 * 14 * 3 * size
    for task, state in zip(tasks, ("running", "failed")):
        task.state, task.error = state, "no such backbone"
        display.print_state(task)
    assert len(lines := capsys.readouterr().out.splitlines()) == 1 and lines[0].endswith("failed: no such backbone")


def test_slow_runs_are_timed_for_a_minute(write_sweep, monkeypatch):
    """Until every one has logged twice: the first steps compile."""
    _, runs = loaded(write_sweep(barlow(seed=[1, 2])))
    tasks = [Task(run) for run in runs]
    display = table.TimingDisplay(tasks, 60, 10)
    display.advance = lambda count: None
    began = time.monotonic()

    def show(seconds, *steps):
        for run, step in zip(runs, steps):
            run.dir.mkdir(parents=True, exist_ok=True)
            (run.dir / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        monkeypatch.setattr(table.time, "monotonic", lambda: began + seconds)
        display.show(tasks)

    show(50, 10, 10)
    show(70, 20, 5)
    with pytest.raises(table.TimedLongEnough):
        show(80, 20, 10)


def test_without_a_terminal_the_steps_of_a_sweep_are_a_line_every_two_minutes(write_sweep, capsys, monkeypatch):
    _, runs = loaded(write_sweep(barlow(seed=[1, 2, 3])))
    tasks = [Task(run) for run in runs]
    tasks[0].state, tasks[1].state = "running", "running"
    display = table.SweepDisplay("title", tasks)
    began = display.last_line
    for seconds, step in ((60, 3), (121, 4), (180, 5), (241, 10)):
        monkeypatch.setattr(table.time, "monotonic", lambda seconds=seconds: began + seconds)
        for run in runs[:2]:
            run.dir.mkdir(parents=True, exist_ok=True)
            (run.dir / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        display.show(tasks)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("8 of 126 steps (barlow/seed=1 4, barlow/seed=2 4)")
    # 12 steps took 120 s, and 106 are left.
    assert second.endswith("20 of 126 steps (barlow/seed=1 10, barlow/seed=2 10), about 17 min 40 s left")


def test_the_time_of_a_grid_is_that_of_a_run_and_of_all(write_sweep, capsys):
    sweep, runs = loaded(write_sweep(barlow(seed=[1, 2])))
    dry_run(sweep, runs, images_per_second=0.5)
    each = runs[0].recipe.train.epochs * 48 / 0.5
    line = f"{time_in_words(each)} a run, {time_in_words(2 * each)} one after the other, at 0.5 images/s"
    assert line in capsys.readouterr().out


def test_the_predicted_disk_counts_the_checkpoint_of_the_probe(write_sweep):
    _, (run,) = loaded(write_sweep(barlow(seed=[1])))
    with_probe, without = (
        bytes_of_run(Recipe.model_validate(run.recipe.model_dump() | {"probe": {"every": every}})) for every in (1, 0)
    )
    assert 1.3 < with_probe / without < 1.5  # three checkpoints or two, and the encoder


def test_the_rate_of_a_timed_run_is_that_of_its_last_third(write_sweep):
    _, (run,) = loaded(write_sweep(barlow(seed=[1])))
    assert last_rate(run) is None
    run.dir.mkdir(parents=True)
    lines = [{"step": 5 * (i + 1), "images_per_second": rate} for i, rate in enumerate((1, 90, 90, 90, 100, 300))]
    lines.append({"step": 31, "images_per_second": 1})  # of one step
    (run.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_rate(run) == pytest.approx(150)  # as long at 100 as at 300 images: not the mean
    (run.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert last_rate(run) == 90  # without the steps that compile


# Real processes


def steps_in(run):
    path = run.dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def pids_of(run):
    """The ids of the processes that have trained this run, the first one first."""
    lines = log_path(run).read_text().splitlines() if log_path(run).exists() else []
    return [int(line.split()[2].rstrip(",")) for line in lines if line.startswith("--- process")]


def wait_until(condition, seconds=300):
    deadline = time.time() + seconds  # far more than an idle machine needs
    while not condition():
        assert time.time() < deadline, "waited too long"
        time.sleep(0.02)


def is_gone(pid):
    """Whether a process has ended. In a container, an orphan stays a zombie, as nothing collects its exit code."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def send_when(condition, send):
    """Call `send` from a thread as soon as `condition` holds."""

    def watch():
        wait_until(condition)
        send()

    thread = Thread(target=watch)
    thread.start()
    return thread


def a_run_has_started():
    """Whether a run was started, and SIGTERM is caught: before that, it would end the process that runs the tests."""
    return signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and bool(active_children())


def same_weights(run, other):
    ours, theirs = (load_file(path / "encoder.safetensors") for path in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def uninterrupted(run, tmp_path):
    """The directory of the same run, trained in this process without a sweep and without an interruption."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "straight.yaml").write_text(run.recipe.to_yaml())
    recipe = load_recipe(tmp_path / "straight.yaml", [f"run.dir={tmp_path}/straight", "data.resident=false"])
    try:
        return train(recipe)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("default_signals")
def test_a_killed_run_is_resumed_and_one_with_a_user_error_is_not(write_sweep, tmp_path, capsys):
    """Of two parallel runs, one is killed and the other gets SIGHUP. A third run names an unknown backbone."""
    wrong = {**barlow(), "name": "wrong", "set": {"model.backbone": "resnet19"}}
    sweep, runs = loaded(write_sweep(barlow(seed=[1, 2]), wrong, **{"data.resident": True}))
    killed, other, _ = runs
    killer = send_when(lambda: steps_in(killed) >= 7, lambda: os.kill(pids_of(killed)[0], signal.SIGKILL))
    hangup = send_when(lambda: steps_in(other) >= 7, lambda: os.kill(pids_of(other)[0], signal.SIGHUP))
    code = run_locally(sweep, runs, per_gpu=2, retries=1)
    killer.join()
    hangup.join()
    out = capsys.readouterr().out

    assert code == 1 and [is_finished(run) for run in runs] == [True, True, False]
    assert [len(pids_of(run)) for run in runs] == [2, 2, 1]
    assert "Stopped by SIGHUP after step" in log_path(other).read_text()
    assert "seed=1  waiting to be tried again: killed by SIGKILL" in out and "2 of 3 runs are finished" in out
    assert "Failed: wrong: " in out and "resnet19" in out.split("Failed: wrong: ")[1]
    assert "Resuming barlow after step" in log_path(killed).read_text()
    assert same_weights(killed.dir, uninterrupted(killed, tmp_path))
    assert all(is_gone(pid) for run in runs for pid in pids_of(run))

    for run, accuracies in ((killed, (0.1, 0.5)), (other, (0.3, 0.7))):
        with open(run.dir / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": 42, "knn": accuracy}) + "\n" for accuracy in accuracies)
    assert run_locally(sweep, runs[:2]) == 0  # nothing is left to do
    assert "60.0 ± 14.1" in next(line for line in capsys.readouterr().out.splitlines() if "2 of 2" in line)
    assert [len(pids_of(run)) for run in runs] == [2, 2, 1]


def test_a_sweep_resumes_after_a_kill_and_a_stop_and_leaves_no_process(write_sweep, tmp_path, capsys):
    path = write_sweep(barlow(seed=[5]), **{"data.resident": True})
    sweep, (run,) = loaded(path)
    command = [sys.executable, "-m", "fastssl", "sweep", str(path), "--per-gpu", "2"]
    process = psutil.Popen(command, stdout=subprocess.PIPE)
    wait_until(lambda: steps_in(run) >= 5)
    pids = [child.pid for child in process.children(recursive=True)]
    assert is_locked(run) and pids_of(run)[0] in pids
    process.kill()
    process.communicate()
    wait_until(lambda: all(is_gone(pid) for pid in pids), 30)
    reached = torch.load(run.dir / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert reached >= 5 and not is_finished(run) and not is_locked(run)  # it saved a checkpoint when its parent died

    me = psutil.Process()
    stopper = send_when(a_run_has_started, lambda: me.send_signal(signal.SIGTERM))
    assert run_locally(sweep, [run]) == 75  # stopped while the run was still importing
    stopper.join()
    assert "Stopped with 0 of 1 runs finished; the same command resumes the sweep." in capsys.readouterr().out
    assert not is_locked(run) and not is_finished(run)

    assert run_locally(sweep, [run]) == 0 and len(pids_of(run)) == 2
    assert f"Resuming barlow after step {reached}" in log_path(run).read_text()
    assert same_weights(run.dir, uninterrupted(run, tmp_path))

    with pytest.raises(UserError, match="out/barlow/seed=5 holds a run with other values of optim.lr"):
        run_locally(*loaded(path, "optim.lr=0.5"))


def test_a_run_that_another_process_trains_is_left_to_it(write_sweep, monkeypatch):
    """The lock on the log keeps a second process out. A sweep waits until the other process has finished the run."""
    sweep, (run,) = loaded(write_sweep(barlow()))
    run.dir.mkdir(parents=True)
    with open(log_path(run), "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        monkeypatch.setattr(child, "stop_with_parent", lambda parent: None)  # would change signals of this process
        with pytest.raises(SystemExit) as end:
            child.run_child(run.recipe, os.getpid())
        assert end.value.code == child.EXIT_BUSY and [path.name for path in run.dir.iterdir()] == ["output.log"]

        def finish():
            (run.dir / "metrics.jsonl").write_text("")
            (run.dir / "recipe.yaml").write_text(run.recipe.to_yaml())
            (run.dir / "encoder.safetensors").touch()
            log.close()

        began = time.time()
        other = send_when(lambda: time.time() > began + 1.5, finish)
        assert run_locally(sweep, [run]) == 0 and time.time() > began + 1.5
        other.join()
    assert pids_of(run) == []


# SLURM


@pytest.mark.slow
def test_a_requeued_job_resumes_from_the_checkpoints(write_sweep, tmp_path):
    """With submitit's local executor. All processes of the job get the requeue signal, as under SLURM."""
    submitit = pytest.importorskip("submitit")
    _, runs = loaded(write_sweep(barlow(seed=[8]), **{"train.epochs": 24}))
    executor = submitit.AutoExecutor(tmp_path / "jobs" / "%j", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(SlurmJob("tiny", runs, 1, 0))
    wait_until(lambda: steps_in(runs[0]) >= 5)
    (task,) = psutil.Process(int(job.job_id)).children()
    for pid in (task.pid, pids_of(runs[0])[0]):
        os.kill(pid, signal.SIGUSR2)
    assert job.result() is None
    assert is_finished(runs[0]) and len(pids_of(runs[0])) == 2
    assert "Resuming barlow after step" in log_path(runs[0]).read_text()
    assert same_weights(runs[0].dir, uninterrupted(runs[0], tmp_path))


def test_a_preempted_job_waits_for_the_requeue_signal(write_sweep, monkeypatch):
    """SIGTERM comes first, then the signal whose handler (in a job: submitit's) puts the job back into the queue."""
    pytest.importorskip("submitit")
    _, runs = loaded(write_sweep(barlow()))
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "1")
    me, answered = psutil.Process(), []

    def requeue(number, _):
        answered.append((number, active_children()))
        raise SystemExit(1)

    before = signal.signal(signal.SIGUSR2, requeue)
    first = send_when(a_run_has_started, lambda: me.send_signal(signal.SIGTERM))

    def the_runs_have_ended():
        return not first.is_alive() and not active_children()

    second = send_when(the_runs_have_ended, lambda: me.send_signal(signal.SIGUSR2))
    with pytest.raises(SystemExit):
        SlurmJob("tiny", runs, 1, 0)()
    first.join(), second.join()
    signal.signal(signal.SIGUSR2, before)
    assert answered == [(signal.SIGUSR2, [])] and not is_locked(runs[0])


def test_slurm_gets_the_options_and_every_run_only_once(write_sweep, slurm_commands, capsys):
    pytest.importorskip("submitit")
    sweep, runs = loaded(write_sweep(barlow(seed=[1, 2, 3, 4, 5])), "train.device=auto")
    options = dict(per_gpu=2, parallel=2, cpus=6, minutes=parse_time_limit("4:30"), partition="gpu")
    assert submit_to_slurm(sweep, runs, **options) == 0
    assert "0 of 5 runs are finished, 0 were queued or running already, 5 are submitted now" in capsys.readouterr().out
    script = (slurm_commands / "script").read_text()
    for line in ("array=0-2%2", "time=270", "gpus-per-node=1", "cpus-per-task=6", "partition=gpu", "signal=USR2@180"):
        assert f"#SBATCH --{line}\n" in script
    ids = ["17_0", "17_0", "17_1", "17_1", "17_2"]
    assert json.loads(Path("out/slurm/jobs.json").read_text()) == dict(zip((run.name for run in runs), ids))

    (slurm_commands / "script").unlink()
    (slurm_commands / "queue").write_text("17_0\n17_1\n17_2\n")
    submit_to_slurm(sweep, runs, **options)
    assert "5 were queued or running already, 0 are submitted now" in capsys.readouterr().out
    assert not (slurm_commands / "script").exists()

    (slurm_commands / "queue").write_text("17_1\n")
    runs[0].dir.mkdir(parents=True)
    log_path(runs[0]).write_text("step 3\nerror: The disk is full\nhint: free some space\n")
    submit_to_slurm(sweep, runs, **options)
    out = capsys.readouterr().out
    assert "2 were queued or running already, 3 are submitted now" in out
    assert (
        "17_0  barlow/seed=1  (its previous job ended with: The disk is full: free some space)\n17_0  barlow/seed=2\n"
        in out
    )
    assert "#SBATCH --array=0-1%2\n" in (slurm_commands / "script").read_text()

    (slurm_commands / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="SLURM refused the jobs .*invalid partition"):
        submit_to_slurm(sweep, runs, **options)


def test_missing_slurm_is_reported_in_one_sentence(write_sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="There is no SLURM here"):
        submit_to_slurm(*loaded(write_sweep(barlow())))


def test_missing_submitit_is_reported_in_one_sentence(write_sweep, slurm_commands, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        submit_to_slurm(*loaded(write_sweep(barlow())))


@pytest.mark.parametrize("text, minutes", [("90", 90), ("24:00", 1440), ("1:5", 65)])
def test_time_limits(text, minutes):
    assert parse_time_limit(text) == minutes


@pytest.mark.parametrize("text", ["0", "x", "1:x", ":30", "1d", "-5"])
def test_invalid_time_limits(text):
    with pytest.raises(UserError, match="--time-limit"):
        parse_time_limit(text)
