"""What only a GPU can show. Elsewhere these are skipped; `make gpu-check` runs them and records the result."""

import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import make_run
from torch._inductor.utils import run_fw_bw_and_get_code
from training_runs import SMALL, checkpoint_in

from fastssl.beton.format import bc4_bytes
from fastssl.common import randomness
from fastssl.evaluation import evaluate_knn, evaluate_linear, evaluate_semisup, find_evaluation_data, load_run_encoder
from fastssl.evaluation.embed import embed_images
from fastssl.evaluation.ood import DETECTORS, detector
from fastssl.loading import BetonLoader, ImageRows
from fastssl.loading import resident as resident_module
from fastssl.loading.blocks import BlockImages
from fastssl.loading.loader import pinned_bytes
from fastssl.loading.spans import span
from fastssl.models import ModelInput, SSLModel
from fastssl.objectives import TotalLoss
from fastssl.profiling import profile_recipe
from fastssl.recipe import OptimConfig, ViewsConfig, load_recipe
from fastssl.training import loop, run_writer, setup, train
from fastssl.training.guard import FiniteGuard
from fastssl.training.meters import Meter
from fastssl.training.optim import make_optimizer
from fastssl.training.residence import WORKSPACES, estimate_training
from fastssl.views import PairedViews, eval_transform
from fastssl.views.paired import torch_views

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_noise_and_parameters_have_the_same_bits_as_on_the_cpu():
    index = torch.arange(100)
    args = 3, 7
    ours = randomness.normals(*args, index, 1, 4, 300)
    assert torch.equal(ours, randomness.normals(*args, index.cuda(), 1, 4, 300).cpu())
    compiled = torch.compile(randomness.normals, fullgraph=True)
    assert torch.equal(ours, compiled(3, torch.tensor(7, device="cuda"), index.cuda(), 1, 4, 300).cpu())


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("compiled", [False, True])
def test_views_equal_the_cpu_ones(canvas, compiled, kernel):
    """0.1% of the pixels may differ by more than 1e-3: rounding across a clamp or the solarize threshold."""
    batch = next(iter(BetonLoader(canvas / "train.beton", 16)))
    views = ViewsConfig(size=32, kernel=kernel)
    on_cpu, on_gpu = PairedViews(views, seed=1), PairedViews(views, seed=1, compiled=compiled)
    moved = [t.cuda() for t in (batch.image, batch.index, torch.tensor(2), batch.height, batch.width)]
    for a, b in zip(on_cpu(batch.image, batch.index, 2, batch.height, batch.width), on_gpu(*moved)):
        assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [1, 5])
def test_views_of_other_channels_equal_the_cpu_ones(channels, compiled):
    views = ViewsConfig(size=32, mean=(0.5,), std=(0.25,))
    image, index = torch.randint(0, 256, (16, 48, 40, channels), dtype=torch.uint8), torch.arange(16)
    on_cpu, on_gpu = PairedViews(views, seed=1), PairedViews(views, seed=1, compiled=compiled)
    for a, b in zip(on_cpu(image, index, 2), on_gpu(image.cuda(), index.cuda(), torch.tensor(2, device="cuda"))):
        assert a.shape == (16, channels, 32, 32)
        assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size, height, width", [(224, 256, 256), (32, 32, 32), (57, 96, 40)])
