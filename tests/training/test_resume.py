"""Runs that are killed, stopped, or meet a full disk or a damaged checkpoint end with the same bits."""

import os
import pty
import re
import resource
import signal
import subprocess
import termios
import threading
import time
from contextlib import suppress

import pytest
import torch
from training_runs import (
    ENVIRONMENT,
    FORKS,
    PATIENCE,
    assert_same_run,
    checkpoint_in,
    command,
    losses_of,
    metrics_of,
    small,
    start,
    train_jobs,
    wait_for_line,
    weights_of,
)

import fastssl
from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, Stopped, UserError
from fastssl.loading import loader
from fastssl.recipe import load_recipe
from fastssl.training import run_dir, run_writer, train

# Every objective, every space, both learned priors, EMA, micro-batches, growing views, other optimizers. An epoch has
# six steps and every fourth step is saved: in the middle of an epoch, after a probe or before one.
VARIANTS = {
    "barlow": [
        "train.precision=fp32",
        "optim.name=sgd",
        "views.progressive_resize={size: 24, epochs: [0, 3]}",
        "views.size=64",
    ],
    "zprob_barlow": ["embedding.prior=mixture", "embedding.mixture_components=3", "train.ema=0.9"],
    "hprob_vicreg": [
        "train.precision=bf16",
        "data.resident=true",
        "train.accumulate=2",
        "optim.name=lars",
        "optim.lr=0.1",
    ],
    "beyond/zprob_simclr": ["embedding.stochastic=hz", "embedding.prior=vamp", "embedding.mixture_components=3"],
    "supervised": [
        "objective={name: supervised, classes: 3}",
        "embedding={stochastic: h, samples: 3}",
        "optim.head_lr_factor=10",
    ],
    "beyond/hprob_sigreg": ["objective.slices=16", "embedding.samples=3"],
    "beyond/zprob_visreg": ["objective.slices=16", "embedding.samples=3"],
    "beyond/byol": ["objective.predictor_hidden=32", "embedding={stochastic: h, samples: 3}", "optim.name=lamb"],
}


def test_every_objective_killed_and_resumed_equals_undisturbed_bit_for_bit(canvas, canvas_bc4, tmp_path):
    """One process trains them all; it is killed once in each of them, and started again with the same jobs.

    Two train on images in blocks, streamed and resident.
    """
    folders = {"barlow": canvas_bc4, "hprob_vicreg": canvas_bc4}
    shared = ["train.batch_size=8", "train.epochs=4", "checkpoint.every=4", "probe={every: 1, k: 3}", "log.every=1"]

    def start_training(folder):
        jobs = [
            (name, small(folders.get(name, canvas), tmp_path / folder / name, *shared, *more))
            for name, more in VARIANTS.items()
        ]
        process = FORKS.Process(target=train_jobs, args=(jobs,))
        process.start()
        return process

    straight, killed = start_training("straight"), start_training("killed")
    for number, name in enumerate(VARIANTS):
        wait_for_line(killed, tmp_path / "killed" / name, 7 + 2 * number)
        killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        step = checkpoint_in(tmp_path / "killed" / name)["step"]
        assert step % 4 == 0 or step % 6 == 0  # checkpoint.every, or after a probe
        killed = start_training("killed")
    for process in (killed, straight):
        process.join(PATIENCE)
        assert process.exitcode == 0
    for name in VARIANTS:
        one, other = tmp_path / "straight" / name, tmp_path / "killed" / name
        assert_same_run(one, other)
        assert [step for step, _ in losses_of(other)] == list(range(1, 25))
        probes = [[(x["step"], x["knn"]) for x in metrics_of(run) if "knn" in x] for run in (one, other)]
        assert probes[0] == probes[1] and [step for step, _ in probes[0]] == [6, 12, 18, 24]
        assert checkpoint_in(other, "best.pt")["best"] == checkpoint_in(other)["best"]
    assert (tmp_path / "killed" / "zprob_barlow" / "environment.json").read_text().count('"command"') >= 2


