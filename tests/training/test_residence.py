"""data.resident=auto: whether a set of images stays on the GPU next to what training takes there."""

import os

import pytest
import torch
from torch import nn
from training_runs import small

from fastssl.beton import read_header
from fastssl.common import distributed
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader
from fastssl.models import build_model
from fastssl.recipe import load_recipe
from fastssl.sweep.local import child_environment
from fastssl.training import residence, setup, train
from fastssl.training.memory import check_memory, step_needs
from fastssl.training.residence import estimate_training, fits_beside_training, image_bytes, saved_bytes
from fastssl.training.run_dir import locked_run_dir

GPU = torch.device("cuda")
GB = 10**9
IMAGENET = 1_281_167 * 256 * 256 * 3 // 4  # bytes of its canvases in blocks


def recipe_of(*overrides, name="zprob_barlow"):
    return load_recipe(f"recipes/{name}.yaml", overrides)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(free, total): a GPU with so many bytes."""

    def install(free, total=None):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total or free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    return install


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_the_estimate_counts_what_a_forward_pass_saves(backbone, dtype):
    """Of fake tensors, as of real ones."""
    recipe = recipe_of(f"model.backbone={backbone}", "views.size=64")
    encoder = build_model(recipe).encoder
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def measure(inputs):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                encoder(torch.zeros(inputs, 3, 64, 64))
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    want = (measure(6) - measure(2)) / 4
    outline = residence.outline_model(recipe).encoder
    with residence.FakeTensorMode(allow_non_fake_inputs=True):
        got = saved_bytes(outline, (3, 64, 64), dtype)
    assert got == pytest.approx(want, rel=0.02)


def test_imagenet_in_blocks_is_resident_on_141_gb_and_beside_resnet_18_on_80_gb():
    memory = {name: gib * 2**30 - GB for name, gib in (("A100", 80), ("H200", 141))}

    def fits(name, *overrides, processes=1):
        return fits_beside_training(recipe_of(*overrides), torch.bfloat16, IMAGENET, memory[name], processes)

    resnet50 = "model.backbone=resnet50"
    assert fits("H200") and fits("H200", resnet50) and fits("A100")
    assert not fits("A100", resnet50) and not fits("A100", "train.batch_size=1024")
    # A process with an eighth of the batch leaves room.
    assert fits("A100", "train.batch_size=1024", processes=8)


@pytest.mark.parametrize(
    "name",
    [
        "supervised",
        "hprob_vicreg",
        "beyond/byol",
        "beyond/zprob_simclr",
        "beyond/hzprob_barlow",
        "beyond/hprob_sigreg",
        "beyond/zprob_visreg",
    ],
)
def test_every_objective_has_an_estimate_above_the_lower_limit(name):
    recipe = recipe_of("model.backbone=test_resnet", "views.size=32", name=name)
    least = sum(step_needs(recipe, residence.outline_model(recipe), "cuda", 1).values())
    assert estimate_training(recipe, torch.bfloat16, 1) > least + 3 * GB


def test_draws_of_the_representation_pass_the_projector_each():
    def estimate(samples):
        keys = ["model.backbone=test_resnet", f"embedding.samples={samples}"]
        return estimate_training(recipe_of(*keys, name="hprob_vicreg"), None, 1)

    assert estimate(12) > estimate(1) + 512 * 11 * 1024 * 4  # at least an activation of the projector for each draw


def test_part_of_a_set_larger_than_the_device_may_be_resident(canvas, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(residence, "estimate_training", lambda *_: 1000)
    gpu(1000 + 20 * 32 * 32 * 3)
    listed = tmp_path / "twenty.txt"
    listed.write_text("\n".join(map(str, range(20))))

    def resident(*keys):
        return setup.is_resident(recipe_of(f"data.train={canvas}/train.beton", *keys), GPU)

    assert not resident() and resident(f"data.subset={listed}") and resident("data.limit=20")
    assert not resident("data.limit=21")


def test_blocks_count_as_blocks(canvas, canvas_bc4, canvas_jpeg, gpu, monkeypatch):
    for folder, size in ((canvas, 32 * 32 * 3), (canvas_bc4, 48 * 48 * 3 // 4), (canvas_jpeg, 96 * 96 * 3)):
        path = folder / "train.beton"
        assert image_bytes(read_header(path)) == BetonLoader(path, 8).image_bytes == size
    monkeypatch.setattr(residence, "estimate_training", lambda *_: 1000)
    recipe = recipe_of(f"data.train={canvas_bc4}/train.beton")
    for missing in (0, 1):
        gpu(1000 + 48 * 48 * 48 * 3 // 4 - missing)
        assert setup.is_resident(recipe, GPU) == (missing == 0)


def test_what_others_hold_of_a_gpu_is_not_room(canvas, gpu, monkeypatch):
    monkeypatch.setattr(residence, "estimate_training", lambda *_: 0)
    recipe = recipe_of(f"data.train={canvas}/train.beton")
    gpu(48 * 32 * 32 * 3, total=GB)
    assert setup.is_resident(recipe, GPU)
    gpu(48 * 32 * 32 * 3 - 1, total=GB)
    assert not setup.is_resident(recipe, GPU)
    # Four runs of a sweep: each counts a quarter.
    gpu(GB, total=4 * 48 * 32 * 32 * 3)
    with child_environment("0", 1, per_gpu=4):
        assert setup.is_resident(recipe, GPU)
    with child_environment("0", 1, per_gpu=5):
        assert not setup.is_resident(recipe, GPU)
    assert residence.RUNS_PER_GPU not in os.environ


def test_all_ranks_decide_alike(canvas, gpu, monkeypatch):
    """A set that does not fit on one GPU is resident on none."""
    monkeypatch.setattr(residence, "estimate_training", lambda *_: 0)
    gpu(GB)
    recipe = recipe_of(f"data.train={canvas}/train.beton")
    said = []
    monkeypatch.setattr(setup, "any_rank", lambda flag: said.append(flag) or True)
    assert not setup.is_resident(recipe, GPU) and said == [False]
    assert distributed.any_rank(False) is False
    # What the recipe or the kind of device decides needs no message.
    assert setup.is_resident(recipe_of("data.resident=true"), GPU)
    assert not setup.is_resident(recipe, torch.device("cpu")) and said == [False]


def test_a_small_set_is_resident_whatever_training_takes(monkeypatch):
    monkeypatch.setattr(residence, "estimate_training", lambda *_: 10 * GB)
    for size, fits in ((GB // 16, True), (GB // 16 + 1, False)):
        assert fits_beside_training(recipe_of(), None, size, GB, 1) == fits


def test_a_resident_set_that_does_not_fit_is_refused_before_it_is_loaded(gpu):
    recipe = recipe_of("model.backbone=test_resnet", "views.size=32", "train.batch_size=16")
    gpu(GB)
    check_memory(recipe, GPU, resident_bytes=GB // 2)
    with pytest.raises(UserError, match=r"needs at least 1.1 GB of memory on the GPU, .*: set data\.resident=false"):
        check_memory(recipe, GPU, resident_bytes=GB)


def test_a_model_that_cannot_be_traced_keeps_small_sets_resident(monkeypatch):
    class Branching(nn.Module):
        num_features = 8

        def forward(self, x):
            return x if x.sum() > 0 else -x

    outline = residence.outline_model(recipe_of("model.backbone=test_resnet"))
    outline.encoder = Branching()
    monkeypatch.setattr(residence, "outline_model", lambda recipe: outline)
    recipe = recipe_of("model.backbone=test_resnet")
    assert estimate_training(recipe, None, 1) is None
    assert fits_beside_training(recipe, None, 4 * GB, 64 * GB, 1)
    assert not fits_beside_training(recipe, None, 5 * GB, 64 * GB, 1)


def test_memory_that_this_process_uses_is_not_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 55 * GB)
    assert residence.free_memory_of_gpu(GPU) == 25 * GB


def test_a_wrong_size_of_views_is_found_before_the_encoder_is_traced(canvas, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "is_resident", lambda recipe, device: pytest.fail("traced"))
    recipe = recipe_of(*small(canvas, tmp_path / "run", "model.backbone=vit_tiny_patch16_224", "views.size=33"))
    with pytest.raises(UserError, match="views.size=33"):
        train(recipe)


def test_a_set_is_loaded_once_the_run_directory_is_locked(canvas_bc4, tmp_path, monkeypatch):
    """Loading may take minutes: another run with the same directory is refused meanwhile."""
    recipe = recipe_of(*small(canvas_bc4, tmp_path / "run", "data.resident=true"))
    load = BetonLoader.load_resident
    loads = []

    def load_while_locked(loader):
        loads.append(loader)
        with pytest.raises(UserError, match="Another process is training in"), locked_run_dir(tmp_path / "run"):
            pass
        return load(loader)

    monkeypatch.setattr(BetonLoader, "load_resident", load_while_locked)
    train(recipe)
    assert loads
    loads.clear()
    train(recipe, resume=tmp_path / "run")  # finished: there is nothing to load for
    assert loads == []
