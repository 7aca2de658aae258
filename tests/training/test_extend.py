"""Runs that go on: a resume without a recipe, and with more epochs than before."""

import os
import signal

import pytest
from training_runs import assert_same_run, checkpoint_in, losses_of, metrics_of, small

from fastssl.common.errors import UserError
from fastssl.recipe import load_recipe
from fastssl.training import train
from fastssl.training.schedule import plan

STEPS = 3  # per epoch


def rates_of(run):
    return [line["lr"] for line in metrics_of(run) if "lr" in line]


def recipe_of(canvas, run, *keys):
    return load_recipe("recipes/barlow.yaml", small(canvas, run, "optim.final_lr_factor=0.1", *keys))


def test_a_resume_needs_no_recipe_and_takes_overrides(canvas, tmp_path, fastssl):
    run = train(recipe_of(canvas, tmp_path / "run", "train.epochs=1"))
    for keys in ([], ["log.every=2"], ["train.epochs=2", "log.every=1"]):
        code, out, err = fastssl("train", "--resume", run, *keys)
        assert code == 0, err
    assert "Extended from 1 to 2 epochs." in out and "(optim.extend=stretch)" in out
    assert [step for step, _ in losses_of(run)] == [1, 2, 3, 4, 5, 6]
    assert load_recipe(run / "recipe.yaml").train.epochs == 2
    assert checkpoint_in(run)["step"] == 6
    for arguments in (["train"], ["train", "train.epochs=2"], ["train", "--resume", "auto"]):
        code, out, err = fastssl(*arguments)
        assert (
            code == 2
            and "train needs a recipe\nhint: name one, such as recipes/zprob_barlow.yaml, or continue a run" in err
        )


def test_stretch_follows_the_schedule_of_the_longer_run_from_the_next_step_on(canvas, tmp_path):
    run = train(recipe_of(canvas, tmp_path / "run", "train.epochs=2"))
    longer = recipe_of(canvas, tmp_path / "run", "train.epochs=4")
    train(longer, resume=run)
    short, _ = plan(load_recipe("recipes/barlow.yaml", ["train.epochs=2", *same_rates()]), STEPS, 2)
    whole, _ = plan(load_recipe("recipes/barlow.yaml", ["train.epochs=4", *same_rates()]), STEPS, 4)
    assert rates_of(run) == [short.rate(step) for step in range(6)] + [whole.rate(step) for step in range(6, 12)]


def test_a_warm_up_that_is_over_is_not_said_again(canvas, tmp_path, capsys):
    said = "optim.warmup_epochs=4 is the whole run or more: shortened to 10% of its steps."
    run = train(recipe_of(canvas, tmp_path / "run", "train.epochs=1", "optim.warmup_epochs=4"))
    assert said in capsys.readouterr().out
    train(recipe_of(canvas, run, "train.epochs=4", "optim.warmup_epochs=4"), resume=run)
    assert "Extended from 1 to 4 epochs" in (out := capsys.readouterr().out) and said not in out


def same_rates():
    return ["train.batch_size=16", "optim.warmup_epochs=1", "optim.final_lr_factor=0.1"]


def test_constant_keeps_the_last_rate_also_after_another_resume(canvas, tmp_path):
    run = train(recipe_of(canvas, tmp_path / "run", "train.epochs=2"))
    for epochs in (3, 5):
        train(recipe_of(canvas, run, f"train.epochs={epochs}", "optim.extend=constant"), resume=run)
    final = 1e-3 * 16 / 256 * 0.1
    assert rates_of(run)[6:] == pytest.approx([final] * 9, rel=1e-9)
    assert len(losses_of(run)) == 15


@pytest.mark.parametrize("extend", ["stretch", "constant"])
def test_an_interrupted_extension_goes_on_as_if_it_had_not_been(canvas, tmp_path, extend, at_step):
    runs = [train(recipe_of(canvas, tmp_path / name, "train.epochs=2")) for name in ("straight", "stopped")]
    recipes = [recipe_of(canvas, run, "train.epochs=4", f"optim.extend={extend}") for run in runs]
    train(recipes[0], resume=runs[0])
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(recipes[1], resume=runs[1])
    train(load_recipe(runs[1] / "recipe.yaml"), resume=runs[1])
    assert_same_run(*runs)


def test_an_unfinished_run_is_extended_too(canvas, tmp_path, at_step):
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(recipe_of(canvas, tmp_path / "run", "train.epochs=2"))
    train(recipe_of(canvas, tmp_path / "run", "train.epochs=3"), resume=tmp_path / "run")
    whole, _ = plan(load_recipe("recipes/barlow.yaml", ["train.epochs=3", *same_rates()]), STEPS, 3)
    assert rates_of(tmp_path / "run")[2:] == [whole.rate(step) for step in range(2, 9)]


def test_fewer_epochs_and_other_keys_are_refused(canvas, tmp_path):
    run = train(recipe_of(canvas, tmp_path / "run", "train.epochs=2"))
    with pytest.raises(
        UserError, match="train.epochs=1, but the run in .* has 2, and a resume can only add epochs: set"
    ):
        train(recipe_of(canvas, run, "train.epochs=1"), resume=run)
    with pytest.raises(UserError, match="other values of optim.lr"):
        train(recipe_of(canvas, run, "train.epochs=3", "optim.lr=1"), resume=run)
    byol = ["objective={name: byol, predictor_hidden: 8}", "train.epochs=1"]
    run = train(recipe_of(canvas, tmp_path / "byol", *byol))
    with pytest.raises(UserError, match="optim.extend=constant leaves BYOL's target where it is"):
        train(recipe_of(canvas, run, *byol, "train.epochs=2", "optim.extend=constant"), resume=run)


@pytest.mark.parametrize("accumulate", [8, 5, 6])
def test_micro_batches_of_one_image_are_refused(accumulate):
    with pytest.raises(UserError, match="micro-batches of one image, .*: lower train.accumulate"):
        load_recipe("recipes/barlow.yaml", [f"train.batch_size={accumulate}", f"train.accumulate={accumulate}"])
    load_recipe("recipes/barlow.yaml", [f"train.batch_size={2 * accumulate}", f"train.accumulate={accumulate}"])


@pytest.mark.parametrize(("processes", "accumulate"), [(4, 1), (2, 2), (1, 2)])
def test_one_image_for_each_process_is_refused(processes, accumulate, canvas, tmp_path, monkeypatch):
    import torch

    from fastssl.training import setup

    monkeypatch.setattr(setup, "world_size", lambda: processes)
    recipe = recipe_of(canvas, tmp_path / "run", "train.batch_size=4", f"train.accumulate={accumulate}")
    if processes * accumulate == 2:
        assert setup.training_loader(recipe, torch.device("cpu")).batch_size == 2
        return
    with pytest.raises(UserError, match="leaves one image for each of .* no batch statistics: set train.batch_size=8"):
        setup.training_loader(recipe, torch.device("cpu"))
