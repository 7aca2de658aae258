"""Log lines on a device that runs later than the host: when they are written, what waits, and that nothing is lost."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeDevice
from training_runs import metrics_of, small

from fastssl.common.errors import Stopped, UserError
from fastssl.loading import loader
from fastssl.recipe import load_recipe
from fastssl.training import loop, train
from fastssl.training.display import Display
from fastssl.training.run_dir import locked_run_dir
from fastssl.training.run_writer import RunWriter
from fastssl.training.setup import prepare
from fastssl.training.step_log import HostCopy, StepLog

SPEED = ("images_per_second", "data_wait", "seconds")
LAG = 1000  # operations: one or two steps of these runs, less than the four between two log steps


@pytest.fixture
def device(monkeypatch):
    return FakeDevice(LAG).install(monkeypatch)


def test_the_fake_device_notices_every_way_to_wait(device):
    with device:
        x = torch.ones(3, device="cuda")
        for read in (x.sum().item, x.tolist, x.cpu, x.numpy, lambda: bool(x[0]), x.nonzero, torch.cuda.synchronize):
            before = len(device.waits)
            _ = x + 1
            read()
            assert len(device.waits) == before + 1
        event = torch.cuda.Event()
        _ = x + 1
        event.record()
        assert not event.query()
        event.synchronize()
        assert event.query() and device.waits[-1] == "event"
        count = len(device.waits)
        event.synchronize()
        assert len(device.waits) == count and x.is_cuda


def test_values_are_there_only_after_the_device_has_passed(device):
    with device:
        copy = HostCopy({"a": torch.full((), 2.0, device="cuda"), "b": torch.full((), 3, device="cuda")})
        assert not copy.values.is_cuda and copy.values.isnan().all()
        assert copy.read() == {"a": 2.0, "b": 3.0} and device.waits == ["event"]


class Watched(RunWriter):
    """Notes at which step each line, and each checkpoint, was written."""

    def __init__(self, *arguments):
        self.written = []
        super().__init__(*arguments)

    def log(self, metrics, step):
        self.written.append((step, self.run.state.step))
        super().log(metrics, step)

    def save(self, name="last.pt"):
        self.written.append((name, self.run.state.step))
        return super().save(name)


def with_fixed_views(run):
    """The run with the views of its first batch for every batch: the kernel that makes them is the CPU's."""
    views = run.views(next(iter(run.state.loader)), 0)
    run.state.loader.set_epoch(0)
    return replace(run, views=lambda batch, epoch: views)


def fit_behind(device, recipe, *, probe=None, stop_at=None, crash_at=None, spoil=None):
    """Train with the loop of a GPU. Returns the writer and the waits by the step at which they were."""
    on_cpu, _ = prepare(recipe, torch.device("cpu"), None)
    run = replace(with_fixed_views(on_cpu), device=torch.device("cuda"))
    if spoil is not None:
        network = run.network

        def spoiled(inputs):
            output = network(inputs)
            if run.state.step == spoil:
                output.terms["loss"] = output.terms["loss"] * float("nan")
            return output

        run = replace(run, network=spoiled)
    waits, stop = [], SimpleNamespace(received=None, exit_code=75, interruptible=nullcontext)
    real = loop.train_step

    def step(*arguments):
        waits.append((run.state.step, list(device.waits)))
        device.waits.clear()
        if run.state.step + 1 == stop_at:
            stop.received = 15
        if run.state.step == crash_at:
            raise RuntimeError("crash")
        return real(*arguments)

    run_dir = Path(recipe.run.dir)
    arguments = on_cpu, run_dir, stop, lambda recipe, run_dir: None
    with locked_run_dir(run_dir), Watched(*arguments) as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        patch.setattr(writer, "save_views", lambda views: None)
        patch.setattr(loader, "epoch_order", device.on_host(loader.epoch_order))
        with device:
            try:
                loop.fit(run, writer, stop, probe, lambda run, reading: "")
            except Stopped:
                pass
    return writer, dict(waits)