def test_the_triton_views_equal_the_torch_chain(size, height, width, dtype):
    """The check of views.kernel=auto, on a batch with all operations; no sum depends on the order of its threads."""
    image = torch.randint(0, 256, (48, height // 4, width // 4, 3), dtype=torch.uint8, device="cuda")
    image = image.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    index, epoch = torch.arange(48, device="cuda"), torch.tensor(1, device="cuda")
    views = PairedViews(ViewsConfig(size=size), seed=1, dtype=dtype, memory_format=torch.channels_last)
    first, again = views(image, index, epoch), views(image, index, epoch)
    assert views.triton.works
    for a, b in zip(first, again):
        assert a.dtype == dtype and a.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b)
    resident = ImageRows(image, torch.arange(47, -1, -1, device="cuda"))
    for a, b in zip(views(image.flip(0), index, epoch), views(resident, index, epoch)):
        assert torch.equal(a, b)


def random_blocks(batch, side):
    """Any bytes, so blocks of both modes."""
    generator = torch.Generator().manual_seed(0)
    return BlockImages(torch.randint(0, 256, (batch, bc4_bytes(side)), dtype=torch.uint8, generator=generator), side)


@pytest.mark.parametrize(
    "kernel, compiled, size, side",
    [("auto", False, 224, 256), ("auto", True, 57, 96), ("auto", False, 40, 8), ("torch", True, 57, 96)],
)
def test_views_of_blocks_equal_those_of_the_torch_chain_on_the_cpu(kernel, compiled, size, side):
    """The same in a second call, bit for bit."""
    images, index, config = random_blocks(16, side), torch.arange(16), ViewsConfig(size=size, kernel=kernel)
    views, oracle = (PairedViews(config, seed=1, compiled=compiled) for _ in range(2))
    arguments = images.to("cuda"), index.cuda(), torch.tensor(2, device="cuda")
    made, again = views(*arguments), views(*arguments)
    assert kernel == "torch" or views.triton.works
    want = torch_views(images, *oracle.draw(images, index, 2, None, None), config).chunk(2)
    for a, b, c in zip(made, again, want):
        assert torch.equal(a, b) and ((a.cpu() - c).abs() > 1e-3).float().mean() < 1e-3


def test_a_resident_set_of_blocks_may_be_larger_than_a_32_bit_offset():
    """Of words of 64 bits: the last images of 17.2 GB."""
    images, rows = random_blocks(4, 256), 2**34 // bc4_bytes(256) + 4
    if torch.cuda.mem_get_info()[0] < 2**34 + 2**31:
        pytest.skip("needs 19 GB of free memory on the device")
    whole = torch.empty(rows, bc4_bytes(256), dtype=torch.uint8, device="cuda")
    whole[-4:] = images.blocks.cuda()
    resident = ImageRows(BlockImages(whole, 256), torch.arange(rows - 4, rows, device="cuda"))
    views, index, epoch = PairedViews(ViewsConfig(kernel="triton")), torch.arange(4, device="cuda"), 0
    for a, b in zip(views(resident, index, epoch), views(images.to("cuda"), index, epoch)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["squash", "center"])
def test_the_evaluation_transform_of_blocks_equals_the_cpu_s(kind):
    images = random_blocks(16, 96)
    sizes = torch.full((16,), 375), torch.full((16,), 500)
    transform = eval_transform(ViewsConfig(size=64, eval=kind))
    on_gpu = transform(images.to("cuda"), *(size.cuda() for size in sizes))
    torch.testing.assert_close(transform(images, *sizes), on_gpu.cpu(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["squash", "center"])
def test_the_evaluation_transform_equals_the_cpu_s(kind):
    image = torch.randint(0, 256, (16, 96, 96, 3), dtype=torch.uint8)
    sizes = torch.full((16,), 375), torch.full((16,), 500)
    transform = eval_transform(ViewsConfig(size=64, eval=kind))
    on_gpu = transform(image.cuda(), *(size.cuda() for size in sizes))
    torch.testing.assert_close(transform(image, *sizes), on_gpu.cpu(), rtol=0, atol=1e-3)


def test_batches_on_the_device_are_never_overwritten(canvas):
    """Copies overlap with work on the caller's stream; every kept batch stays what the file holds."""
    want = [b.image for b in BetonLoader(canvas / "train.beton", 4, shuffle=False)]
    for _ in range(20):
        kept = []
        for batch in BetonLoader(canvas / "train.beton", 4, shuffle=False, device="cuda"):
            torch.randn(2000, 2000, device="cuda").matmul(torch.randn(2000, 2000, device="cuda"))
            kept.append(batch.image.clone())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(want, kept, strict=True))


def test_epochs_of_a_loader_share_their_memory(canvas):
    """One copy stream for all of them: the allocator reuses memory within a stream only."""
    loader = BetonLoader(canvas / "train.beton", 16, device="cuda")
    reserved = []
    for _ in range(6):
        list(loader)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


def test_pinned_memory_is_rounded_as_estimated():
    before = torch.cuda.host_memory_stats()
    held = torch.empty(3 * 2**20 + 1, dtype=torch.uint8, pin_memory=True)
    after = torch.cuda.host_memory_stats()
    assert pinned_bytes(held.nbytes) == 2**22
    assert 2**22 in {value - before.get(key, 0) for key, value in after.items()}


@pytest.fixture
def compiled_views(canvas_jpeg):
    """The compiled views of one batch on the device, as a function without arguments, already compiled."""
    views = PairedViews(ViewsConfig(size=64), seed=1, dtype=torch.bfloat16, compiled=True)
    batch = next(iter(BetonLoader(canvas_jpeg / "train.beton", 16, device="cuda")))
    epoch = torch.tensor(2, device="cuda")

    def call():
        return views(batch.image, batch.index, epoch, batch.height, batch.width)

    call()
    return call


def test_compiled_views_launch_few_kernels(compiled_views):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled_views()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in launched if name.startswith(("crop", "contrast", "blur"))]
    assert len(ours) == 4 and len(launched) <= 4 + 14, launched  # the others draw the parameters


