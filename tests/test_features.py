"""Feature extraction, its cache, and both evaluations of a run directory."""

import json
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastssl.beton import build_beton
from fastssl.evaluation import (
    cached_features,
    evaluate_knn,
    evaluate_linear,
    extract_features,
    features,
    knn_accuracy,
    linear_accuracy,
    result_table,
)
from fastssl.evaluation.features import Features, read_features, write_features
from fastssl.models import SSLModel
from fastssl.recipe import Recipe, UserError

SIZE = 16


class FakeBatch(NamedTuple):
    image: Tensor
    label: Tensor
    index: Tensor
    valid: Tensor


class FakeEmbedding(NamedTuple):
    h: Tensor
    mu: Tensor | None = None
    sigma: Tensor | None = None


class FakeModel(nn.Module):
    """Batch norm and dropout, both of which betray a model that is not in eval mode."""

    def __init__(self, stochastic=False):
        super().__init__()
        torch.manual_seed(0)
        self.stochastic = stochastic
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def embed(self, images):
        h = self.net(images)
        return FakeEmbedding(h, h + 1, h.exp()) if self.stochastic else FakeEmbedding(h)


def fake_batches(count=10, batch_size=4):
    """Batches of 4x4 images; the last one is filled up with copies that are marked as such."""
    images = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for first in range(0, count, batch_size):
        place = first + torch.arange(batch_size)
        row = place % count
        yield FakeBatch(images[row], row % 3, 100 + row, place < count)


def fake_clean(image):
    return image.permute(0, 3, 1, 2).float() / 255