def recipe_of(canvas, run_dir, *keys):
    return load_recipe(
        "recipes/barlow.yaml",
        small(canvas, run_dir, "train.epochs=5", "log.every=4", "log.rank_every=0", "train.ema=0.9", *keys),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
def test_a_log_step_never_waits_for_the_device(canvas, tmp_path, device, optimizer):
    """15 steps: each line is written at the next log step, and the only waits are for the end of the run."""
    writer, waits = fit_behind(device, recipe_of(canvas, tmp_path / "run", f"optim.name={optimizer}"))
    assert [waits[step] for step in range(1, 15)] == [[]] * 14
    lines = [entry for entry in writer.written if entry[0] != "last.pt"]
    assert lines == [(4, 8), (8, 12), (12, 15), (15, 15)]
    for line in metrics_of(tmp_path / "run"):
        assert math.isfinite(line["loss"]) and line["images_per_second"] > 0 and 0 <= line["data_wait"] < 1


def test_the_lines_are_those_of_a_cpu(canvas, tmp_path, device, monkeypatch):
    """But for the speed: values that were read too early would be null."""
    fit_behind(device, recipe_of(canvas, tmp_path / "late", "log.rank_every=8"))

    def prepare_with_fixed_views(*arguments):
        run, remarks = prepare(*arguments)
        return with_fixed_views(run), remarks

    monkeypatch.setattr(loop, "prepare", prepare_with_fixed_views)
    monkeypatch.setattr(RunWriter, "save_views", lambda self, views: None)
    train(recipe_of(canvas, tmp_path / "now", "log.rank_every=8"))
    late, now = (
        [{key: value for key, value in line.items() if key not in SPEED} for line in metrics_of(tmp_path / name)]
        for name in ("late", "now")
    )
    assert [line["step"] for line in now if "rankme_h" in line] == [8, 15]
    for a, b in zip(late, now, strict=True):
        for key in ("rankme_h", "rankme_z"):  # LAPACK's last digits depend on where in memory a matrix is
            assert a.pop(key, 0.0) == pytest.approx(b.pop(key, 0.0), rel=1e-12)
        assert a == b and "std_z" in a


def test_rankme_is_the_only_reason_to_wait(canvas, tmp_path, device):
    _, waits = fit_behind(device, recipe_of(canvas, tmp_path / "run", "log.rank_every=8"))
    assert [step for step in range(1, 15) if waits[step]] == [8]


def test_no_checkpoint_covers_a_line_that_is_not_written(canvas, tmp_path, device):
    keys = ["checkpoint.every=6", "checkpoint.keep=3", "probe.every=4"]
    probe = SimpleNamespace(calls=0)

    def count(model):
        probe.calls += 1
        return {"knn": 0.5}

    writer, _ = fit_behind(device, recipe_of(canvas, tmp_path / "run", *keys), probe=count)
    lines = set()
    for name, step in writer.written:
        if isinstance(name, str):
            assert {n for n in range(4, step + 1, 4)} <= lines, (name, step)
        else:
            lines.add(name)
    assert probe.calls == 2 and lines == {4, 8, 12, 15}


def test_a_stop_writes_the_line_before_its_checkpoint(canvas, tmp_path, device):
    writer, _ = fit_behind(device, recipe_of(canvas, tmp_path / "run"), stop_at=9)
    assert writer.written == [("last.pt", 0), (4, 8), (8, 9), ("last.pt", 9)]


def test_too_many_skipped_steps_are_noticed_one_log_step_later(canvas, tmp_path, device):
    with pytest.raises(UserError, match=r"Step 5 was not finite \(loss=nan"):
        fit_behind(device, recipe_of(canvas, tmp_path / "run"), spoil=5)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [4]


@pytest.mark.parametrize(
    "keys, due",
    [
        ([], [4, 8, 12, 16, 20, 24]),  # epochs of three steps end at 3, 6, 9, 12, ...
        (["log.every=1"], [3, 6, 9, 12, 15, 18, 21, 24]),
        (["log.every=2"], [4, 6, 10, 12, 16, 18, 22, 24]),
        (["log.every=5", "log.rank_every=12"], [15, 24]),
        (["log.every=5", "log.rank_every=0"], []),
    ],
)
def test_rankme_is_due_at_the_first_log_step_after_its_interval(keys, due):
    log_keys = ["log.every=4", *keys]
    recipe = load_recipe("recipes/barlow.yaml", ["train.epochs=8", *log_keys])
    state = SimpleNamespace(step=0)
    run = SimpleNamespace(
        recipe=recipe, state=state, schedule=SimpleNamespace(total_steps=24), device=torch.device("cpu")
    )
    log, found = StepLog(run, None, None), []
    for state.step in range(1, 25):
        if log.is_log_step() and log._is_rank_due():
            found.append(state.step)
    assert found == due


def test_a_crash_does_not_lose_the_line_that_waits(canvas, tmp_path, device):
    """After step 6 of 15; the next log step would have been 8."""
    with pytest.raises(RuntimeError, match="crash"):
        fit_behind(device, recipe_of(canvas, tmp_path / "run"), crash_at=6)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [4]


def test_the_time_left_is_counted_from_now_though_the_line_is_late(capsys):
    """100 of 1000 steps in 100 s, at the line of step 50."""
    display = Display("title", 0, 1000)
    display.step(1)
    display.first_step_at -= 99
    display.step(100)
    display.log(50, {"loss": 1.0})
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "ETA"] and len(header) == len(line)
    assert line.split() in (["50/1000", "1.000", "15:00"], ["50/1000", "1.000", "15:01"])
