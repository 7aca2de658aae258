"""Functions of step and epoch: learning rates (see also test_optim.py), warm-ups, sizes; and setting up a run."""

import json

import pytest
import torch
from training_runs import losses_of, metrics_of, small, weights_of

import fastssl
from fastssl.common.distributed import combine
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader
from fastssl.models import ModelInput, SSLModel
from fastssl.objectives import TotalLoss
from fastssl.recipe import ViewsConfig, load_recipe
from fastssl.training import setup, train
from fastssl.training.schedule import image_size, plan
from fastssl.views import PairedViews


def test_views_grow_in_steps_of_32_pixels_between_the_two_epochs():
    views = ViewsConfig(size=224, progressive_resize={"size": 160, "epochs": [2, 8]})
    assert [image_size(views, epoch) for epoch in range(10)] == [160] * 5 + [192] * 3 + [224] * 2
    assert image_size(ViewsConfig(size=96), 0) == 96
    odd = ViewsConfig(size=100, progressive_resize={"size": 50, "epochs": [0, 2]})  # neither end is a multiple of 32
    assert [image_size(odd, epoch) for epoch in range(3)] == [50, 50, 100]


def test_learning_rate_follows_the_global_batch_and_short_warm_ups_stay():
    recipe = load_recipe("recipes/barlow.yaml", ["train.batch_size=64", "optim.lr=0.4", "train.epochs=10"])
    schedule, warnings = plan(recipe, steps_per_epoch=5, decay_epochs=10)
    assert (schedule.total_steps, schedule.warmup_steps, schedule.peak_rate, warnings) == (50, 20, 0.1, [])
    assert schedule.rate(19) == pytest.approx(0.1) and schedule.rate(0) == pytest.approx(0.1 / 20)


def test_a_shortened_warm_up_is_said_until_it_is_over():
    recipe = load_recipe("recipes/barlow.yaml", ["train.epochs=4"])  # its warm-up takes 4

    def said(step, steps_per_epoch=10):
        _, warnings = plan(recipe, steps_per_epoch, decay_epochs=4, step=step)
        return "optim.warmup_epochs=4 is the whole run or more: shortened to 10% of its steps." in warnings

    assert said(0) and said(3) and not said(4)
    assert said(0, steps_per_epoch=1)  # shortened to no step at all


@pytest.mark.parametrize("crop", ["gpu", "cpu"])
def test_the_encoder_sees_the_sizes_that_the_recipe_names(canvas, full, tmp_path, monkeypatch, crop):
    """Crops on either device have the size of the epoch."""
    data = canvas if crop == "gpu" else full
    keys = [
        "views.size=96",
        "views.progressive_resize={size: 32, epochs: [0, 2]}",
        "train.epochs=3",
        f"data.crop={crop}",
    ]
    recipe = load_recipe("recipes/barlow.yaml", small(data, tmp_path / "run", *keys))
    seen, real = [], SSLModel.forward

    def watched(self, inputs):
        v1, v2 = inputs.views
        seen.append((int(inputs.step), v1.shape[-1], v2.shape[-1]))
        return real(self, inputs)

    monkeypatch.setattr(SSLModel, "forward", watched)
    train(recipe)
    assert seen == [(step, size, size) for step, size in enumerate([32] * 3 + [64] * 3 + [96] * 3)]


def test_micro_batches_share_one_step(canvas, tmp_path):
    """One step of two micro-batches: the mean of their losses, and SGD on the mean gradient."""
    keys = ["train.accumulate=2", "optim={name: sgd, lr: 0.1, warmup_epochs: 0, clip: null, weight_decay: 0}"]
    keys += ["train.epochs=1", "train.batch_size=32", "train.precision=fp32"]
    recipe = load_recipe("recipes/vicreg.yaml", small(canvas, tmp_path / "run", *keys))
    run = train(recipe)
    assert len(losses_of(run)) == 1  # 48 images: one step of 32, and a micro-batch too few for another

    torch.manual_seed(recipe.seed)
    model = SSLModel(recipe)
    total_loss, views, losses, step = TotalLoss(recipe), PairedViews(recipe.views, recipe.seed), [], torch.tensor(0)
    for batch, _ in zip(BetonLoader(recipe.data.train, 16, seed=recipe.seed), range(2)):
        both = views(batch.image, batch.index, 0, batch.height, batch.width)
        outputs = model(ModelInput(both, batch.label, batch.index, step))
        losses.append(total_loss(outputs, model.priors, step)["loss"])
    mean = sum(losses) / 2
    mean.backward()
    assert losses_of(run)[0][1] == pytest.approx(mean.item(), rel=1e-5)
    rate = 0.1 * 32 / 256  # of the first and only step
    trained = weights_of(run)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.data - rate * parameter.grad, rtol=1e-4, atol=1e-5)


def test_combine_takes_means_minima_and_maxima():
    values = torch.tensor([[1.0, 0.2, 3.0], [2.0, 0.1, 4.0]])
    assert combine(["loss", "sigma_min_z", "sigma_max"], values).tolist() == pytest.approx([1.5, 0.1, 4.0])
    assert combine(["rankme", "minimum", "maxed"], values).tolist() == pytest.approx([1.5, 0.15, 3.5])


