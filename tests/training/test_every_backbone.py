"""One step of one small model of every kind of norm, and of every kind of head, that timm has."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from training_runs import metrics_of, small

import fastssl
from fastssl.evaluation import (
    evaluate_semisup,
    evaluate_transfer,
    find_evaluation_data,
    find_target,
    load_run_encoder,
)
from fastssl.recipe import load_recipe
from fastssl.training import train

SIZES = {"test_mambaout": 64}  # px, where 32 is too small

# backbone -> a norm that it has, by class name; "" for a network without norms
NORMS = {
    "test_resnet": "BatchNorm2d",
    "test_byobnet": "BatchNormAct2d",
    "test_vit": "LayerNorm",
    "test_convnext": "LayerNorm2d",
    "test_efficientnet_ln": "LayerNormAct2d",
    "test_efficientnet_gn": "GroupNormAct",
    "test_efficientnet_evos": "EvoNorm2dS0",
    "test_vit4": "RmsNorm",
    "test_nfnet": "",
    "cpubone_nano": "GroupNorm1",
    "levit_128s": "BatchNorm1d",
    "swiftformer_xs": "BatchNorm2d",
}
# backbone -> its kind of head
HEADS = {
    "test_efficientnet": "none",
    "test_coatnet": "pooling and a norm",
    "test_mambaout": "pooling, a norm and an MLP",
    "test_vit2": "mean of the tokens",
    "test_vit3": "attention pooling",
    "deit_tiny_distilled_patch16_224": "a distillation token",
    "efficientformerv2_s0": "a distillation classifier",
    "repvit_m1": "a batch norm and a linear layer",
    "mobilenetv3_small_050": "a wider layer before the classifier",
    "crossvit_9_240": "one class token of each branch",
    "test_vit_relpos": "relative positions",
    "swin_tiny_patch4_window7_224": "windows",
}


def step(backbone, canvas, run_dir, *keys):
    """Train one step, and return its metrics and the largest change of a weight of the encoder."""
    size = 240 if backbone.startswith("crossvit") else SIZES.get(backbone, 32)
    recipe = load_recipe(
        "recipes/barlow.yaml",
        [*small(canvas, run_dir, f"model.backbone={backbone}", f"views.size={size}", "train.epochs=1"), *keys,
         "data.limit=4", "train.batch_size=4", "optim.warmup_epochs=0"],
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    before = fastssl.models.build_model(recipe).encoder
    train(recipe)
    after = fastssl.load_encoder(run_dir)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return metrics_of(run_dir)[0], max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("backbone", NORMS)
def test_a_supervised_step_with_every_kind_of_norm(backbone, canvas, tmp_path):
    names = {type(module).__name__ for module in timm.create_model(backbone).modules()}
    assert NORMS[backbone] in names if NORMS[backbone] else not any("Norm2d" in name for name in names)
    metrics, change = step(backbone, canvas, tmp_path / "run", "objective={name: supervised, classes: 3}")
    assert np.isfinite(metrics["loss"]) and change > 0


@pytest.mark.parametrize("backbone", HEADS)
def test_a_self_supervised_step_with_every_kind_of_head(backbone, canvas, tmp_path):
    metrics, change = step(backbone, canvas, tmp_path / "run", "model.projector={layers: 1, hidden: 8, out: 8}")
    assert np.isfinite(metrics["loss"]) and change > 0


def test_models_without_batch_norms_skip_steps_that_are_not_finite(canvas, tmp_path, monkeypatch):
    from fastssl.training.setup import Network

    real = Network.forward

    def not_finite(self, inputs):
        output = real(self, inputs)
        output.terms["loss"] = output.terms["loss"] * float("nan")
        return output

    monkeypatch.setattr(Network, "forward", not_finite)
    metrics, change = step(
        "test_vit", canvas, tmp_path / "run", "objective={name: supervised, classes: 3}", "train.max_skipped_steps=1"
    )
    assert metrics["loss"] is None and metrics["skipped_steps"] == 1 and change == 0
    assert not list(nn.Module.buffers(fastssl.load_model(tmp_path / "run")))


def test_runs_without_batch_norms_are_fine_tuned(canvas, tmp_path):
    keys = small(canvas, tmp_path / "run", "model.backbone=test_vit", "model.projector={layers: 1, hidden: 8, out: 8}")
    recipe = load_recipe("recipes/barlow.yaml", [*keys, "train.epochs=1"])
    encoder = load_run_encoder(train(recipe), device="cpu")
    overrides = ["train.epochs=1", "train.batch_size=8"]
    few = evaluate_semisup(encoder, find_evaluation_data(encoder), percent=50, overrides=overrides)
    transferred = evaluate_transfer(encoder, find_target("same", canvas), "finetune", overrides=overrides)
    for result in (few, transferred):
        assert 0 <= result["metrics"]["accuracy"] <= 1