def test_every_valid_sample_once_in_eval_mode():
    model = FakeModel()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    found = extract_features(model, fake_batches(), fake_clean, advance=told.append)

    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.index.tolist() == list(range(100, 110))
    assert found.label.tolist() == [i % 3 for i in range(10)]
    assert told == [4, 4, 2]
    assert found.mu is None and found.sigma is None
    assert (found.h.dtype, found.label.dtype, found.index.dtype) == (np.float32, np.int64, np.int64)

    (whole,) = fake_batches(batch_size=10)
    with torch.no_grad():
        expected = model.eval().embed(fake_clean(whole.image)).h
    # The same function on batches of another size: equal but for rounding.
    np.testing.assert_allclose(found.h, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_mode_is_restored_after_an_error():
    model = FakeModel()
    with pytest.raises(RuntimeError):
        extract_features(model, fake_batches(), lambda image: torch.zeros(1, 1))
    assert model.training


def test_mu_and_sigma_are_kept_and_autocast_is_off():
    model = FakeModel(stochastic=True)
    plain = extract_features(model, fake_batches(), fake_clean)
    np.testing.assert_array_equal(plain.mu, plain.h + 1)
    assert plain.sigma.shape == plain.h.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = extract_features(model, fake_batches(), fake_clean)
    for a, b in zip(plain, surrounded, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_cache_file_gives_back_what_was_written(tmp_path, stochastic):
    written = extract_features(FakeModel(stochastic), fake_batches(), fake_clean)
    write_features(tmp_path / "features" / "x.safetensors", written)
    read = read_features(tmp_path / "features" / "x.safetensors")
    for a, b in zip(written, read, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
    assert os.listdir(tmp_path / "features") == ["x.safetensors"]


def test_a_damaged_cache_file_counts_as_none(tmp_path):
    path = tmp_path / "x.safetensors"
    write_features(path, extract_features(FakeModel(), fake_batches(), fake_clean))
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    damaged = [
        b"",
        b"not a cache",
        good[:20],
        good[:-1],
        bytes(flipped),
        b"\xff" * 100,
        good + b"x",
    ]
    for content in damaged:
        path.write_bytes(content)
        assert read_features(path) is None, content[:20]
    path.write_bytes(good)
    assert isinstance(read_features(path), Features)
    assert read_features(tmp_path / "none.safetensors") is None


# From here on with a real .beton, loader and model.


def make_run(folder, data, *, seed=0, **sections):
    """A run directory with an untrained model's checkpoint."""
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": data,
            "views": {"size": SIZE},
            "model": {"backbone": "resnet10t"},
            **sections,
        }
    )
    torch.manual_seed(seed)
    model = SSLModel(recipe)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # timm has some zeros, which hide the weights before them
    (folder / "checkpoints").mkdir(parents=True)
    saved = {"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder, recipe, model


@pytest.fixture
def run(canvas, tmp_path):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    return make_run(tmp_path / "run", data)


@pytest.fixture
def extractions(monkeypatch):
    """Counts how often features were really extracted."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return extract_features(*args, **kwargs)

    monkeypatch.setattr(features, "extract_features", counting)
    return calls


def test_features_are_extracted_once_for_the_same_weights_data_and_view(run, canvas, extractions):
    folder, recipe, model = run
    beton = canvas / "val.beton"
    first = cached_features(folder, beton, model=model, views=recipe.views)
    assert sorted(first.index) == list(range(12)) and first.h.shape == (12, 512)
    again = cached_features(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 1
    for a, b in zip(first[:3], again[:3], strict=True):
        np.testing.assert_array_equal(a, b)

    with torch.no_grad():
        model.encoder.conv1[0].weight.mul_(2)
    cached_features(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 2
    cached_features(folder, beton, model=model, views=recipe.views.model_copy(update={"size": 24}))
    assert len(extractions) == 3
    assert len(cached_features(folder, beton, model=model, views=recipe.views, limit=7).label) == 7
    assert len(extractions) == 4
    cached_features(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 4


def test_a_changed_file_or_a_damaged_cache_means_extracting_again(run, canvas, extractions, tmp_path):
    folder, recipe, model = run
    beton = tmp_path / "copy.beton"
    beton.write_bytes((canvas / "val.beton").read_bytes())
    first = cached_features(folder, beton, model=model, views=recipe.views)
    (cache,) = (folder / "features").iterdir()
    cache.write_bytes(cache.read_bytes()[:-100])
    again = cached_features(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 2
    np.testing.assert_array_equal(first.h, again.h)
    os.utime(beton, (1, 1))
    cached_features(folder, beton, model=model, views=recipe.views)
    assert len(extractions) == 3
    with pytest.raises(UserError, match="nowhere.beton"):
        cached_features(folder, tmp_path / "nowhere.beton", model=model, views=recipe.views)


def test_a_full_file_and_a_stochastic_model_are_evaluated_too(full, canvas, tmp_path):
    data = {"train": str(full / "train.beton"), "val": str(full / "val.beton")}
    folder, recipe, model = make_run(tmp_path / "run", data, embedding={"stochastic": "z"})
    result = evaluate_knn(folder, ks=(5,), device="cpu")
    assert result["layout"] == "full" and result["train"]["images"] == 48
    found = cached_features(folder, full / "val.beton", model=model, views=recipe.views)
    assert found.mu.shape == found.sigma.shape == (12, 1024) and found.h.shape == (12, 512)
    assert (found.sigma > 0).all() and not np.array_equal(found.mu, found.sigma)
    # One full file and one canvas are not a full evaluation.
    mixed = evaluate_knn(folder, ks=(5,), val=canvas / "val.beton", device="cpu")
    assert mixed["layout"] == "canvas"


def test_evaluate_knn_and_linear_write_what_they_return(run, canvas, extractions):
    folder, recipe, model = run
    train, val = (
        cached_features(folder, canvas / f"{split}.beton", model=model, views=recipe.views)
        for split in ("train", "val")
    )
    knn = evaluate_knn(folder, ks=(5, 20), device="cpu")
    linear = evaluate_linear(folder, epochs=3, seed=4, device="cpu")
    assert len(extractions) == 2  # both evaluations read the cache

    data = train.h, train.label, val.h, val.label
    assert knn["figures"] == {f"accuracy_k{k}": knn_accuracy(*data, k=k) for k in (5, 20)}
    expected = linear_accuracy(*data, epochs=3, seed=4)
    assert linear["figures"]["accuracy"] == expected.accuracy
    assert (linear["lr"], linear["seed"]) == (expected.lr, 4)
    for name, result in (("knn", knn), ("linear", linear)):
        kept = json.loads((folder / "eval" / f"{name}.json").read_text())
        assert kept == json.loads(json.dumps(result))
        assert (kept["train"]["images"], kept["val"]["images"], kept["classes"]) == (48, 12, 3)
        assert kept["layout"] == "canvas" and len(kept["encoder_sha256"]) == 64
        assert result_table(result).row_count == 2
    assert sorted(os.listdir(folder / "eval")) == ["knn.json", "linear.json"]


def test_the_training_images_are_limited_as_in_training(canvas, tmp_path):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton"), "limit": 25}
    folder, _, _ = make_run(tmp_path / "run", data)
    assert evaluate_knn(folder, ks=(5,), device="cpu")["train"]["images"] == 25
    # A file named on the command line is used whole.
    result = evaluate_knn(folder, ks=(5,), train=canvas / "train.beton", device="cpu")
    assert result["train"] == {"path": str(canvas / "train.beton"), "images": 48, "subset": None, "limit": None}


def test_user_errors_are_one_sentence_with_the_mend(run, canvas, tmp_path):
    folder, _, _ = run
    with pytest.raises(UserError, match="not a run directory"):
        evaluate_knn(tmp_path / "nothing")
    with pytest.raises(UserError, match="--k 200 is not between 1 and the 48 images"):
        evaluate_knn(folder, device="cpu")
    with pytest.raises(UserError, match="gone.beton"):
        evaluate_linear(folder, val=tmp_path / "gone.beton")

    without_val, _, _ = make_run(tmp_path / "without_val", {"train": str(canvas / "train.beton")})
    with pytest.raises(UserError, match="no data.val .* --val"):
        evaluate_knn(without_val)
    (without_val / "checkpoints" / "last.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate_knn(without_val, val=canvas / "val.beton")

    (tmp_path / "one" / "train" / "only").mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "one" / "train" / "only" / "0.png")
    build_beton("imagefolder", tmp_path / "one", tmp_path / "one", canvas=SIZE, workers=1)
    with pytest.raises(UserError, match="one class only"):
        evaluate_linear(folder, train=tmp_path / "one" / "train.beton", device="cpu")


def test_an_encoder_that_gives_nan_is_refused(canvas, tmp_path):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    folder, recipe, model = make_run(tmp_path / "run", data)
    with torch.no_grad():
        model.encoder.layer4[0].conv1.weight.fill_(float("nan"))
    saved = {"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="not finite"):
        evaluate_knn(folder, device="cpu")
