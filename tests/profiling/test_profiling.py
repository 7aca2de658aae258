"""`fastssl profile` on runs whose slow part is known, because it was made slow; and its parts one by one."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_runs import ENVIRONMENT, SMALL

from fastssl.beton import build_beton, read_header
from fastssl.common import randomness, terminal
from fastssl.loading import BetonLoader, kernels
from fastssl.loading.samples import Samples
from fastssl.models.small_convolution import use_plain_convolutions
from fastssl.profiling import device_stages, loader_stages, peaks, profile_recipe, profiler, read_profile
from fastssl.profiling.bottleneck import Cost, CostModel, Setup, describe_bottleneck, suggest_fixes
from fastssl.profiling.end_to_end import Training
from fastssl.profiling.loader_stages import worker_counts
from fastssl.profiling.profile import STAGES, StageResult, Stages
from fastssl.profiling.storage import STILL_CACHED, StorageStage, share_in_page_cache
from fastssl.profiling.trace import STEPS, write_trace
from fastssl.recipe import load_recipe
from fastssl.training import train
from fastssl.training.meters import DataWaitWarning
from fastssl.training.setup import Network, TrainingViews, prepare

BATCH = 4


@pytest.fixture(scope="module")
def photos_640(photos, tmp_path_factory):
    """640 images as JPEGs of 96 px: 160 batches per epoch, decoded by threads."""
    root, out = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("many_beton")
    files = sorted((photos / "train").rglob("*.jpg"))
    (root / "train").mkdir()
    for number in range(640):
        shutil.copy(files[number % len(files)], root / "train" / f"{number:03}.jpg")
    build_beton("imagefolder", root, out, canvas=96, codec="jpeg", workers=1)
    return out


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(profiler, "WINDOW", {"short": 0.05, "step": 0.1, "end_to_end": 0.3})
    monkeypatch.setattr(profiler, "ROUNDS", (2, 2))
    monkeypatch.setattr(loader_stages, "PREPARED", 8)
    monkeypatch.setattr(profiler, "peak_flops", lambda device, precision: (1e11, "not measured in tests"))
    monkeypatch.setattr(profiler, "OTHERS_SECONDS", 0.05)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(folder, *more):
    keys = [f"data.train={folder}/train.beton", "data.val=null", "data.workers=2", f"train.batch_size={BATCH}"]
    return load_recipe("recipes/zprob_barlow.yaml", [*SMALL, *keys, "embedding.stochastic=none", *more])


@pytest.mark.parametrize("keys", [["objective={name: supervised, classes: 3}", "optim.head_lr_factor=10"], []])
def test_a_model_without_batch_norms_is_profiled(canvas, keys):
    recipe = recipe_of(canvas, "model.backbone=test_vit", "model.projector={layers: 1, hidden: 8, out: 8}", *keys)
    measured = profile_recipe(recipe)
    assert measured.stages.step.images_per_second.median > 0


def slow_down(monkeypatch, seconds):
    """Let each part sleep for some seconds per batch before its work: a resource of its own, whose speed is known."""

    def sleep_first(owner, name, part):
        work = getattr(owner, name)

        def slow(*arguments):
            time.sleep(seconds[part])
            return work(*arguments)

        monkeypatch.setattr(owner, name, slow)

    sleep_first(kernels, "decode_images", "decode")
    sleep_first(kernels, "copy_images", "decode")
    sleep_first(BetonLoader, "_assemble", "transfer")
    sleep_first(TrainingViews, "__call__", "views")
    sleep_first(Network, "forward", "step")


def best_window(profile):
    """Images/s of the best window end to end: whatever else runs on a machine can only make the others slower."""
    return profile.stages.end_to_end.images_per_second.high


def test_the_bottleneck_is_the_part_that_was_made_twice_as_slow(photos_640, monkeypatch):
    """The device works for a unit of time per batch, half of it on views; threads and reader for three quarters. Then
    one part takes twice as long. The gain that the profile predicts for fixing it is that of the undamaged run.

    Network and views only sleep here: how fast real ones are depends on whatever else runs on this machine.
    """
    monkeypatch.setattr(
        Network, "forward", lambda self, inputs: ({"loss": a_weight(self).square().sum()}, inputs.views[0])
    )
    views = (torch.zeros(BATCH, 3, 8, 8),) * 2
    monkeypatch.setattr(TrainingViews, "__call__", lambda self, batch, epoch: views)
    monkeypatch.setattr(profiler, "ROUNDS", (3, 3))  # more windows, of which the best counts
    recipe, unit = recipe_of(photos_640), 0.040
    base = dict(decode=0.75 * unit, transfer=0.75 * unit, views=unit / 2, step=unit / 2)
    with monkeypatch.context() as patch:
        slow_down(patch, base)
        sound = profile_recipe(recipe)
    for part in base:
        seconds_per_batch = BATCH / getattr(sound.stages, part).rate
        with monkeypatch.context() as patch:
            slow_down(patch, {**base, part: base[part] + seconds_per_batch})
            damaged = profile_recipe(recipe)
        assert damaged.bottleneck.stage == part, damaged.bottleneck.sentence
        predicted = damaged.bottleneck.twice_as_fast[part] / damaged.prediction.predicted_images_per_second
        assert predicted == pytest.approx(best_window(sound) / best_window(damaged), rel=0.15), part


def a_weight(network):
    return next(network.parameters())


def test_costs_add_up_on_one_resource_and_overlap_on_several():
    costs = CostModel(
        {
            "decode": Cost(3, 4),
            "cpu_augment": Cost(2, 2),
            "transfer": Cost(1, 1),
            "views": Cost(2, 0),
        },
        cores=2,
    )
    # The threads also wait for the disk.
    assert CostModel({**costs.stages, "storage": Cost(6, 0)}, cores=2).resource_seconds()["threads"] == 11
    assert costs.resource_seconds() == {
        "disk": 0,
        "threads": 5,
        "reader": 1,
        "device": 2,
        "main_thread": 0,
        "cores": 3.5,
    }
    assert costs.images_per_second() == 1 / 5 and costs.bottleneck() == "decode" and not costs.is_balanced()
    assert costs.with_speedup("decode", 3).images_per_second() == 1 / 3
    # With one core for everything, the stage that takes most of its time is the bottleneck.
    assert (
        CostModel(costs.stages, cores=1).images_per_second() == 1 / 7
        and CostModel(costs.stages, cores=1).bottleneck() == "decode"
    )
    # Small raw images are decoded by the reader.
    in_reader = CostModel(costs.stages, cores=2, decodes_in_reader=True)
    assert in_reader.resource_seconds()["threads"] == 0 and in_reader.resource_seconds()["reader"] == 6
    assert CostModel(costs.stages, cores=2, processes=8).images_per_second() == 8 / 5
    assert CostModel({"decode": Cost(1.05, 0), "step": Cost(1, 0)}, cores=2).is_balanced()


def test_cores_are_not_advised_where_one_thread_decodes():
    stages = {"decode": Cost(1e-4, 1e-4), "transfer": Cost(1e-5, 1e-5), "views": Cost(1e-5), "step": Cost(4e-5)}
    costs = CostModel(stages, cores=16, decodes_in_reader=True)
    advice = suggest_fixes(costs, Setup(workers=16, layout="canvas", storage="raw", on_gpu=True))
    assert "core" not in advice and "a larger train.batch_size" in advice


SETUP = Setup(workers=2, layout="full", storage="jpg", on_gpu=True, compiled=True, precision="bf16")


@pytest.mark.parametrize(
    "stages, setup, verdict, advice",
    [
        (
            {"decode": Cost(2.1e-3, 4.2e-3), "step": Cost(1e-3)},
            SETUP,
            "Image decoding is the bottleneck (100 % of the time; the GPU is idle for 52 %). Halving its cost would "
            "double throughput; the next limit is the training step at 1,000 images/s.",
            "What helps: 3 more CPU cores or a canvas file instead of the full one (build-beton --codec bc4).",
        ),
        (
            {"decode": Cost(2e-3, 1e-4), "step": Cost(1e-3)},
            replace(SETUP, layout="canvas"),
            "Image decoding is the bottleneck (100 % of the time;",
            "2 more CPU cores or a canvas file in blocks, which need no decoding (build-beton --codec bc4).",
        ),
        (
            {"decode": Cost(2.1e-3, 4.2e-3), "step": Cost(1e-3)},
            replace(SETUP, layout="canvas", storage="bc4", crops_on_cpu=True),
            "Image decoding is",
            "3 more CPU cores or data.crop=gpu.",
        ),
        (
            {"copy_images": Cost(2.1e-3, 4.2e-3), "step": Cost(1e-3)},
            replace(SETUP, layout="canvas", storage="bc4"),
            "Image copying is the bottleneck",
            "3 more CPU cores or a smaller --canvas.",
        ),
        (
            {"step": Cost(2e-3), "copy_images": Cost(1e-3)},
            replace(SETUP, layout="canvas", storage="bc4"),
            "the next limit is image copying at 1,000 images/s.",
            "a smaller views.size, a smaller backbone or more GPUs.",
        ),
        (
            {"cpu_augment": Cost(2e-3, 1e-4), "decode": Cost(1e-3), "step": Cost(1e-3)},
            SETUP,
            "Cropping on the CPU is the bottleneck (67 % of the time; the GPU is idle for 67 %). Halving its cost "
            "would make training 1.50x as fast",
            "What helps: 4 more CPU cores or a canvas",
        ),
        (
            {"storage": Cost(2e-3), "step": Cost(1e-3)},
            SETUP,
            "Reading from disk is the bottleneck",
            "It ends with the first epoch, as the file fits into memory.",
        ),
        (
            {"storage": Cost(2e-3), "step": Cost(1e-3)},
            replace(SETUP, fits_into_memory=False),
            "Reading from disk is the bottleneck",
            "data.order=quasi_random, a smaller --canvas or --max-side, more memory or a faster disk.",
        ),
        (
            {"transfer": Cost(2e-3), "step": Cost(1e-3)},
            SETUP,
            "Batch transfer is the bottleneck",
            "a larger train.batch_size or a smaller canvas.",
        ),
        (
            {"views": Cost(2e-3), "step": Cost(1e-3)},
            SETUP,
            "View augmentation is the bottleneck (67 % of the time). Halving its cost would make training 1.50x",
            "a lower views.first.blur or fewer operations in views.",
        ),
        (
            {"launch": Cost(2e-3), "step": Cost(1e-3)},
            SETUP,
            "Kernel launching is the bottleneck (100 % of the time; the GPU is idle for 50 %).",
            "a larger train.batch_size or train.cuda_graphs=true.",
        ),
        (
            {"communication": Cost(2e-3), "step": Cost(1e-3)},
            SETUP,
            "The gradient all-reduce is the bottleneck",
            "train.compress_gradients=true or a larger train.batch_size.",
        ),
        (
            {"step": Cost(2e-3), "decode": Cost(1e-3)},
            replace(SETUP, phases={"forward": 5e-4, "backward": 1e-3}),
            "The training step is the bottleneck (100 % of the time). Halving its cost would double throughput;",
            "The longest part of the step is the backward pass (50 % of the time).",
        ),
        ({"step": Cost(2e-3)}, SETUP, "no other limit is known.", "What helps: "),
        (
            {"step": Cost(2e-3)},
            Setup(workers=2, layout="canvas", storage="jpg", precision="fp32", best_precision="bf16"),
            "The training step is the bottleneck",
            "What helps: train.precision=bf16 or a GPU.",
        ),
        (
            {"step": Cost(2e-3)},
            Setup(workers=2, layout="canvas", storage="jpg", precision="fp16", best_precision="fp32"),
            "The training step is the bottleneck",
            "What helps: train.precision=fp32 or a GPU.",
        ),
        (
            {"step": Cost(2e-3)},
            Setup(workers=2, layout="canvas", storage="jpg", precision="bf16", best_precision="bf16"),
            "The training step is the bottleneck",
            "What helps: a GPU.",
        ),
        (
            {"step": Cost(2e-3, 4e-3), "decode": Cost(1e-3, 2e-3)},
            Setup(workers=2, layout="full", storage="jpg"),
            "The CPU cores are the bottleneck: the training step takes 67 % of their time, image decoding 33 %. "
            "Halving the cost of the training step would make training 1.50x as fast; the next limit is image",
            "a canvas file instead of the full one (build-beton --codec bc4), train.precision=bf16 or a GPU.",
        ),
        (
            {"step": Cost(2e-3), "decode": Cost(1.9e-3)},
            SETUP,
            "No single stage is the bottleneck: the training step limits training to 500 images/s, and image decoding "
            "to 526. A single faster stage would make training at most 1.05x as fast.",
            "",
        ),
    ],
)
def test_every_bottleneck_has_its_verdict_and_its_advice(stages, setup, verdict, advice):
    costs = CostModel(stages, cores=2)
    said, helps = describe_bottleneck(costs, setup), suggest_fixes(costs, setup)
    assert verdict in said and len(re.findall(r"\.(?= |$)", said)) == 2 and said.endswith("."), said
    assert advice in helps and bool(advice) == bool(helps), helps
    assert "inf" not in said and "None" not in said + helps


def test_more_threads_are_advised_where_cores_are_free():
    costs = CostModel({"decode": Cost(2e-3, 1e-4), "step": Cost(1e-3)}, cores=4)
    assert suggest_fixes(costs, SETUP).startswith("What helps: data.workers=4 or a canvas file")


def test_shares_are_of_the_measured_time_where_it_is_known():
    costs = CostModel({"step": Cost(2e-3)}, cores=2)
    setup = replace(SETUP, phases={"backward": 1e-3})
    assert "(50 % of the time)" in describe_bottleneck(costs, setup, seconds=4e-3)
    assert "(25 % of the time)" in suggest_fixes(costs, setup, seconds=4e-3)
    assert "(100 % of the time)" in describe_bottleneck(costs, setup, seconds=1e-3)


def analytic_flops(model, size):
    """Two operations per multiplication of a convolution or a linear layer: forward, and twice that backward, except
    for the gradient with respect to the images, which nothing needs."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            k = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
            needs_input_gradient = layer.in_channels != 3
        else:
            k, needs_input_gradient = layer.in_features, True
        total += 2 * output.numel() * k * (3 if needs_input_gradient else 2)

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.projector(model.encoder(torch.zeros(2, 3, size, size)))
    for hook in hooks:
        hook.remove()
    return total / 2