def test_sigterm_ends_a_real_process_with_its_step_saved(canvas, tmp_path):
    arguments = small(canvas, tmp_path / "run", "train.epochs=500", "checkpoint.every=100000")
    process = start("zprob_barlow", arguments)
    wait_for_line(process, tmp_path / "run", 4)
    asked = time.time()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_REQUEUE and time.time() - asked < 30
    step = checkpoint_in(tmp_path / "run")["step"]
    assert metrics_of(tmp_path / "run")[-1]["step"] == step >= 4
    assert f"Stopped by SIGTERM after step {step}" in output and "--resume" in output


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_in_a_terminal_leaves_a_whole_panel_and_a_command_that_works(canvas, tmp_path):
    run_dir = tmp_path / "my run"
    process, output = start_in_terminal(command("zprob_barlow", small(canvas, run_dir, "train.epochs=30")))
    wait_for_line(process, run_dir, 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == EXIT_INTERRUPTED
    step = checkpoint_in(run_dir)["step"]
    *above, stopped, resume = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output()).split("\n")[:-1]
    assert stopped == f"Stopped by SIGINT after step {step} of 90, saved. To continue:"
    assert above[-1].startswith("╰") and "╭" in "".join(above[-20:])  # the last panel, as a whole, is above
    done = subprocess.run(resume, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"after step {step} on cpu" in done.stdout and "Done: 90 steps" in done.stdout
    evaluate = re.search("Evaluate: +(.*)", done.stdout)[1]
    done = subprocess.run(evaluate, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and (run_dir / "eval/knn.json").exists(), done.stderr


def start_in_terminal(arguments):
    """Start a process in a terminal of 80 x 24. Returns it, and a function that waits for all of its output."""
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 80))
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    process = subprocess.Popen(arguments, stdin=inside, stdout=inside, stderr=inside, env=environment)
    os.close(inside)
    parts = []

    def read():
        with suppress(OSError):  # the terminal's way to say that the process has ended
            while part := os.read(terminal, 1 << 16):
                parts.append(part)
        os.close(terminal)

    reader = threading.Thread(target=read)
    reader.start()

    def output():
        reader.join(PATIENCE)
        return b"".join(parts).decode().replace("\r\n", "\n").replace("\r", "")

    return process, output


@pytest.fixture(scope="module")
def undisturbed_barlow(canvas, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return train(load_recipe("recipes/barlow.yaml", small(canvas, run_dir, "log.every=4")))


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    "number, code", [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_signal_in_a_step_ends_the_run_after_it_and_the_rest_is_the_same(
    canvas, tmp_path, at_step, undisturbed_barlow, number, code
):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "log.every=4"))
    handler = signal.getsignal(number)
    at_step(1, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped) as stopped:
        train(recipe)
    assert stopped.value.code == code and checkpoint_in(tmp_path / "run")["step"] == 2
    assert signal.getsignal(number) == handler
    at_step(-1, None)
    train(recipe, resume="auto")
    assert_same_run(undisturbed_barlow, tmp_path / "run")


