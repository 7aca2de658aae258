"""Training: the run directory, every objective, precision, steps that are not finite."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import metrics_of, weights_of
from training_runs import small as small_run

import fastssl
from fastssl.common.errors import UserError
from fastssl.evaluation import probe as probe_module
from fastssl.models import ModelInput
from fastssl.objectives import TotalLoss
from fastssl.recipe import load_recipe
from fastssl.training import setup, train
from fastssl.training.schedule import target_momentum


@pytest.fixture
def small(canvas, tmp_path):
    """Overrides of a recipe that trains 3 steps an epoch, in seconds."""
    return small_run(canvas, tmp_path / "run")


def change_terms(monkeypatch, change):
    """Replace the terms of every loss by change(terms, number of the call)."""
    real, calls = TotalLoss.forward, itertools.count()
    monkeypatch.setattr(TotalLoss, "forward", lambda self, *inputs: change(real(self, *inputs), next(calls)))


def test_contents_of_the_run_directory(small, capsys):
    recipe = load_recipe("recipes/zprob_barlow.yaml", [*small, "model.backbone=resnet18"])
    run = train(recipe, probe=lambda model: {"knn": 0.5})
    lines = metrics_of(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert {"epoch", "on_diagonal", "off_diagonal", "beta_kl", "lr", "images_per_second", "data_wait"} <= set(line)
        assert np.isfinite(line["loss"]) and 0 <= line["data_wait"] <= 1
        assert line["loss"] == pytest.approx(line["on_diagonal"] + line["off_diagonal"] + line["beta_kl"], rel=1e-5)
    assert [line for line in lines if "knn" in line] == [{"step": 6, "epoch": 1, "knn": 0.5}]
    assert load_recipe(run / "recipe.yaml") == recipe
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__.split("+")[0]
    assert Image.open(run / "views.png").width > 100
    assert not list(run.rglob("*.part*"))
    assert " 6/6  " in capsys.readouterr().out

    encoder = timm.create_model("resnet18", num_classes=0)
    encoder.load_state_dict(load_file(run / "encoder.safetensors"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(images), fastssl.load_encoder(run)(images))
    embedding = fastssl.load_model(run).embed(images)
    assert embedding.space == "z" and embedding.mu.shape == embedding.sigma.shape == (2, 32)


@pytest.mark.parametrize("name", ["barlow", "hprob_barlow", "vicreg", "hprob_vicreg", "zprob_vicreg"])
def test_every_objective_trains_and_reloads(small, name):
    run = train(load_recipe(f"recipes/{name}.yaml", [*small, "train.epochs=1"]))
    assert all(np.isfinite(line["loss"]) for line in metrics_of(run))
    model = fastssl.load_model(run)
    embedding = model.embed(torch.rand(2, 3, 32, 32))
    assert embedding.h.shape == (2, model.encoder.num_features)
    assert embedding.space == ("h" if name.startswith("h") else "z" if name.startswith("z") else None)


BEYOND = {
    "hz": ["embedding={stochastic: hz, samples: 3, prior: vamp, mixture_components: 3}"],
    "simclr": ["objective={name: simclr, over_draws: log_mean_exp}", "embedding={stochastic: z, samples: 3}"],
    "byol": ["objective={name: byol, predictor_hidden: 32}", "embedding={stochastic: h, samples: 3, chunk: 2}"],
    "sigreg": ["objective={name: sigreg, slices: 16}", "embedding={stochastic: h, samples: 3, chunk: 2}"],
    "visreg": ["objective={name: visreg, slices: 16}", "embedding={stochastic: z, samples: 3}"],
}
LOSS_TERMS = {
    "hz": ["on_diagonal", "off_diagonal"],
    "simclr": ["nt_xent"],
    "byol": ["prediction"],
    "sigreg": ["invariance", "sigreg"],
    "visreg": ["invariance", "scale", "shape", "center"],
}
SPACES = {"hz": "hz", "simclr": "z", "byol": "h", "sigreg": "h", "visreg": "z"}


@pytest.mark.parametrize("name", BEYOND)
def test_objectives_beyond_the_paper_train_log_and_reload(small, name):
    run = train(load_recipe("recipes/barlow.yaml", [*small, *BEYOND[name], "train.epochs=1", "log.rank_every=1"]))
    lines = metrics_of(run)
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in (*LOSS_TERMS[name], "beta_kl")), rel=1e-5)
        for space in SPACES[name]:
            sigmas = [line[f"{key}_{space}"] for key in ("sigma_min", "sigma", "sigma_max")]
            assert 0.01 <= sigmas[0] <= sigmas[1] <= sigmas[2] <= 5 and 0 <= line[f"sigma_clamped_{space}"] <= 1
            assert line[f"kl_per_dim_{space}"] > 0
        assert 1 <= line["rankme_h"] <= 16 and 1 <= line["rankme_z"] <= 16
    embedding = fastssl.load_model(run).embed(torch.rand(2, 3, 32, 32))
    assert embedding.sigma.shape == embedding.mu.shape
    if name == "byol":  # the target follows
        weights = weights_of(run)
        online, target = (weights[f"{part}projector.0.weight"] for part in ("", "target."))
        assert not torch.equal(online, target) and (online - target).abs().max() < 0.1


@pytest.mark.parametrize("name", ["resnet50_zprob_barlow", "vit_small_zprob_barlow"])
def test_other_backbones_train(small, name):
    keys = [key for key in small if not key.startswith("model.backbone")]
    run = train(load_recipe(f"recipes/beyond/{name}.yaml", [*keys, "train.epochs=1"]))
    assert all(np.isfinite(line["loss"]) for line in metrics_of(run))
    assert fastssl.load_model(run).embed(torch.rand(2, 3, 32, 32)).h.shape == (2, 2048 if "50" in name else 384)


def test_the_probe_on_the_rest_sees_neither_test_nor_training_images(small, monkeypatch):
    """48 training images, 20 of them trained on, 28 probed; data.val is a file that does not exist."""
    keys = ["data.limit=20", "data.val=nowhere.beton", "probe={every: 1, split: rest, k: 3}", "train.epochs=1"]
    recipe = load_recipe("recipes/barlow.yaml", [*small, *keys])
    seen, real = [], probe_module.compute_features

    def watched(*arguments, **options):
        seen.append(real(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(probe_module, "compute_features", watched)
    run = train(recipe, probe=probe_module.knn_probe(recipe))
    assert [line["knn"] for line in metrics_of(run) if "knn" in line]
    bank, rest = (set(features.index.tolist()) for features in seen)
    assert len(bank) == 20 and len(rest) == 28 and not bank & rest
    trained_on = set(torch.cat([b.index for b in setup.training_loader(recipe, torch.device("cpu"))]).tolist())
    assert trained_on <= bank

    with pytest.raises(UserError, match="leaves out none of the 48 images"):
        probe_module.knn_probe(load_recipe("recipes/barlow.yaml", [*small, *keys, "data.limit=48"]))


EVERYTHING = [
    "model.backbone=test_resnet", "objective={name: byol, predictor_hidden: 32, momentum: 0.9}", "train.epochs=4",
    "embedding={stochastic: hz, samples: 3, chunk: 2, prior: vamp, mixture_components: 3, beta_warmup_epochs: 2}",
    "optim={name: lamb, lr: 1e-2}", "checkpoint.every=4",
]  # fmt: skip


def test_a_resume_restores_target_pseudo_features_momentum_and_warm_up(small, tmp_path):
    """Stopped after step 6 of 12, continued from the checkpoint of step 4: the same bits as without a stop."""
    straight = train(load_recipe("recipes/barlow.yaml", [*small, *EVERYTHING]))

    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    arguments = [*small, *EVERYTHING, f"run.dir={tmp_path}/stopped", "probe.every=2"]
    recipe = load_recipe("recipes/barlow.yaml", arguments)
    with pytest.raises(Stop):
        train(recipe, probe=stop)
    resumed = train(recipe, resume=tmp_path / "stopped", probe=lambda model: {})
    before, after = weights_of(straight), weights_of(resumed)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    lines = [[line for line in metrics_of(run) if "loss" in line] for run in (straight, resumed)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    # beta grows over the first 6 of 12 steps; the KL's weight is then 1e-3.
    weights = [line["beta_kl"] / (line["kl_h"] + line["kl_z"]) for line in lines[0]]
    assert weights == pytest.approx([1e-3 * min(1, (step + 1) / 6) for step in range(12)], rel=1e-4)


def test_byol_target_skips_a_skipped_step(small, monkeypatch):
    told, real_update = [], fastssl.models.SSLModel.update_target

    def watched(model, momentum, skip):
        told.append((momentum, bool(skip)))
        real_update(model, momentum, skip)

    change_terms(monkeypatch, lambda terms, step: {**terms, "loss": terms["loss"] / (step != 2)})
    monkeypatch.setattr(fastssl.models.SSLModel, "update_target", watched)
    keys = ["objective={name: byol, predictor_hidden: 32, momentum: 0.9}", "train.max_skipped_steps=1"]
    run = train(load_recipe("recipes/barlow.yaml", [*small, *keys]))
    assert [skip for _, skip in told] == [step == 2 for step in range(6)]
    assert [momentum for momentum, _ in told] == [target_momentum(step, 6, 0.9) for step in range(6)]
    assert all(t.isfinite().all() for t in weights_of(run).values())


def test_beta_warm_up_longer_than_the_run_is_shortened_with_a_warning(small, capsys):
    keys = ["embedding.beta_warmup_epochs=100", "train.epochs=4"]
    run = train(load_recipe("recipes/zprob_barlow.yaml", [*small, *keys]))
    assert "embedding.beta_warmup_epochs=100 is the whole run or more" in capsys.readouterr().out
    last = [line for line in metrics_of(run) if "loss" in line][-1]
    assert last["beta_kl"] == pytest.approx(1e-2 * last["kl_z"], rel=1e-4)


def test_run_older_than_a_key_resumes_with_its_default(small):
    run = train(load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"]))
    path = run / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["recipe"]["embedding"]["free_bits"], saved["recipe"]["train"]["sync_bn"]
    torch.save(saved, path)
    train(load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"]), resume=run)
    saved["recipe"]["train"]["no_such_key"] = 1
    torch.save(saved, path)
    with pytest.raises(UserError, match="does not know"):
        train(load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"]), resume=run)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_weights_and_losses_in_fp32(small, precision):
    run = train(load_recipe("recipes/hprob_barlow.yaml", [*small, "train.epochs=1", f"train.precision={precision}"]))
    assert all(np.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in metrics_of(run))
    assert {t.dtype for t in weights_of(run).values()} == {torch.float32, torch.int64}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["barlow", "zprob_barlow", "hprob_vicreg", *BEYOND])
def test_model_and_loss_compile_in_one_graph(small, name):
    base = "barlow" if name in BEYOND else name
    recipe = load_recipe(f"recipes/{base}.yaml", [*small, *BEYOND.get(name, [])])
    model = fastssl.models.SSLModel(recipe)
    network = setup.Network(model, TotalLoss(recipe), torch.device("cpu"), "fp32")
    views = tuple(torch.randn(2, 8, 3, 32, 32))
    inputs = ModelInput(views, torch.zeros(8, dtype=torch.int64), torch.arange(8), torch.tensor(0))
    loss = torch.compile(network, fullgraph=True, dynamic=False)(inputs).terms["loss"]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.slow
def test_a_compiled_step_trains_as_the_plain_one(small, tmp_path):
    """Compiled kernels round differently: the losses agree to 1e-3, and the views' parameters are the same."""
    losses = []
    for compiled in ("true", "false"):
        arguments = [*small, f"train.compile={compiled}", f"run.dir={tmp_path}/{compiled}"]
        run = train(load_recipe("recipes/zprob_barlow.yaml", arguments))
        losses.append([line["loss"] for line in metrics_of(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_incomplete_torchrun_variables_are_refused(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        train(load_recipe("recipes/barlow.yaml", small))


def test_mixture_prior_learns(small):
    mixture = ["embedding.prior=mixture", "embedding.mixture_components=3"]
    run = train(load_recipe("recipes/zprob_barlow.yaml", [*small, *mixture]))
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert saved["model"]["priors.z.means"].shape == (3, 32)
    torch.manual_seed(0)
    start = fastssl.models.SSLModel(load_recipe(run / "recipe.yaml")).priors["z"].means
    assert not torch.equal(start, saved["model"]["priors.z.means"])


def test_full_layout_trains_with_crops_on_the_cpu(small, full):
    run = train(load_recipe("recipes/barlow.yaml", [*small, f"data.train={full}/train.beton", "train.epochs=1"]))
    assert len(metrics_of(run)) == 3


def test_resume_refuses_another_recipe_and_names_the_keys(small):
    run = train(load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"]))
    other = load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1", "optim.lr=0.5", "seed=3", "log.every=2"])
    with pytest.raises(UserError, match="values of seed, optim.lr"):
        train(other, resume=run)


def test_a_directory_with_a_run_is_not_overwritten(small):
    recipe = load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"])
    run = train(recipe)
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--resume"):
        train(recipe)
    assert (run / "metrics.jsonl").read_text() == before


def test_run_directories_are_numbered_by_default(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in small if not a.startswith("run.dir")]
    recipe = load_recipe("recipes/barlow.yaml", [*arguments, "train.epochs=1", "name=x"])
    assert [str(train(recipe)), str(train(recipe))] == ["runs/x", "runs/x-2"]
    out = capsys.readouterr().out
    assert out.count("exists, so this new run") == 1 and "runs/x exists, so this new run goes to runs/x-2." in out
    assert "train --resume runs/x\n" in out


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned-by-a-checkpoint",)


@pytest.mark.parametrize("kind", ["half", "foreign", "payload", "empty"])
def test_foreign_checkpoint_is_refused_and_runs_no_code(small, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    run = train(load_recipe("recipes/barlow.yaml", [*small, "train.epochs=1"]))
    path = run / "checkpoints" / "last.pt"
    (run / "checkpoints" / "previous.pt").unlink()  # else it replaces the damaged one: test_resume.py
    if kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"model": Payload()} if kind == "payload" else {"state_dict": {}}, path)
    with pytest.raises(UserError, match="checkpoint") as error:
        fastssl.load_model(run)
    assert "\n" not in str(error.value) and not (tmp_path / "owned-by-a-checkpoint").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_terms(small, tmp_path, monkeypatch):
    """The loss becomes NaN at step 3; the checkpoint that is left has finite weights and statistics."""
    nan = float("nan")
    change_terms(monkeypatch, lambda terms, step: {key: t * nan for key, t in terms.items()} if step >= 3 else terms)
    with pytest.raises(UserError, match=r"Step 3 was not finite \(loss=nan, .*untouched"):
        train(load_recipe("recipes/barlow.yaml", small))
    model = fastssl.load_model(tmp_path / "run")
    assert all(t.isfinite().all() for t in model.state_dict().values())

    monkeypatch.undo()  # the cause is gone, but the user has not allowed the steps that were left out
    with pytest.raises(UserError, match="earlier steps"):
        train(load_recipe("recipes/barlow.yaml", small), resume=tmp_path / "run")
    train(load_recipe("recipes/barlow.yaml", [*small, "train.max_skipped_steps=9"]), resume=tmp_path / "run")


def test_allowed_steps_that_are_not_finite_are_skipped_and_counted(small, monkeypatch):
    change_terms(monkeypatch, lambda terms, step: {**terms, "loss": terms["loss"] / (step != 2)})
    run = train(load_recipe("recipes/barlow.yaml", [*small, "train.max_skipped_steps=1"]))
    assert [line["skipped_steps"] for line in metrics_of(run)] == [0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in metrics_of(run)] == [step == 2 for step in range(6)]  # JSON has no NaN
    assert all(t.isfinite().all() for t in weights_of(run).values())


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.device=cuda", "no GPU"),
        ("model.backbone=resnet19", "resnet1"),
        ("data.train=/nowhere/train.beton", "fastssl build-beton"),
        ("train.batch_size=4096", "train.batch_size"),
        ("run.dir=/proc/nowhere", "run.dir"),
    ],
)
def test_user_errors_are_one_sentence(small, override, message):
    if override.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=message) as error:
        train(load_recipe("recipes/barlow.yaml", [*small, override]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("written, resident", [("no", False), ("yes", True), ("auto", False)])
def test_recipe_keys_reach_the_loader(canvas, written, resident):
    """YAML reads yes and no as booleans; auto makes a set resident on a GPU only."""
    recipe = load_recipe(
        "recipes/cifar10/barlow.yaml",
        [f"data.train={canvas}/train.beton", "train.batch_size=8", f"data.resident={written}",
         "data.order=quasi_random", "data.on_bad_sample=skip"],
    )  # fmt: skip
    loader = setup.training_loader(recipe, torch.device("cpu"))
    assert (loader.resident, loader.order, loader.on_bad_sample) == (resident, "quasi_random", "skip")


def test_memory_that_a_step_frees_is_reused():
    """Ten rounds of tensors as large as activations cause page faults in the first round only."""
    script = """
import resource, sys, torch
from fastssl.training.setup import keep_freed_memory
if sys.argv[1] == "reuse":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def a_round():
    tensors = [torch.ones(size << 18) for size in (8, 51, 20, 40, 3)]
a_round()
before = faults()
for _ in range(10):
    a_round()
print(faults() - before)
"""
    counts = [
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("reuse", "default")
    ]
    assert counts[0] < 10_000 < 100_000 < counts[1]
