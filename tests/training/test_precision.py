"""bf16 on CPUs: what stays fp32, and a run that goes on where train.precision=auto means something else."""

import json
import shutil
import signal

import pytest
import torch
from training_runs import assert_same_run, checkpoint_in, small

import fastssl
from fastssl.common.errors import Stopped, UserError
from fastssl.models import SSLModel
from fastssl.recipe import load_recipe
from fastssl.training import setup, train
from fastssl.training.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(has_bf16=...): from here on the CPU has bf16 instructions, or has none."""
    return lambda has_bf16: monkeypatch.setattr(setup, "cpu_has_bf16", lambda: has_bf16)


def recipe_of(canvas, run_dir, *more):
    return load_recipe("recipes/zprob_barlow.yaml", small(canvas, run_dir, "train.accumulate=2", *more))


def on_one_line(text):
    return " ".join(text.split())


def test_a_run_that_goes_on_on_another_cpu(canvas, tmp_path, machine, at_step, capsys):
    """It says that auto has another meaning there; pinned, it ends with the bits of a run on one machine."""
    machine(has_bf16=True)
    straight = train(recipe_of(canvas, tmp_path / "straight"))
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(recipe_of(canvas, tmp_path / "run"))
    at_step(-1, None)
    assert "Training zprob_barlow on cpu (bf16)" in capsys.readouterr().out
    run, pinned = tmp_path / "run", tmp_path / "pinned"
    assert json.loads((run / "environment.json").read_text())["precision"] == "bf16"
    assert checkpoint_in(run)["precision"] == "bf16"
    shutil.copytree(run, pinned)

    machine(has_bf16=False)
    train(recipe_of(canvas, run), resume=run)
    said = on_one_line(capsys.readouterr().out)
    assert "trained in bf16 before and goes on in fp32" in said and "(train.precision=bf16 keeps bf16)" in said
    assert checkpoint_in(run)["precision"] == "fp32"

    train(recipe_of(canvas, pinned, "train.precision=bf16"), resume=pinned)
    said = on_one_line(capsys.readouterr().out)
    assert "before and goes on" not in said and "train.precision=fp32 is faster on this CPU" in said
    assert_same_run(straight, pinned)
    with pytest.raises(UserError, match="other values of train.precision"):
        train(recipe_of(canvas, pinned, "train.precision=fp32", "train.epochs=3"), resume=pinned)


def test_a_checkpoint_that_does_not_say_its_precision_is_of_before_bf16_on_cpus(
    canvas, tmp_path, machine, at_step, monkeypatch, capsys
):
    machine(has_bf16=False)
    to_dict = TrainState.state_dict

    def without_precision(state):
        return {key: value for key, value in to_dict(state).items() if key != "precision"}

    monkeypatch.setattr(TrainState, "state_dict", without_precision)
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(recipe_of(canvas, tmp_path / "run"))
    at_step(-1, None)
    assert "precision" not in checkpoint_in(tmp_path / "run")
    machine(has_bf16=True)
    train(recipe_of(canvas, tmp_path / "run"), resume=tmp_path / "run")
    assert "trained in fp32 before and goes on in bf16" in on_one_line(capsys.readouterr().out)


def test_only_encoder_and_projector_compute_in_bf16(canvas, tmp_path):
    """Weights, statistics, gradients, heads, draws, losses and the optimizer's averages are fp32."""
    run, _ = setup.prepare(recipe_of(canvas, tmp_path / "run", "train.precision=bf16"), CPU, None)
    model, seen = run.state.model, {}
    assert isinstance(model, SSLModel)

    def note(name):
        return lambda module, inputs, output: seen.setdefault(name, output)

    for name in ("encoder", "projector"):
        getattr(model, name).register_forward_hook(note(name))
    model.heads["z"].register_forward_hook(note("head"))
    batch = next(iter(run.state.loader))
    inputs = fastssl.models.ModelInput(run.views(batch, 0), batch.label, batch.index, torch.tensor(0))
    assert {view.dtype for view in inputs.views} == {torch.float32}
    terms, _ = run.network(inputs)
    terms["loss"].backward()
    assert seen["encoder"].dtype == seen["projector"].dtype == torch.bfloat16
    assert seen["head"].mu.dtype == seen["head"].log_var.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    run.state.optimizer.step()
    averages = [state["exp_avg_sq"] for state in run.state.optimizer.state.values()]
    assert {average.dtype for average in averages} == {torch.float32}
    assert not run.state.scaler.is_enabled()


def test_features_are_fp32_whatever_training_was(canvas, tmp_path):
    """A model that was trained in bf16 embeds as its weights do in fp32."""
    run = train(recipe_of(canvas, tmp_path / "run", "train.precision=bf16", "train.epochs=1"))
    model, images = fastssl.load_model(run), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    h, mu, sigma, _ = model.embed(images)
    assert h.dtype == mu.dtype == sigma.dtype == torch.float32
    exact = fastssl.load_model(run).double().encoder.eval()(images.double())
    torch.testing.assert_close(h.double(), exact, rtol=1e-4, atol=1e-5)  # bf16 would be off by 4e-3
