"""Features of a .beton, their cache, and the mean over draws."""

import dataclasses
import os
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_models import features_of, make_run
from torch import Tensor, nn

from fastssl.common.errors import UserError
from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.evaluation import BetonSubset, features, mean_of_draws
from fastssl.evaluation.features import (
    Features,
    check_finite,
    concatenate,
    embed_batches,
    eval_loader,
    read_features,
    write_features,
)
from fastssl.views import PairedViews


class FakeBatch(NamedTuple):
    image: Tensor
    label: Tensor
    index: Tensor
    height: Tensor
    width: Tensor
    valid: Tensor


class FakeEmbedding(NamedTuple):
    h: Tensor
    mu: Tensor | None = None
    sigma: Tensor | None = None
    space: str | None = None


class FakeModel(nn.Module):
    """With batch norm and dropout, whose outputs differ outside eval mode."""

    def __init__(self, stochastic=False):
        super().__init__()
        torch.manual_seed(0)
        self.stochastic = stochastic
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def embed(self, images):
        h = self.net(images)
        return FakeEmbedding(h, h + 1, h.exp(), "z") if self.stochastic else FakeEmbedding(h)


def fake_batches(count=10, batch_size=4):
    """Batches of 4x4 images. The last one is filled up with copies, which are not valid."""
    images = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for first in range(0, count, batch_size):
        position = first + torch.arange(batch_size)
        row = position % count
        yield FakeBatch(images[row], row % 3, 100 + row, 40 + row, 50 + row, position < count)


def fake_input(batch):
    return batch.image.permute(0, 3, 1, 2).float() / 255


def extracted(model, make_input=fake_input, advance=lambda images: None):
    return concatenate(list(embed_batches(model, fake_batches(), make_input, advance)))