@pytest.mark.parametrize("backbone, forward_macs", [("resnet18", 1.814e9), ("resnet50", 4.089e9)])
def test_flops_are_the_analytic_count(canvas, backbone, forward_macs):
    """The count covers both views of a step at 224 px; torchvision documents 1.814 and 4.089 GMAC forward."""
    keys = [f"model.backbone={backbone}", "views.size=224", "train.batch_size=2"]
    run, _ = prepare(recipe_of(canvas, *keys), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    counted = device_stages.count_flops(run, batch, run.views(batch, 0))
    assert counted == pytest.approx(2 * analytic_flops(run.state.model, 224), rel=0.02)
    assert counted == pytest.approx(2 * 3 * 2 * forward_macs, rel=0.03)  # projector and objective are little
    assert all(p.grad is None for p in run.state.model.parameters())


def test_flops_of_small_images_count_products_with_padding(canvas):
    """As a GPU computes them: on a CPU, the gradients of convolutions at few pixels leave them out."""
    run, _ = prepare(recipe_of(canvas, "model.backbone=resnet18", "train.batch_size=4"), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    counted = device_stages.count_flops(run, batch, run.views(batch, 0))
    size = run.recipe.views.size
    assert size <= 32 and counted == pytest.approx(2 * analytic_flops(run.state.model, size), rel=0.02)


@pytest.mark.parametrize("keys", [["embedding={stochastic: hz, prior: vamp}"], ["objective={name: byol}"]])
def test_flops_are_counted_without_computing(canvas, keys):
    """As many as those of a real step, and no table of numbers becomes a fake one."""
    run, _ = prepare(recipe_of(canvas, *keys, "train.batch_size=4", "views.size=64"), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    views = run.views(batch, 0)
    before = {name: x.clone() for name, x in run.state.model.state_dict().items()}
    counted = device_stages.count_flops(run, batch, views)
    assert all(torch.equal(x, before[name]) for name, x in run.state.model.state_dict().items())
    use_plain_convolutions(run.network)  # the others leave out products with padding
    with FlopCounterMode(display=False) as counter:
        terms, _ = run.network(device_stages.first_input(run, batch, views))
        terms["loss"].backward()
    assert counted == counter.get_total_flops() / 4 and terms["loss"].isfinite()
    assert type(randomness.quantiles(torch.device("cpu"))) is torch.Tensor


@pytest.mark.parametrize(
    "keys, phases",
    [
        (["embedding.stochastic=none"], {"forward", "objective", "backward", "optimizer"}),
        (["embedding.stochastic=z"], {"forward", "draws", "objective", "kl", "backward", "optimizer"}),
        (["embedding.stochastic=h"], {"forward", "draws", "objective", "kl", "backward", "optimizer"}),
        (["embedding.stochastic=hz"], {"forward", "draws", "objective", "kl", "backward", "optimizer"}),
        (["objective={name: byol}", "train.ema=0.99"], {"forward", "objective", "backward", "optimizer"}),
        (["objective={name: supervised, classes: 3}"], {"forward", "objective", "backward", "optimizer"}),
    ],
)
def test_the_phases_make_up_the_step(canvas, keys, phases):
    run, _ = prepare(recipe_of(canvas, *keys, "train.batch_size=16"), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    views = run.views(batch, 0)
    timed = device_stages.PhaseTimer(run, batch, views)
    fixed, steps = device_stages.with_fixed_views(run, views), []
    for _ in range(5):
        timed.measure()
        start = time.perf_counter()
        device_stages.take_step(fixed, [batch], 0)
        steps.append((time.perf_counter() - start) / 16)
    results = timed.results()
    assert set(results) == phases
    assert all(results[name].low > 0 for name in phases & {"objective", "kl"})  # the KL is no difference of two calls
    # Steps take a few milliseconds and other programs run, so the sum is only roughly the whole.
    assert 0.3 * min(steps) < sum(result.low for result in results.values()) < 2 * min(steps)


def test_the_phase_of_draws_contains_the_drawing(canvas, monkeypatch):
    from fastssl.models.gaussian import DiagonalGaussian

    run, _ = prepare(recipe_of(canvas, "embedding.stochastic=z", "train.batch_size=16"), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    draw = DiagonalGaussian.rsample
    monkeypatch.setattr(DiagonalGaussian, "rsample", lambda *arguments: time.sleep(0.05) or draw(*arguments))
    timed = device_stages.PhaseTimer(run, batch, run.views(batch, 0))
    for _ in range(3):
        timed.measure()
    assert timed.results()["draws"].low * 16 == pytest.approx(0.1, rel=0.5)  # one draw per view


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(peaks, "TRIALS", 1)
    flops, source = peaks.peak_flops(torch.device("cpu"), "fp32")
    assert 1e9 < flops < 1e14 and source.startswith("measured")


def test_worker_counts_end_with_the_cores():
    assert worker_counts(2, 2) == [1, 2] and worker_counts(6, 6) == [1, 2, 4, 6]
    assert worker_counts(3, 8) == [1, 2, 3, 4, 8] and worker_counts(4, 1) == [1, 4]


def test_storage_reads_what_it_has_evicted(photos_640, tmp_path, monkeypatch):
    """The file is a copy, which nothing else has mapped. Speeds say nothing about so small a file."""
    path = tmp_path / "train.beton"
    shutil.copy(photos_640 / "train.beton", path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet cannot be evicted
    storage = StorageStage(Samples.read(read_header(path)), np.arange(640), workers=2)
    assert storage.cached_before == pytest.approx(1, abs=0.05)
    samples, read, shares = storage.samples, storage._read, []

    def watched(rows):
        found = samples.at(rows)
        piece = samples.file[found.start_B.min() : (found.start_B + found.size_B).max()]
        shares.append(share_in_page_cache(piece))
        return read(rows)

    monkeypatch.setattr(storage, "_read", watched)
    for _ in range(3):
        storage.measure()
    if storage.stays_cached:
        pytest.skip("this file system keeps its pages")
    assert len(storage.cold) == len(storage.warm) == 3
    for cold, first, second in zip(shares[::3], shares[1::3], shares[2::3], strict=True):
        assert cold <= STILL_CACHED and first > 0.9 and second > 0.9
    assert share_in_page_cache(storage.samples.file) > 0.9  # read back


def test_the_trace_has_every_thread_and_torchs_operations(photos_640, tmp_path):
    run, _ = prepare(recipe_of(photos_640), torch.device("cpu"), None)
    training = Training(run, 0)
    write_trace(tmp_path / "x.trace.json.gz", training, run.device)
    training.close()
    trace = json.loads(gzip.decompress((tmp_path / "x.trace.json.gz").read_bytes()))["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in trace if e.get("pid") == 0 and e["name"] == "thread_name"}
    ours = [event for event in trace if event.get("cat") == "fastssl"]
    of_thread = {name: {e["name"] for e in ours if e["tid"] == tid} for tid, name in threads.items()}
    assert {"views", "forward", "backward", "optimizer", "wait for data"} <= of_thread["MainThread"]
    assert {"start", "copy"} <= of_thread["fastssl-reader"]
    assert any(name.startswith("fastssl-decode") and "decode" in spans for name, spans in of_thread.items())
    # Both clocks are aligned: torch's convolutions lie within our spans of the forward pass.
    passes = [(e["ts"], e["ts"] + e["dur"]) for e in ours if e["name"] == "forward"]
    assert len(passes) == STEPS
    convolutions = [e for e in trace if e.get("name") == "aten::convolution"]
    # The clocks may differ by half a millisecond if a thread is interrupted between them.
    inside = [any(a - 500 <= e["ts"] and e["ts"] + e["dur"] <= b + 500 for a, b in passes) for e in convolutions]
    assert len(convolutions) > STEPS and all(inside)


def test_resident_images_have_no_loader_to_measure(canvas):
    measured = profile_recipe(recipe_of(canvas, "data.resident=true"))
    stages = measured.stages
    for stage in (stages.storage, stages.decode, stages.copy_images, stages.transfer, stages.loader):
        assert "stay on the device" in stage.missing
    assert measured.trace is None
    assert measured.bottleneck.stage in ("step", "views")


@pytest.mark.parametrize("stored, holds", [("canvas_bc4", "blocks"), ("canvas", "pixels")])
def test_images_that_a_batch_holds_as_they_are_stored_are_copied_and_not_decoded(stored, holds, request):
    recipe = recipe_of(request.getfixturevalue(stored))
    run, _ = prepare(recipe, torch.device("cpu"), None)
    with ExitStack() as stack:
        measured = loader_stages.LoaderStages(recipe, run.state.loader, 0.01, 2, stack)
        for timer in measured.timers().values():
            timer.warm_up()
            timer.measure()
        stages = Stages(**{name: StageResult() for name in STAGES})
        measured.add_results(stages, None)
    assert stages.decode.missing == f"The file holds {holds}." and not stages.decode.rate
    assert stages.copy_images.rate > 0 and set(stages.copy_images.workers) >= {1, 2} and stages.copy_images.knee


def test_the_command_measures_full_files_writes_all_files_and_fails_below_a_threshold(
    fastssl, full, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(full, "name=small")
    (tmp_path / "small.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(terminal, "PLAIN_LINE_EVERY", 0.0)
    monkeypatch.setattr(terminal, "SHORT", 0.0)
    options = ["--plan", "2xA100, 16 cores, nvme", "--fail-under", "images_per_second=1e9"]
    code, out, err = fastssl("profile", "small.yaml", *options)
    assert code == 1 and "images_per_second is" in err and "below" in err
    assert "warming up: image decoding, 1 thread (1 of " in err and "warming up: training step (" in err
    assert re.search(r"warming up: parts of the training step \((\d+) of \1\)", err)
    assert "measuring: 100 % in " in err and "Profiling took " in out
    done = [int(n) for n in re.findall(r"measuring: (\d+) of 100 %", err)]
    assert done == sorted(done) and 5 < len(done) and done[-1] >= 50
    measured = read_profile(tmp_path / "profiles/small.json")
    assert " ".join(measured.bottleneck.sentence.split()[:3]) in out and "PREDICTION" in out
    for suffix in ("json", "html", "trace.json.gz"):
        assert (tmp_path / f"profiles/small.{suffix}").stat().st_size > 1000
    assert not (tmp_path / "runs").exists()  # `fastssl train` would take another name
    assert measured.recipe == recipe.model_dump(mode="json")
    stages = measured.stages
    assert stages.cpu_augment.rate > 0 and set(stages.decode.workers) >= {1, 2}
    assert "One process" in stages.communication.missing and "No GPU" in stages.launch.missing
    assert any("An epoch has only 12 batches" in remark for remark in measured.remarks)
    assert 0 < measured.bottleneck.accelerator_utilization <= 1
    code, out, _ = fastssl("profile", "--compare", "profiles/small.json", "profiles/small.json")
    assert code == 0 and "training end to end" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "profile needs a recipe"),
        (["recipes/barlow.yaml", "--fail-under", "utilisation=1"], "--fail-under"),
        (["recipes/barlow.yaml", "--plan", "8xA1000"], "--plan"),
        (["recipes/barlow.yaml", "--json", "x.txt"], "does not end in .json"),
        (["recipes/barlow.yaml", "--json", "/proc/x/y.json"], "/proc/x"),
        (["recipes/barlow.yaml"], "build-beton imagenet"),
        (["recipes/barlow.yaml", "--compare", "a.json", "b.json"], "leave out recipe and other options"),
        (["--compare", "a.json", "b.json"], "No profile at a.json"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_measured(fastssl, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = fastssl("profile", *arguments)
    assert code == 2 and words in err and err.count("\n") <= 2


@pytest.mark.parametrize("stored, head", [("photos_640", "Image decoding"), ("canvas_bc4", "Image copying")])
def test_a_run_that_waits_long_for_data_says_why(stored, head, request, tmp_path, monkeypatch, capsys):
    from fastssl.profiling.bottleneck import explain_data_wait

    monkeypatch.setattr(DataWaitWarning, "SECONDS", 0.0)
    slow_down(monkeypatch, dict(decode=0.2, transfer=0.0, views=0.0, step=0.0))
    recipe = recipe_of(
        request.getfixturevalue(stored), "data.limit=40", "train.epochs=1", f"run.dir={tmp_path / 'run'}"
    )
    train(recipe, diagnose=explain_data_wait)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and f"of the time is spent waiting for data. {head} is the bottleneck" in warnings[0]
    assert warnings[0].endswith("`fastssl profile` measures it.")


@pytest.mark.slow
def test_two_processes_measure_in_step(photos_640, tmp_path):
    """torchrun: one profile with the rates of both processes, which exchange gradients."""
    (tmp_path / "small.yaml").write_text(recipe_of(photos_640, "data.workers=1").to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastssl", "profile"]
    done = subprocess.run(
        [*launcher, "small.yaml"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "profiles").glob("*.json")
    measured = read_profile(path)
    assert measured.machine.processes == 2
    assert done.stdout.count("accelerator utilization") == 1  # one of them shows and writes it
    assert measured.stages.communication.rate > 0
    assert math.isfinite(measured.prediction.relative_error)
