"""Checkpoints are written by a thread, from a copy of the state, while training goes on."""

import concurrent.futures
import io
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import (
    FORKS,
    assert_same_run,
    checkpoint_in,
    equal,
    losses_of,
    small,
    train_jobs,
    wait_for_line,
)

from fastssl.common import files
from fastssl.common.errors import Stopped, UserError
from fastssl.recipe import load_recipe
from fastssl.training import loop, run_writer, train
from fastssl.training.snapshot import Snapshot


@pytest.fixture
def states(monkeypatch):
    """The weights and the optimizer's state after each step of the runs of this test, copied in the loop."""
    seen = {}
    real = loop.train_step

    def step(run, *arguments):
        output = real(run, *arguments)
        state = run.state.state_dict()
        seen[run.state.step] = torch.load(to_bytes({key: state[key] for key in ("model", "optimizer", "ema")}))
        return output

    monkeypatch.setattr(loop, "train_step", step)
    return seen


def to_bytes(value):
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data


def test_a_checkpoint_holds_its_step_although_training_went_on(canvas, tmp_path, monkeypatch, states):
    """The thread begins with the file of step 2 after step 3 is done; the save after that step waits for it."""
    goes_on, writing, written = threading.Event(), [], []
    real = run_writer.write_checkpoint

    def write(run_dir, name, saved):
        writing.append(saved["step"])
        assert len(writing) == 1, "two checkpoints at a time"
        assert saved["step"] != 2 or goes_on.wait(60)
        real(run_dir, name, saved)
        written.append((name, checkpoint_in(run_dir, name)))
        writing.clear()

    monkeypatch.setattr(run_writer, "write_checkpoint", write)
    monkeypatch.setattr(run_writer.RunWriter, "show_step", lambda self, step: step == 3 and goes_on.set())
    keys = ["checkpoint={every: 2, keep: 1}", "train.ema=0.9", "optim.name=sgd"]
    train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    names = [(name, saved["step"]) for name, saved in written]
    assert names == [
        ("last.pt", 0), ("last.pt", 2), ("epoch-0001.pt", 3), ("last.pt", 4), ("last.pt", 6),
        ("epoch-0002.pt", 6), ("last.pt", 6),
    ]  # fmt: skip
    for _, saved in written[1:]:
        for key, value in states[saved["step"]].items():
            assert equal(saved[key], value), (saved["step"], key)
    assert not equal(states[2]["model"], states[3]["model"])


def train_and_hang(overrides, run_dir):
    """In a process of its own: the thread stops before it renames the second last.pt; training goes on."""
    real, calls = files.sync, []

    def sync(path: Path):
        if path.name.startswith(".last.pt"):
            calls.append(path)
            if len(calls) == 2:
                threading.Event().wait()
        real(path)

    files.sync = sync
    train_jobs([("zprob_barlow", overrides)])


def test_a_run_that_is_killed_while_the_thread_writes_ends_with_the_same_bits(canvas, tmp_path):
    keys = ["checkpoint.every=4", "train.epochs=4"]
    straight = train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "straight", *keys)))
    run = tmp_path / "run"
    process = FORKS.Process(target=train_and_hang, args=(small(canvas, run, *keys), run))
    process.start()
    wait_for_line(process, run, 7)  # the file of step 4 is written, but has not got its name
    assert len(list(run.glob("checkpoints/.last.pt.*.part.pt"))) == 1
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and checkpoint_in(run)["step"] == 0
    train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, run, *keys)), resume="auto")
    assert_same_run(straight, run)
    assert [step for step, _ in losses_of(run)] == list(range(1, 13)) and not list(run.rglob("*.part*"))


@pytest.fixture
def failing_writes(monkeypatch):
    """failing_writes(steps): the disk is full when last.pt is written with one of these steps."""

    def arrange(steps):
        real = run_writer.write_checkpoint

        def write(run_dir, name, saved):
            if name == "last.pt" and saved["step"] in steps:
                raise OSError(28, "No space left on device")
            real(run_dir, name, saved)

        monkeypatch.setattr(run_writer, "write_checkpoint", write)

    return arrange


def test_an_error_of_the_thread_is_shown_and_the_next_log_step_tries_again(
    canvas, tmp_path, monkeypatch, failing_writes, capsys
):
    failing_writes({2, 4})
    real, saves = run_writer.RunWriter.save_is_due, []

    def save_is_due(self, is_log_step):
        if self.pending_save:  # so that this test does not depend on the thread's speed
            concurrent.futures.wait([self.pending_save.written])
        due = real(self, is_log_step)
        saves.append((self.run.state.step, due, self.save_failed))
        return due

    monkeypatch.setattr(run_writer.RunWriter, "save_is_due", save_is_due)
    keys = small(canvas, tmp_path / "run", "checkpoint.every=2", "log.every=4", "train.epochs=3")
    train(load_recipe("recipes/barlow.yaml", keys))
    assert saves[:5] == [(1, False, False), (2, False, False), (3, False, True), (4, True, True), (5, False, True)]
    assert checkpoint_in(tmp_path / "run")["step"] == 9
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "the checkpoint of step 2 cannot be written (No space left" in out


@pytest.mark.usefixtures("default_signals")
def test_a_stop_waits_for_the_thread_and_says_what_is_not_saved(canvas, tmp_path, at_step, failing_writes):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run"))
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_writer, "write_checkpoint", run_writer.write_checkpoint)
        failing_writes({2})
        with pytest.raises(UserError, match="Stopped at step 2, which could not be saved"):
            train(recipe)
    assert checkpoint_in(tmp_path / "run")["step"] == 0
    failing_writes({6})
    at_step(-1, None)
    with pytest.raises(UserError, match="is trained, but the result cannot be written"):
        train(recipe, resume="auto")