@pytest.mark.parametrize(
    "keys, message",
    [
        (["train.precision=tf32"], "train.precision=tf32"),
        (
            ["model.backbone=vit_tiny_patch16_224", "views.progressive_resize={size: 16, epochs: [0, 1]}"],
            "views.progressive_resize: vit_tiny",
        ),
        (["train.batch_size=24", "train.accumulate=12", "data.limit=20"], "fewer than one batch of 24"),
    ],
)
def test_wrong_combinations_are_refused_before_training(canvas, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key, message",
    [
        ("train.accumulate=3", "train.accumulate=3 does not divide train.batch_size=256"),
        ("train={cuda_graphs: true, compile: false}", "leave out train.compile=false"),
        ("train={cuda_graphs: true, accumulate: 2}", "no gradients between micro-batches"),
        ("views.progressive_resize={size: 224, epochs: [0, 1]}", "a size below views.size=224"),
        ("views.progressive_resize={size: 64, epochs: [3, 1]}", "epochs that rise"),
        ("log.to=[tensorbord]", "tensorboard"),
    ],
)
def test_contradictory_keys_are_refused(key, message):
    with pytest.raises(UserError, match=message):
        load_recipe("recipes/barlow.yaml", [key])


def test_a_damaged_sample_stops_the_run_with_its_name_and_a_checkpoint(canvas_jpeg, tmp_path):
    """Behind the first epoch's start: the error names file, index and image; the run can go on later."""
    for name in ("train.beton", "train.beton.json", "train.beton.names.txt"):
        (tmp_path / name).write_bytes((canvas_jpeg / name).read_bytes())
    loader = BetonLoader(tmp_path / "train.beton", 16)
    row = 7
    sample = loader.samples.at([row])
    begin, size, index = (int(column[0]) for column in (sample.start_B, sample.size_B, sample.index_B))
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(begin)
        file.write(bytes(int(size)))
    recipe = load_recipe("recipes/barlow.yaml", small(tmp_path, tmp_path / "run"))
    with pytest.raises(UserError, match=rf"the sample with index {index} \(.*\.jpg\).* cannot be decoded"):
        train(recipe)
    assert fastssl.load_model(tmp_path / "run") is not None


@pytest.mark.slow
def test_compilations_are_counted_and_logged(canvas, tmp_path):
    """Two sizes of views: the second one compiles the step again, and nothing breaks a graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    keys = ["train.compile=true", "views.size=64", "views.progressive_resize={size: 32, epochs: [0, 1]}"]
    run = train(load_recipe("recipes/zprob_barlow.yaml", small(canvas, tmp_path / "run", *keys)))
    counts = [(line["graphs"], line["graph_breaks"]) for line in metrics_of(run)]
    assert counts == [(2, 0)] * 3 + [(4, 0)] * 3  # views and step
    assert metrics_of(run)[-1]["recompiled"] >= 1
    assert json.loads((run / "environment.json").read_text())["device"]


def test_processes_with_different_checkpoints_do_not_train(canvas, tmp_path, monkeypatch):
    """A network file system may show one host an older file: here, the main process is one step ahead."""
    monkeypatch.setattr(setup, "broadcast_from_main", lambda make: make() + 1)
    with pytest.raises(UserError, match="found different checkpoints"):
        train(load_recipe("recipes/barlow.yaml", small(canvas, tmp_path / "run")))


@pytest.mark.parametrize(
    "keys, measures", [([], True), (["views.progressive_resize={size: 32, epochs: [0, 2]}"], False)]
)
def test_cudnn_measures_its_algorithms_for_images_of_one_size(keys, measures, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not measures)
    recipe = load_recipe("recipes/barlow.yaml", ["views.size=96", *keys])
    setup.choose_convolutions(recipe, torch.device("cpu"))
    assert torch.backends.cudnn.benchmark == (not measures)
    setup.choose_convolutions(recipe, torch.device("cuda"))
    assert torch.backends.cudnn.benchmark == measures


@pytest.mark.parametrize("has_bf16, best, others", [(True, "bf16", ["fp16"]), (False, "fp32", ["bf16", "fp16"])])
def test_choose_precision(monkeypatch, has_bf16, best, others):
    """bf16 on a GPU and on a CPU that has it; what a CPU only emulates costs a warning."""
    monkeypatch.setattr(setup, "cpu_has_bf16", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert setup.choose_precision("auto", cpu) == best
    assert setup.choose_precision("auto", torch.device("cuda")) == "bf16"
    for precision in ("fp32", "bf16", "fp16"):
        assert setup.choose_precision(precision, cpu) == precision
        (warning,) = setup.slow_precision(precision, cpu) or [""]
        assert (f"train.precision={best} is faster" in warning) == (precision in others)
        assert not setup.slow_precision(precision, torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_one_cpu_without_bf16_decides_for_all_processes(monkeypatch):
    monkeypatch.setattr(setup, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(setup, "any_rank", lambda flag: True)
    assert setup.choose_precision("auto", torch.device("cpu")) == "fp32"
    assert setup.choose_precision("bf16", torch.device("cpu")) == "bf16"