@pytest.mark.usefixtures("default_signals")
def test_a_signal_ends_the_loading_of_a_resident_set(canvas, tmp_path, undisturbed_barlow, monkeypatch):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "log.every=4", "data.resident=true"))
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(loader, "read_pieces", lambda *_: signal.raise_signal(signal.SIGTERM))
        train(recipe)
    assert stopped.value.code == EXIT_REQUEUE and checkpoint_in(tmp_path / "run")["step"] == 0
    train(recipe, resume="auto")
    assert_same_run(undisturbed_barlow, tmp_path / "run")


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(canvas, tmp_path, at_step):
    """As nohup does it."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(1, lambda: signal.raise_signal(signal.SIGHUP))
    try:
        assert len(losses_of(train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run"))))) == 6
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_full_standard_output_does_not_stop_a_run(canvas, tmp_path):
    """As a log file on a full disk."""
    recipe = small(canvas, tmp_path / "run", "train.epochs=1", "name='a[/b] :smile:'")
    with open("/dev/full", "w") as full:
        subprocess.run(command("barlow", recipe), env=ENVIRONMENT, stdout=full, timeout=PATIENCE)
    assert len(losses_of(tmp_path / "run")) == 3 and (tmp_path / "run" / "encoder.safetensors").exists()


def test_a_best_checkpoint_that_could_not_be_written_does_not_count_as_best(canvas, tmp_path, monkeypatch):
    keys = small(canvas, tmp_path / "run", "probe.every=1", "train.epochs=3")
    recipe = load_recipe("recipes/barlow.yaml", keys)
    values, refused = iter([0.9, 0.8, 0.7]), []
    real = run_writer.write_checkpoint

    def write(run_dir, name, saved):
        if name == "best.pt" and not refused:
            refused.append(name)
            raise OSError(28, "No space left on device")
        real(run_dir, name, saved)

    monkeypatch.setattr(run_writer, "write_checkpoint", write)
    train(recipe, probe=lambda model: {"knn": next(values)})
    assert checkpoint_in(tmp_path / "run", "best.pt")["best"] == {"knn": 0.8, "step": 6}
    assert checkpoint_in(tmp_path / "run")["best"] == {"knn": 0.8, "step": 6}


@pytest.mark.usefixtures("default_signals")
def test_a_second_ctrl_c_interrupts_immediately(canvas, tmp_path, at_step):
    at_step(1, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run")))
    assert checkpoint_in(tmp_path / "run")["step"] == 0


def test_a_signal_interrupts_a_probe_and_the_resumed_run_repeats_it(canvas, tmp_path):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "probe.every=1"))
    calls = []

    def probe(model):
        calls.append(len(calls))
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal must not wait for the end of the probe")
        return {"knn": 0.1 * len(calls)}

    with pytest.raises(Stopped):
        train(recipe, probe=probe)
    assert checkpoint_in(tmp_path / "run")["step"] == 3
    train(recipe, resume="auto", probe=probe)
    probes = [(line["step"], line["knn"]) for line in metrics_of(tmp_path / "run") if "knn" in line]
    assert probes == [(3, pytest.approx(0.2)), (6, pytest.approx(0.3))]
    assert checkpoint_in(tmp_path / "run")["best"] == {"knn": pytest.approx(0.3), "step": 6}


@pytest.fixture
def full_disk():
    """full_disk(True): files of this process cannot grow beyond 100 bytes, as on a full disk; False: they can again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def set_full(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else before[0], before[1]))

    yield set_full
    set_full(False)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_gives_one_warning_and_loses_no_line(canvas, tmp_path, at_step, full_disk, monkeypatch):
    """Full from step 2, free again after step 9: lines and checkpoint are written then; the weights are the same."""
    arguments = ["train.epochs=4", "checkpoint.every=2"]
    straight = train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "straight", *arguments)))
    recipe = load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", *arguments))
    saved_while_full = []
    at_step(2, lambda: full_disk(True))
    real_save = run_writer.RunWriter.save

    def save(self, *arguments):
        real_save(self, *arguments)
        self.wait_for_save()
        saved_while_full.append((self.run.state.step, self.save_failed))
        if self.run.state.step == 9:
            full_disk(False)

    messages = []
    # Print nothing while the disk is full: pytest captures it in a file, which could not grow either.
    monkeypatch.setattr(run_writer.RunWriter, "save", save)
    monkeypatch.setattr(run_writer.RunWriter, "print", lambda self, line: messages.append(line))
    monkeypatch.setattr(run_writer.Display, "log", lambda *_: None)
    train(recipe)
    assert_same_run(straight, tmp_path / "run")
    assert (4, True) in saved_while_full and (10, False) in saved_while_full
    warnings = [line for line in messages if line.startswith("warning")]
    assert len([w for w in warnings if "checkpoint" in w]) == 1 and len([w for w in warnings if "metrics" in w]) == 1
    assert not list((tmp_path / "run").rglob("*.part*"))