@pytest.mark.usefixtures("default_signals")
def test_a_stop_leaves_the_step_that_a_slow_thread_writes(canvas, tmp_path, at_step, monkeypatch):
    real = run_writer.write_checkpoint

    def write(run_dir, name, saved):
        threading.Event().wait(0.3)
        real(run_dir, name, saved)

    monkeypatch.setattr(run_writer, "write_checkpoint", write)
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "checkpoint.every=2")))
    assert checkpoint_in(tmp_path / "run")["step"] == 3
    assert checkpoint_in(tmp_path / "run", "previous.pt")["step"] == 2


def test_a_crash_waits_for_the_checkpoint_before_it(canvas, tmp_path, at_step, monkeypatch):
    real = run_writer.write_checkpoint

    def write(run_dir, name, saved):
        threading.Event().wait(0.3)
        real(run_dir, name, saved)

    def crash():
        raise KeyboardInterrupt

    monkeypatch.setattr(run_writer, "write_checkpoint", write)
    at_step(2, crash)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "checkpoint.every=2")))
    assert checkpoint_in(tmp_path / "run")["step"] == 2


def test_every_minutes_counts_from_the_last_checkpoint(canvas, tmp_path, monkeypatch):
    """A step takes 25 s: a minute after a checkpoint is three steps later. Every eighth step is saved in any case."""
    clock, saves = [0.0], []
    real_step, real_save = loop.train_step, run_writer.RunWriter.save

    def step(*arguments):
        clock[0] += 25
        return real_step(*arguments)

    def save(self, *arguments):
        saves.append(self.run.state.step)
        real_save(self, *arguments)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(run_writer.RunWriter, "save", save)
    monkeypatch.setattr(run_writer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    keys = ["checkpoint={every: 8, every_minutes: 1}", "train.epochs=4"]
    train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    assert saves == [0, 3, 6, 8, 11, 12]


def test_a_snapshot_holds_what_the_state_holds(canvas, tmp_path, monkeypatch):
    """Values, strides, tensors with two names, and the versions in a module's state_dict; nothing is shared."""
    compared = []
    real = Snapshot.take

    def take(self, state):
        copied = real(self, state)
        ours, theirs = copied["model"], state["model"]
        compared.append(copied.keys() == state.keys() and all(equal(copied[key], state[key]) for key in state))
        assert type(ours) is type(theirs) and ours._metadata == theirs._metadata
        for name, tensor in ours.items():
            assert tensor.stride() == theirs[name].stride() and tensor.data_ptr() != theirs[name].data_ptr()
        assert len({t.data_ptr() for t in ours.values()}) == len({t.data_ptr() for t in theirs.values()}) < len(ours)
        return copied

    monkeypatch.setattr(Snapshot, "take", take)
    keys = ["embedding.prior=vamp", "embedding.mixture_components=3", "train.ema=0.9", "train.epochs=1"]
    train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    assert compared == [True, True]


class Operations(TorchDispatchMode):
    """Lists the operations on tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function == torch.ops.aten.copy_.default:
            assert arguments[0].device.type == "cpu" and arguments[1].is_cuda and arguments[2]  # non_blocking
            self.names.append("queue a copy")
        elif options.get("pin_memory"):
            self.names.append("pin")
        elif function.namespace == "aten" and function.overloadpacket.__name__ not in ("detach", "clone"):
            self.names.append(str(function))
        return function(*arguments, **options)


def test_a_snapshot_of_a_gpu_waits_for_nothing_and_reuses_its_memory(monkeypatch):
    """On fake tensors: a device that is not there would fail at any value that the CPU reads."""
    calls = []

    class FakeEvent:
        device = torch.device("cuda:1")

        def __init__(self, blocking):
            assert blocking

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    operations, copies = Operations(), Snapshot()
    with FakeTensorMode():
        weight = torch.empty(4, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        state = {"model": {"w": weight, "tied": weight.detach()}, "optimizer": {0: [torch.empty(5, device="cuda"), 3]},
                 "rng": torch.empty(7)}  # fmt: skip
        with operations:
            first = copies.take(state)
            assert operations.names == ["pin", "queue a copy"] * 2
            operations.names.clear()
            second = copies.take(state)
            assert operations.names == ["queue a copy"] * 2
    assert first["model"]["w"] is first["model"]["tied"] is second["model"]["w"]
    assert first["model"]["w"].stride() == weight.stride() and first["model"]["w"].device.type == "cpu"
    assert first["optimizer"][0][1] == 3 and first["rng"] is not second["rng"]
    assert calls == ["record", "record"]
    copies.wait_for_device()
    assert calls[2:] == ["cuda:1", "synchronize"]


def test_a_save_that_is_tried_again_is_not_tried_twice():
    """While the thread writes it, a log step does not ask for another one; after a failure it does."""
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(every_minutes=None))
    writing = SimpleNamespace(written=concurrent.futures.Future())
    writer = SimpleNamespace(
        display=True, save_failed=True, pending_save=writing, saved_at=0, run=SimpleNamespace(recipe=recipe)
    )
    assert not run_writer.RunWriter.save_is_due(writer, True)
    writer.pending_save = None
    assert run_writer.RunWriter.save_is_due(writer, True) and not run_writer.RunWriter.save_is_due(writer, False)