def test_every_valid_sample_is_embedded_once_in_eval_mode():
    model = FakeModel()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    found = extracted(model, advance=told.append)

    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.index.tolist() == list(range(100, 110))
    assert found.label.tolist() == [i % 3 for i in range(10)]
    assert told == [4, 4, 2]
    assert found.mu is None and found.sigma is None
    assert (found.h.dtype, found.label.dtype, found.index.dtype) == (np.float32, np.int64, np.int64)

    (whole,) = fake_batches(batch_size=10)
    with torch.no_grad():
        expected = model.eval().embed(fake_input(whole)).h
    # The same function on batches of another size: equal but for rounding.
    np.testing.assert_allclose(found.h, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_training_mode_is_restored_after_an_error():
    model = FakeModel()
    with pytest.raises(RuntimeError):
        extracted(model, lambda batch: torch.zeros(1, 3, 2, 2))
    assert model.training


def test_cudnn_flags_other_than_tf32_do_not_change(monkeypatch):
    """torch.backends.cudnn.flags() disables cudnn unless told otherwise."""
    model, seen = FakeModel(), []
    embed = model.embed
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(model, "embed", lambda x: (seen.append((cudnn.enabled, cudnn.allow_tf32)), embed(x))[1])
    before = cudnn.enabled, cudnn.allow_tf32
    for _ in embed_batches(model, fake_batches(), fake_input, lambda images: None):
        assert (cudnn.enabled, cudnn.allow_tf32) == before
    assert set(seen) == {(True, False)}


def test_mu_and_sigma_are_returned_and_autocast_is_off():
    model = FakeModel(stochastic=True)
    plain = extracted(model)
    np.testing.assert_array_equal(plain.mu, plain.h + 1)
    assert plain.sigma.shape == plain.h.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = extracted(model)
    for name, array in plain.arrays().items():
        np.testing.assert_array_equal(surrounded.arrays()[name], array)


def written(folder, stochastic=False, dtype="float32"):
    batches = embed_batches(FakeModel(stochastic), fake_batches(), fake_input, lambda images: None)
    write_features(folder, batches, 10, dtype)
    return folder


@pytest.mark.parametrize("stochastic", [False, True])
def test_cached_features_are_equal_memory_maps(tmp_path, stochastic):
    expected = extracted(FakeModel(stochastic))
    read = read_features(written(tmp_path / "features" / "x", stochastic))
    assert read.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        assert read.arrays()[name].dtype == array.dtype and np.array_equal(read.arrays()[name], array)
    assert expected.space == read.space and isinstance(read.h, np.memmap) and not read.h.flags.writeable
    assert os.listdir(tmp_path / "features") == ["x"]
    part = read.select(np.array([3, 1]))
    np.testing.assert_array_equal(part.h, expected.h[[3, 1]])
    half = read_features(written(tmp_path / "half", stochastic, "float16"))
    assert half.h.dtype == np.float16 and half.label.dtype == np.int64
    np.testing.assert_allclose(half.h, expected.h, rtol=2**-11)


def test_mu_of_a_stochastic_h_is_stored_once(tmp_path):
    h = np.ones((4, 3), np.float32)
    batch = Features(h, np.arange(4), np.arange(4), h, 2 * h, "h")
    write_features(tmp_path / "x", [batch], 4)
    read = read_features(tmp_path / "x")
    assert read.mu is read.h and not (tmp_path / "x" / "mu.npy").exists()
    np.testing.assert_array_equal(read.sigma, 2 * h)


def test_an_interrupted_extraction_leaves_no_files(tmp_path):
    def broken():
        yield from list(embed_batches(FakeModel(), fake_batches(), fake_input, lambda n: None))[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "features" / "x", broken(), 10)
    assert os.listdir(tmp_path / "features") == []


def test_a_full_disk_is_a_user_error_and_leaves_no_files(tmp_path, monkeypatch):
    """Writing to a memory map on a full disk would kill the process."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device.: free some space"):
        written(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_the_cache_of_a_faster_process_is_not_replaced(tmp_path, monkeypatch):
    def late():
        yield from embed_batches(FakeModel(), fake_batches(), fake_input, lambda images: None)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)
            written(tmp_path / "x")

    write_features(tmp_path / "x", late(), 10)
    assert read_features(tmp_path / "x") is not None and os.listdir(tmp_path) == ["x"]


def test_numbers_that_are_not_finite_or_too_large_are_refused():
    h = np.full((2, 3), 1e5, np.float32)
    batch = Features(h, np.arange(2), np.arange(2))
    assert list(check_finite([batch], "x.beton", "float32")) == [batch]
    with pytest.raises(UserError, match="1e.05.*--dtype float16"):
        list(check_finite([batch], "x.beton", "float16"))
    h[1, 2] = np.nan
    with pytest.raises(UserError, match="not finite on x.beton"):
        list(check_finite([batch], "x.beton", "float32"))


def test_a_damaged_cache_is_not_read(tmp_path):
    folder = written(tmp_path / "x", stochastic=True)
    assert isinstance(read_features(folder), Features) and read_features(tmp_path / "none") is None
    for name in ("h.npy", "label.npy", "about.json"):
        good = (folder / name).read_bytes()
        flipped = bytearray(good)
        flipped[-5] ^= 1
        for content in (b"", b"not a cache", good[:20], good[:-1], bytes(flipped), b"{}", b"[1]", pickle.dumps([1])):
            (folder / name).write_bytes(content)
            assert read_features(folder) is None, (name, content[:20])
        (folder / name).unlink()
        assert read_features(folder) is None
        (folder / name).write_bytes(good)
    assert isinstance(read_features(folder), Features)


@pytest.mark.parametrize("normalize", [True, False])
def test_mean_logits_over_draws_are_the_logits_of_the_mean_draw(normalize, monkeypatch):
    """For a random linear classifier, with the draws written out; float32 sums in another order."""
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=(50, 6)).astype(np.float32), rng.uniform(0.1, 2, (50, 6)).astype(np.float32)
    features_h = Features(mu, np.zeros(50, np.int64), np.arange(100, 150), mu, sigma, "h")
    mean = mean_of_draws(features_h, 12, seed=3, normalize=normalize)
    noise_SBD = normals(3, 0, torch.arange(100, 150), 0, 12, 6, NOISE_EVALUATION)
    draws_SBD = torch.from_numpy(mu) + torch.from_numpy(sigma) * noise_SBD
    weight, bias = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -2.0, 0.5, 0.0])
    if normalize:
        draws_SBD = draws_SBD / draws_SBD.norm(dim=-1, keepdim=True)
    averaged = torch.stack([draw @ weight.T + bias for draw in draws_SBD]).mean(0)
    torch.testing.assert_close(torch.from_numpy(mean) @ weight.T + bias, averaged, rtol=1e-5, atol=1e-5)
    assert not np.allclose(mean, mu, atol=0.01)  # 12 draws are noisy, and their mean is shorter than mu
    monkeypatch.setattr(features, "CHUNK_BYTES", 4 * 12 * 6 * 7)
    np.testing.assert_allclose(mean_of_draws(features_h, 12, seed=3, normalize=normalize), mean, rtol=1e-6)
    many = mean_of_draws(
        dataclasses.replace(features_h, mu=mu[:1], sigma=sigma[:1], index=np.arange(1)), 4000, 3, normalize=False
    )
    np.testing.assert_allclose(many, mu[:1], atol=4 * 2 / 4000**0.5)  # four standard errors
    with pytest.raises(ValueError, match="stochastic h"):
        mean_of_draws(dataclasses.replace(features_h, space="z"), 12, 3, normalize=True)


# From here on with a real .beton, loader and model.


@pytest.fixture
def run(canvas, tmp_path):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    return make_run(tmp_path / "run", data)


@pytest.fixture
def extractions(monkeypatch):
    """Counts how often features are computed."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return embed_batches(*args, **kwargs)

    monkeypatch.setattr(features, "embed_batches", counting)
    return calls


def test_features_are_computed_once_for_the_same_weights_data_and_view(run, canvas, extractions, tmp_path):
    folder, recipe, model = run
    beton = canvas / "val.beton"
    first = features_of(folder, beton, model=model, views=recipe.views)
    assert sorted(first.index) == list(range(12)) and first.h.shape == (12, 96)
    again = features_of(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 1
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)

    with torch.no_grad():
        next(model.encoder.parameters()).mul_(2)
    features_of(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 2
    features_of(folder, beton, model=model, views=recipe.views.model_copy(update={"size": 24}))
    assert len(extractions) == 3
    assert len(features_of(folder, beton, model=model, views=recipe.views, limit=7).label) == 7
    assert len(extractions) == 4
    features_of(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 4
    (tmp_path / "list.txt").write_text("3\n5\n7")
    listed = features_of(folder, beton, model=model, views=recipe.views, subset=tmp_path / "list.txt")
    assert sorted(listed.index) == [3, 5, 7]
    (tmp_path / "list.txt").write_text("3\n5\n8")
    listed = features_of(folder, beton, model=model, views=recipe.views, subset=tmp_path / "list.txt")
    assert sorted(listed.index) == [3, 5, 8]
    del extractions[4:]
    half = features_of(folder, beton, model=model, views=recipe.views, dtype="float16")
    assert len(extractions) == 5 and half.h.dtype == np.float16
    features_of(folder, beton, model=model, views=recipe.views.model_copy(update={"eval": "center"}))
    assert len(extractions) == 6


def test_a_changed_file_or_a_damaged_cache_is_computed_again(run, canvas, extractions, tmp_path):
    folder, recipe, model = run
    beton = tmp_path / "copy.beton"
    beton.write_bytes((canvas / "val.beton").read_bytes())
    first = np.array(features_of(folder, beton, model=model, views=recipe.views).h)
    (cache,) = (folder / "features").iterdir()
    (cache / "h.npy").write_bytes((cache / "h.npy").read_bytes()[:-100])
    again = features_of(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 2
    np.testing.assert_array_equal(first, again.h)
    os.utime(beton, (1, 1))
    features_of(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 3
    with pytest.raises(UserError, match="nowhere.beton"):
        features_of(folder, tmp_path / "nowhere.beton", model=model, views=recipe.views)


@pytest.mark.parametrize("layout", ["canvas", "canvas_bc4", "full"])
@pytest.mark.parametrize("stochastic", ["none", "z"])
def test_features_of_two_augmented_views(layout, stochastic, tmp_path, request):
    """Equal to embedding each view of PairedViews alone."""
    beton = request.getfixturevalue(layout) / "val.beton"
    folder, recipe, model = make_run(tmp_path / "run", {"train": str(beton)}, embedding={"stochastic": stochastic})
    both = features_of(folder, beton, model=model, views=recipe.views, augmented=True)
    width = 8 if stochastic == "z" else None
    assert both.h.shape == (12, 2, 96) and (both.mu is None if width is None else both.mu.shape == (12, 2, width))
    (batch,) = eval_loader(BetonSubset(beton), recipe.views, torch.device("cpu"), augmented=True)
    pair = PairedViews(recipe.views)(batch.image, batch.index, 0, batch.height, batch.width)
    for view, images in enumerate(pair):
        expected = model.embed(images[batch.valid])
        np.testing.assert_allclose(both.h[:, view], expected.h, rtol=1e-4, atol=1e-5)
        if width:
            np.testing.assert_allclose(both.sigma[:, view], expected.sigma, rtol=1e-4, atol=1e-5)
    assert not np.allclose(both.h[:, 0], both.h[:, 1])
    single = features_of(folder, beton, model=model, views=recipe.views)
    assert single.h.shape == (12, 96)  # cached under another name