def test_compiled_views_never_wait_for_the_device(compiled_views):
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled_views()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"drop_last": False}, {"shuffle": "quasi_random"}])
@pytest.mark.parametrize("stored", ["canvas", "canvas_bc4", "canvas_jpeg"])
def test_a_resident_set_gives_the_same_batches(stored, options, request, monkeypatch):
    """Loaded in several pieces, while nothing else holds memory of the device than the set itself."""
    monkeypatch.setattr(resident_module, "PIECE", 20_000)
    path = request.getfixturevalue(stored) / "train.beton"
    streamed, resident, on_host = (
        BetonLoader(path, 7, device=device, resident=r, **options)
        for device, r in (("cuda", False), ("cuda", True), ("cpu", False))
    )
    for _ in range(2):
        for a, b, c in zip(streamed, resident, on_host, strict=True):
            for x, y, z in zip(a.tensors(), b.tensors(), c.tensors(), strict=True):
                assert torch.equal(x, y) and y.is_cuda and torch.equal(x.cpu(), z)
            assert torch.equal(b.pixels().cpu(), c.pixels())


def test_loading_a_resident_set_takes_its_memory_and_little_more(canvas_bc4, monkeypatch):
    """4,800 times the same images: 400 MB, in pieces of 8 MB."""
    monkeypatch.setattr(resident_module, "PIECE", 1 << 23)
    loader = BetonLoader(canvas_bc4 / "train.beton", 7, device="cuda", resident=True)
    loader.rows = np.tile(loader.rows, 4_800)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = loader.load_resident()
    assert whole.image.blocks.nbytes > 390e6
    assert torch.equal(whole.image.blocks[-48:], whole.image.blocks[:48])
    assert torch.cuda.max_memory_allocated() - before < whole.image.blocks.nbytes + 5 * whole.label.nbytes + 16e6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "vit_small_patch16_224"])
def test_training_takes_less_memory_than_estimated(canvas_bc4, tmp_path, backbone, compiled):
    """What data.resident=auto keeps free: not less than the peak, and not many times as much."""
    recipe = load_recipe(
        "recipes/zprob_barlow.yaml",
        [f"data.train={canvas_bc4}/train.beton", "data.val=null", f"run.dir={tmp_path}/run", "train.device=cuda",
         f"model.backbone={backbone}", "views.size=224", "train.batch_size=48", f"train.compile={compiled}",
         "train.epochs=10", "data.resident=false"],
    )  # fmt: skip
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run, _ = setup.prepare(recipe, torch.device("cuda"), None)
    (batch,) = run.state.loader
    for _ in range(3):
        loop.train_step(run, [batch], 0, 0.1)
    estimate = estimate_training(recipe, torch.bfloat16, 1)
    assert (estimate - WORKSPACES) / 3 < torch.cuda.max_memory_reserved() - before < estimate


BEYOND = {
    "hz": ["embedding={stochastic: hz, samples: 3, chunk: 2, prior: vamp}"],
    "simclr": ["objective={name: simclr, over_draws: log_mean_exp}", "embedding={stochastic: z, samples: 3}"],
    "byol": ["objective={name: byol, predictor_hidden: 64}", "embedding={stochastic: h, samples: 3}"],
    "sigreg": ["objective={name: sigreg, slices: 64}", "embedding={stochastic: h, samples: 3, chunk: 2}"],
    "visreg": ["objective={name: visreg, slices: 64}", "embedding={stochastic: z, samples: 3}"],
    "supervised": ["objective={name: supervised, classes: 3}", "embedding={stochastic: h, samples: 3}"],
}