def test_a_waiting_line_is_written_before_the_next_checkpoint(canvas, tmp_path, at_step, full_disk, monkeypatch):
    """Step 2 meets a full disk; step 3 saves. A killed run then resumes at step 3, so the line must be there."""
    run = tmp_path / "run"
    seen = []

    def look():
        deadline = time.monotonic() + 20
        while checkpoint_in(run)["step"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread writes it
        seen.extend([checkpoint_in(run)["step"], *(line["step"] for line in metrics_of(run))])

    at_step(1, lambda: full_disk(True))
    at_step(2, lambda: full_disk(False))
    at_step(3, look)
    monkeypatch.setattr(run_writer.Display, "print", lambda self, line, wrap=True: None)
    train(load_recipe("recipes/barlow.yaml", small(canvas, run, "log.every=2", "checkpoint.every=3")))
    assert seen == [3, 2]


def damage(path):
    """Flip a bit in the middle of the largest tensor, which torch.load alone would read as a weight."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one_with_a_message(canvas, tmp_path, capsys):
    arguments = ["checkpoint.every=2", "train.epochs=3"]
    recipe = load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", *arguments))
    straight = train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "straight", *arguments)))
    run = train(recipe)
    assert checkpoint_in(run)["step"] == 9 and checkpoint_in(run, "previous.pt")["step"] == 8
    damage(run / "checkpoints" / "last.pt")
    with pytest.warns(UserWarning, match="checksum .* Taking .*previous.pt, of step 8"):
        fastssl.load_model(run)
    train(recipe, resume=run)
    assert "Taking" in capsys.readouterr().out
    assert_same_run(straight, run)

    assert checkpoint_in(run, "previous.pt")["step"] == 8  # not the damaged one
    damage(run / "checkpoints" / "last.pt")
    damage(run / "checkpoints" / "previous.pt")
    with pytest.raises(UserError, match="last.pt is not a readable checkpoint"):
        train(recipe, resume=run)
    (run / "checkpoints" / "last.pt").unlink()  # killed between the two renames of a save
    (run / "checkpoints" / "previous.pt").write_bytes((straight / "checkpoints" / "last.pt").read_bytes())
    assert fastssl.load_model(run) is not None


def test_a_list_with_the_right_keys_is_not_a_checkpoint(canvas, tmp_path):
    path = tmp_path / "list.pt"
    torch.save(["recipe", "model", "step"], path)
    with pytest.raises(UserError, match="is not a checkpoint of fastssl"):
        fastssl.load_model(path)
    run = train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1")))
    saved = checkpoint_in(run)
    for odd in (torch.zeros(2), {"x": torch.zeros(2, 2).to_sparse()}):
        torch.save({**saved, "ema": odd}, path)
        keys = small(canvas, tmp_path / "new", f"model.init={path}")
        with pytest.raises(UserError, match=r"is a damaged checkpoint \(ema"):
            train(load_recipe("recipes/barlow.yaml", keys))
        with pytest.raises(UserError, match=r"is a damaged checkpoint \(ema"):
            fastssl.load_model(path)


def test_auto_starts_a_run_and_returns_immediately_when_it_is_finished(canvas, tmp_path, capsys):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1"))
    for _ in range(2):
        assert train(recipe, resume="auto") == tmp_path / "run"
    assert len(metrics_of(tmp_path / "run")) == 3
    out = capsys.readouterr().out
    assert "Training barlow" in out and "Done: 3 steps" in out and "Already finished: 3 steps" in out


def test_auto_without_run_dir_means_the_first_directory_of_the_name(canvas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in small(canvas, tmp_path, "train.epochs=1", "name=x") if not a.startswith("run.dir")]
    recipe = load_recipe("recipes/barlow.yaml", arguments)
    assert [str(train(recipe, resume="auto")) for _ in range(2)] == ["runs/x", "runs/x"]
    # After a restart by torchrun, a plain command finds the directory that it made before: the last one.
    assert str(train(recipe)) == "runs/x-2"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert str(train(recipe)) == "runs/x-2"


def test_two_processes_never_train_in_one_directory(canvas, tmp_path):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "probe.every=1"))

    def probe(model):
        with pytest.raises(run_dir.RunDirBusy, match="Another process is training"):
            train(recipe, resume=tmp_path / "run")
        return {"asked": 1.0}

    train(recipe, probe=probe)
    assert [line["asked"] for line in metrics_of(tmp_path / "run") if "asked" in line] == [1, 1]


def test_a_run_resumes_with_moved_data_but_not_with_other_data(canvas, canvas_jpeg, tmp_path):
    run = train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1")))
    moved = tmp_path / "moved.beton"
    moved.write_bytes((canvas / "train.beton").read_bytes())
    for path in (moved, canvas_jpeg / "train.beton"):
        keys = small(canvas, tmp_path / "run", "train.epochs=1", f"data.train={path}")
        if path == moved:
            train(load_recipe("recipes/barlow.yaml", keys), resume=run)
        else:
            with pytest.raises(UserError, match="does not hold the images"):
                train(load_recipe("recipes/barlow.yaml", keys), resume=run)


def test_epoch_checkpoints_and_the_average_of_the_weights(canvas, tmp_path):
    """load_model and encoder.safetensors return the running average, computed here from the weights of each step."""
    arguments = ["train.ema=0.6", "train.epochs=2", "checkpoint={every: 1, keep: 1}"]
    arguments += ["embedding.prior=vamp", "embedding.mixture_components=3"]  # it shares its head's tensors
    recipe = load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", *arguments))
    seen = []
    real = run_writer.RunWriter.save

    def save(self, *arguments):
        real(self, *arguments)
        seen.append((self.run.state.step, {k: v.clone() for k, v in self.run.state.model.state_dict().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_writer.RunWriter, "save", save)
        run = train(recipe)
    by_step = dict(seen)
    average = {k: v.double() for k, v in by_step[0].items()}
    for step in range(6):
        decay = min(0.6, (1 + step) / (10 + step))
        average = {k: decay * v + (1 - decay) * by_step[step + 1][k].double() for k, v in average.items()}
    given = fastssl.load_model(run).state_dict()
    for name, tensor in given.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-4, atol=1e-6)
    assert not equal_weights(given, weights_of(run))
    assert [p.name for p in sorted((run / "checkpoints").glob("epoch-*.pt"))] == ["epoch-0001.pt", "epoch-0002.pt"]
    assert checkpoint_in(run, "epoch-0001.pt")["step"] == 3
    assert equal_weights(fastssl.load_model(run / "checkpoints" / "epoch-0002.pt").state_dict(), given)


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("source", ["run", "checkpoint", "encoder.safetensors"])
def test_init_starts_a_new_run_from_weights(canvas, tmp_path, source, capsys):
    """Step 0 has the old weights. The step, the optimizer and a head that the old run lacked are new."""
    old = train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "old", "train.epochs=1")))
    path = {"run": old, "checkpoint": old / "checkpoints" / "last.pt"}.get(source, old / source)
    keys = small(canvas, tmp_path / "new", "train.epochs=1", f"model.init={path}", "seed=5")
    run = train(load_recipe("recipes/zprob_barlow.yaml", keys))
    begun = checkpoint_in(run, "previous.pt")  # the one of step 0; the last has step 3
    assert begun["step"] == 0 and not begun["optimizer"]["state"] and losses_of(run)[0][0] == 1
    before, after = weights_of(old), begun["model"]
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert same >= {name for name in before if name.startswith("encoder.")}
    linear = next(name for name in before if name.startswith("projector.") and before[name].ndim == 2)
    assert (linear in same) == (source != "encoder.safetensors")
    assert f"Starting from {path}" in capsys.readouterr().out


def test_init_refuses_another_encoder_and_unreadable_files(canvas, tmp_path):
    old = train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "old", "train.epochs=1")))
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    for init, keys, says in (
        (old, ["model.backbone=resnet18"], "model.init: .* holds a test_resnet: set model.backbone=test_resnet"),
        (text, [], "not a readable safetensors"),
        (tmp_path / "nowhere", [], "holds no checkpoint"),
    ):
        arguments = small(canvas, tmp_path / "new", f"model.init={init}", *keys)
        with pytest.raises(UserError, match=says):
            train(load_recipe("recipes/barlow.yaml", arguments))
        assert not (tmp_path / "new").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(canvas, tmp_path):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1"))
    run = train(recipe)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    train(recipe, resume=run)
    assert [step for step, _ in losses_of(run)] == [1, 2, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        train(recipe, resume=tmp_path / "empty")


def test_a_restart_takes_over_its_own_run_only(canvas, tmp_path, monkeypatch):
    """torchrun also restarts a process that ended with exit code 2, which must not continue somebody else's run."""
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1"))
    train(recipe)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "run" / ".lock").write_text("elsewhere 1")
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)


def test_a_probe_that_is_switched_on_by_a_resume_waits_for_the_end_of_the_epoch(canvas, tmp_path, at_step):
    keys = small(canvas, tmp_path / "run", "train.epochs=3")
    at_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(load_recipe("recipes/barlow.yaml", keys))
    assert checkpoint_in(tmp_path / "run")["step"] == 5  # in the middle of the second epoch
    train(load_recipe("recipes/barlow.yaml", [*keys, "probe.every=1"]), resume="auto", probe=lambda model: {"knn": 0.5})
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "knn" in line] == [6, 9]


def test_an_encoder_that_cannot_be_written_is_one_sentence(canvas, tmp_path, monkeypatch):
    recipe = load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", "train.epochs=1"))

    def no_space(path, write):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_writer, "write_atomically", no_space)
        with pytest.raises(UserError, match="is trained, but the result cannot be written"):
            train(recipe)
    train(recipe, resume="auto")
    assert (tmp_path / "run" / "encoder.safetensors").exists()
