"""What only a GPU can show. Elsewhere these are skipped, and `records/gpu-pending.md` says so."""

import json

import pytest
import torch

from fastssl import randomness
from fastssl.loading import BetonLoader
from fastssl.recipe import Views, load_recipe
from fastssl.training import train
from fastssl.views import PairedViews

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_noise_and_parameters_have_the_same_bits_as_on_the_cpu():
    index = torch.arange(100)
    args = 3, 7
    ours = randomness.normals(*args, index, 1, 4, 300)
    assert torch.equal(ours, randomness.normals(*args, index.cuda(), 1, 4, 300).cpu())
    compiled = torch.compile(randomness.normals, fullgraph=True)
    assert torch.equal(ours, compiled(3, torch.tensor(7, device="cuda"), index.cuda(), 1, 4, 300).cpu())


@pytest.mark.parametrize("compiled", [False, True])
def test_views_equal_the_cpu_ones(canvas, compiled):
    """0.1% of the pixels may differ by more than 1e-3: rounding across a clamp or the solarize threshold."""
    batch = next(iter(BetonLoader(canvas / "train.beton", 16)))
    on_cpu, on_gpu = PairedViews(Views(size=32), seed=1), PairedViews(Views(size=32), seed=1)
    on_gpu = torch.compile(on_gpu, fullgraph=True, dynamic=False) if compiled else on_gpu
    moved = [t.cuda() for t in (batch.image, batch.index, torch.tensor(2), batch.height, batch.width)]
    for a, b in zip(on_cpu(batch.image, batch.index, 2, batch.height, batch.width), on_gpu(*moved)):
        assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3


def test_batches_on_the_device_are_never_overwritten(canvas):
    """Copies overlap with work on the caller's stream; every kept batch stays what the file holds."""
    want = [b.image for b in BetonLoader(canvas / "train.beton", 4, shuffle=False)]
    for _ in range(20):
        kept = []
        for batch in BetonLoader(canvas / "train.beton", 4, shuffle=False, device="cuda"):
            torch.randn(2000, 2000, device="cuda").matmul(torch.randn(2000, 2000, device="cuda"))
            kept.append(batch.image.clone())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(want, kept, strict=True))


@pytest.mark.parametrize("name", ["barlow", "zprob_barlow", "hprob_vicreg"])
def test_compiled_bf16_training_learns(canvas, tmp_path, name):
    """The loss of the last ten steps is below that of the first ten; nothing is skipped."""
    run = train(
        load_recipe(
            f"recipes/cifar10/{name}.yaml",
            [f"data.train={canvas}/train.beton", f"run.dir={tmp_path}/run", "train.batch_size=16", "train.epochs=20",
             "model.projector={layers: 2, hidden: 64, out: 64}", "train.device=cuda", "train.precision=bf16",
             "train.compile=true", "log.every=1"],
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 60 and lines[-1]["skipped_steps"] == 0
    assert sum(losses[-10:]) < sum(losses[:10])