@pytest.mark.parametrize("name", ["barlow", "zprob_barlow", "hprob_vicreg", *BEYOND])
def test_compiled_bf16_training_learns(canvas, tmp_path, name):
    """The loss of the last ten steps is below that of the first ten; nothing is skipped."""
    run = train(
        load_recipe(
            f"recipes/cifar10/{'barlow' if name in BEYOND else name}.yaml",
            [f"data.train={canvas}/train.beton", f"run.dir={tmp_path}/run", "train.batch_size=16", "train.epochs=20",
             "model.projector={layers: 2, hidden: 64, out: 64}", "train.device=cuda", "train.precision=bf16",
             "train.compile=true", "log.every=1", *BEYOND.get(name, [])],
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 60 and lines[-1]["skipped_steps"] == 0
    assert sum(losses[-10:]) < sum(losses[:10])


def gpu_recipe(canvas, run_dir, *more):
    return load_recipe(
        "recipes/cifar10/zprob_barlow.yaml",
        [f"data.train={canvas}/train.beton", f"run.dir={run_dir}", "train.batch_size=16", "train.epochs=8",
         "model.projector={layers: 2, hidden: 64, out: 64}", "train.device=cuda", "log.every=1", *more],
    )  # fmt: skip


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_loop_and_its_log_never_wait_for_the_device(canvas, tmp_path, monkeypatch):
    """Steps 9 to 23 of 24 run under CUDA's sync debug mode, where every wait for the whole queue is an error.

    Log steps 12, 16 and 20 are among them, and checkpoints of steps 10, 15 and 20.
    """
    real_step, watched = loop.forward_and_backward, []

    def step(run, batches, epoch):
        torch.cuda.set_sync_debug_mode("error" if 8 <= run.state.step < 23 else "default")
        watched.append((run.state.step, torch.cuda.get_sync_debug_mode()))
        return real_step(run, batches, epoch)

    monkeypatch.setattr(loop, "forward_and_backward", step)
    keys = ["log.every=4", "log.rank_every=0", "checkpoint.every=5", "train.ema=0.9", "data.resident=false"]
    try:
        run = train(gpu_recipe(canvas, tmp_path / "run", *keys))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step for step, mode in watched if mode == 2] == list(range(8, 23))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)


def kernels_of(call):
    """The names of the kernels that a call launches."""
    call()  # allocates
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_the_guard_launches_few_kernels(monkeypatch):
    model = SSLModel(load_recipe("recipes/zprob_barlow.yaml")).cuda()
    optimizer = make_optimizer(model, OptimConfig(name="sgd"))
    monkeypatch.setattr(optimizer, "step", lambda: None)
    skipped = torch.zeros((), dtype=torch.int64, device="cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    guard = FiniteGuard(model, SimpleNamespace(optimizer=optimizer, scaler=scaler, step=0, skipped=skipped))
    terms = {"loss": torch.ones((), device="cuda"), "grad_norm": torch.ones((), device="cuda")}

    def step():
        guard.remember()
        guard.step(terms)

    launched = kernels_of(step)
    assert 10 <= len(launched) <= 15, launched


@pytest.mark.parametrize("name, limit", [("lars", 48), ("lamb", 63)])
def test_lars_and_lamb_launch_few_kernels_and_agree_with_the_cpu(name, limit):
    """The limits are those counted on a CPU, tests/training/test_launches.py. Norms sum in another order."""
    on_cpu = SSLModel(load_recipe("recipes/zprob_barlow.yaml"))
    on_gpu = copy.deepcopy(on_cpu).cuda()
    optimizers = [make_optimizer(model, OptimConfig(name=name, lr=0.1)) for model in (on_cpu, on_gpu)]
    for p, q in zip(on_cpu.parameters(), on_gpu.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.cuda()
    for optimizer, device in zip(optimizers, ("cpu", "cuda")):
        optimizer.found_inf = torch.zeros((), device=device)
        optimizer.step()
    for p, q in zip(on_cpu.parameters(), on_gpu.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-6)
    launched = kernels_of(optimizers[1].step)
    assert 20 <= len(launched) <= limit, launched


@pytest.mark.parametrize("more", [["train.cuda_graphs=true"], ["train.precision=tf32"], ["train.precision=fp16"]])
def test_other_ways_to_compute_a_step_give_its_losses(canvas, tmp_path, more):
    """fp32 without compile is the oracle. Half precision rounds to 4e-3; the first steps show no drift yet."""
    want = losses(train(gpu_recipe(canvas, tmp_path / "a", "train.precision=fp32", "train.compile=false")))
    got = losses(train(gpu_recipe(canvas, tmp_path / "b", *more)))
    assert len(got) == 24 and got[:4] == pytest.approx(want[:4], rel=3e-2)


def test_a_resumed_run_goes_on_where_it_was(canvas, tmp_path):
    """DESIGN's terms on a GPU: the loss of the first resumed step within 1e-3."""
    straight = losses(train(gpu_recipe(canvas, tmp_path / "a", "train.precision=fp32")))
    recipe = gpu_recipe(canvas, tmp_path / "b", "train.precision=fp32", "checkpoint.every=10", "probe.every=4")

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, probe=stop)  # behind step 12: steps 11 and 12 come again
    resumed = losses(train(recipe, resume="auto"))
    assert len(resumed) == 24 and resumed[10] == pytest.approx(straight[10], rel=1e-3)


def test_a_checkpoint_of_the_device_holds_its_step_although_training_went_on(canvas, tmp_path, monkeypatch):
    """The thread writes the file of step 10 after step 14; the pinned memory of step 5 holds the copy of step 10."""
    real_write, real_step, goes_on, found = run_writer.write_checkpoint, loop.train_step, threading.Event(), {}
    weights, averages = {}, {}

    def step(run, *arguments):
        output = real_step(run, *arguments)
        state = run.state.state_dict()
        if run.state.step in (5, 10):
            weights[run.state.step] = {name: tensor.cpu() for name, tensor in state["model"].items()}
            averages[run.state.step] = state["optimizer"]["state"][0]["exp_avg"].cpu()
        if run.state.step == 14:
            goes_on.set()
        return output

    def write(run_dir, name, saved):
        assert saved["step"] != 10 or goes_on.wait(60)
        real_write(run_dir, name, saved)
        found[saved["step"]] = checkpoint_in(run_dir, name)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(run_writer, "write_checkpoint", write)
    train(gpu_recipe(canvas, tmp_path / "run", "checkpoint.every=5", "log.every=100"))
    for number in (5, 10):
        saved = found[number]
        assert all(torch.equal(saved["model"][name], tensor) for name, tensor in weights[number].items())
        assert torch.equal(saved["optimizer"]["state"][0]["exp_avg"], averages[number])
    assert saved["model"]["encoder.conv1.weight"].device.type == "cpu"


def test_an_evaluation_on_the_device_gives_the_cpu_s_figures(canvas, tmp_path):
    """12 test images: features agree to float32's rounding, so no guess is expected to change."""
    folder, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")})
    figures = {}
    for device in ("cpu", "cuda"):
        encoder = load_run_encoder(folder, device=device)
        split = find_evaluation_data(encoder)
        results = [evaluate_knn(encoder, split, ks=(5,))]
        results += [evaluate_linear(encoder, split, protocol=protocol) for protocol in ("sweep", "reference", "lbfgs")]
        figures[device] = [result["metrics"] for result in results]
        shutil.rmtree(folder / "eval")
        shutil.rmtree(folder / "features")
    for ours, theirs in zip(figures["cuda"], figures["cpu"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)
    tuned = evaluate_semisup(encoder, split, percent=50, overrides=["train.epochs=2", "train.batch_size=8"])
    assert tuned["settings"]["train"]["device"] == "cuda" and 0 <= tuned["metrics"]["accuracy"] <= 1


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_scores_on_the_device_as_on_the_cpu(name):
    """float64 on both, but for one's products in float32."""
    rng = np.random.default_rng(0)
    images = (300, 2) if DETECTORS[name].of_views else (300,)
    arrays = {
        "features": rng.normal(size=(*images, 16)), "logits": rng.normal(size=(300, 5)),
        "mu": rng.normal(size=(*images, 8)), "sigma": rng.uniform(0.1, 1, (*images, 8)),
        "layers": [rng.normal(size=(300, 4)), rng.normal(size=(300, 16))],
    }  # fmt: skip
    label = rng.integers(5, size=300)
    ours, theirs = (detector(name, device=x).fit(labels=label, **arrays).score(**arrays) for x in ("cuda", "cpu"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4 if name == "posterior_bhattacharyya" else 1e-8, atol=1e-9)


def test_the_meter_counts_what_the_device_waits_and_not_what_the_host_does():
    """A slow loader leaves the device idle for its time; behind a fast one the host runs ahead, and nothing is idle."""
    meter = Meter(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")

    def loader(seconds):
        for _ in range(10):
            time.sleep(seconds)
            yield a

    def work(x):
        for _ in range(10):  # 10 ms and more of one kernel after the other, launched in 100 microseconds
            x = x @ a / 64

    for _ in range(2):  # the first pass chooses kernels
        meter.restart()
        for batch in meter.watch(loader(0.05)):
            work(batch)
        slow = meter.read()
    for batch in meter.watch(loader(0.0)):
        work(batch)
    fast = meter.read()
    assert 0.2 < slow.waited / slow.seconds < 1
    assert fast.waited / fast.seconds < 0.1


def test_the_meter_never_waits_for_the_device():
    meter = Meter(torch.device("cuda"))
    a = torch.randn(1024, 1024, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in meter.watch([a] * 300):
            with span("work"):
                batch @ a
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.read().seconds > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_profile_of_a_gpu_has_every_stage(canvas_jpeg, tmp_path, compiled):
    keys = [f"data.train={canvas_jpeg}/train.beton", "data.val=null", "train.device=cuda", "data.resident=false"]
    recipe = load_recipe("recipes/zprob_barlow.yaml", [*SMALL, *keys, f"train.compile={compiled}"])
    stages = profile_recipe(recipe, trace=tmp_path / "x.trace.json.gz").stages
    missing = {name for name, stage in stages.by_name().items() if stage.missing}
    assert missing <= {"cpu_augment", "communication", "storage"}
    for stage in (stages.views, stages.step):
        assert 0 < stage.busy_seconds < 1.1 / stage.rate
    assert 0 < stages.views.kernels < 2000 and stages.step.mfu < 1
    assert stages.transfer.bytes_per_second.median < stages.transfer.peak_bytes_per_second
    assert ("draws" in stages.step.phases) == (not compiled)
    trace = json.loads(gzip.decompress((tmp_path / "x.trace.json.gz").read_bytes()))["traceEvents"]
    kernels = [event for event in trace if event.get("cat") == "kernel"]
    ours = [event for event in trace if event.get("cat") == "fastssl"]
    begin, end = min(e["ts"] for e in ours), max(e["ts"] + e["dur"] for e in ours)
    assert kernels and all(begin <= e["ts"] <= end + 1e6 for e in kernels)


def test_embeddings_of_files_and_of_their_beton_are_equal_on_the_device(canvas, photos, tmp_path):
    folder, *_ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")}, embedding={"stochastic": "z"})
    for device in ("cuda", "cpu"):
        encoder = load_run_encoder(folder, device=device)
        embed_images(encoder, photos / "val", tmp_path / f"{device}.npz", score="knn_cosine", workers=1)
    embed_images(load_run_encoder(folder), canvas / "val.beton", tmp_path / "beton.npz", score="knn_cosine")
    files, beton, on_cpu = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("cuda", "beton", "cpu"))
    order = np.argsort(beton["name"])
    for name in ("score", "h", "mu", "sigma"):
        np.testing.assert_allclose(files[name], beton[name][order], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(files[name], on_cpu[name], rtol=1e-3, atol=1e-3)
    paths = [photos / "val" / name for name in files["name"]]
    found = encoder.model.cuda().embed(paths)
    assert found.h.is_cuda
    np.testing.assert_allclose(found.h.cpu(), files["h"], rtol=1e-2, atol=1e-2)  # with TF32


def test_the_step_is_compiled_to_the_kernels_that_the_budget_counts(tmp_path):
    """Triton kernels of a small step: in the code for this GPU, and in the code for a mocked one."""
    more = ["model.backbone=test_resnet", "views.size=32", "embedding.samples=3", "train.batch_size=64"]
    budget = [sys.executable, "benchmarks/gpu_budget.py", "recipes/zprob_barlow.yaml", *more, "--only", "step"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*budget, "--json", str(tmp_path / "budget.json")], env=environment, check=True)
    parts = json.loads((tmp_path / "budget.json").read_text())["parts"]

    recipe, device = load_recipe("recipes/zprob_barlow.yaml", more), torch.device("cuda")
    model, _ = setup.make_model(recipe, device, pretrained=None)
    network = setup.Network(model, TotalLoss(recipe), device, "bf16")
    images = torch.randn(2, 64, 3, 32, 32, dtype=torch.bfloat16, device=device)
    views = tuple(image.contiguous(memory_format=torch.channels_last) for image in images)
    index = torch.arange(64, device=device)
    inputs = ModelInput(views, index, index, torch.zeros((), dtype=torch.int64, device=device))
    compiled = torch.compile(network, dynamic=False)
    _, sources = run_fw_bw_and_get_code(lambda: compiled(inputs).terms["loss"])
    launched = sum(len(re.findall(r"^ +triton_\w+\.run\(", source, re.MULTILINE)) for source in sources)
    assert launched == pytest.approx(sum(part["triton_kernels"] for part in parts), rel=0.05)
