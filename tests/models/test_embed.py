"""`model.embed`: which tensors it refuses, and that paths, images and pixels are converted as by build-beton."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_run

import fastssl
from fastssl.beton import build_beton, read_names
from fastssl.loading import BetonLoader
from fastssl.recipe import Recipe
from fastssl.views import eval_transform


def run_on(folder: Path, train: Path, **sections):
    run, recipe, _ = make_run(folder, {"train": str(train)}, **sections)
    return fastssl.load_model(run), recipe


def beton_inputs(beton: Path, recipe: Recipe, crop: str) -> dict[str, torch.Tensor]:
    """The transformed images of a .beton by name."""
    loader = BetonLoader(beton, 1, crop=crop, views=recipe.views, shuffle=False)
    names = read_names(beton, range(1000))
    transform = eval_transform(recipe.views)
    return {names[int(batch.index)]: transform(batch.image, batch.height, batch.width) for batch in loader}


@pytest.mark.parametrize("kind", ["canvas", "canvas_jpeg", "canvas_bc4", "full"])
@pytest.mark.parametrize("view", ["squash", "center"])
def test_paths_are_converted_as_the_training_images(kind, view, photos, request, tmp_path):
    folder = request.getfixturevalue(kind)
    model, recipe = run_on(
        tmp_path / "run", folder / "train.beton", views={"size": 16, "eval": view}, embedding={"stochastic": "z"}
    )
    expected = beton_inputs(folder / "val.beton", recipe, "eval" if kind == "full" else "gpu")
    names = sorted(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the conversion is known
        found = model.embed([photos / name for name in names])
    by_tensor = model.embed(torch.cat([expected[name] for name in names]))
    assert found.space == "z"
    for name in ("h", "mu", "sigma"):
        assert torch.equal(getattr(found, name), getattr(by_tensor, name)), name


def test_images_of_pillow_and_pixels_follow_the_same_rules(canvas, tmp_path):
    model, _ = run_on(tmp_path / "run", canvas / "train.beton")
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    with_alpha = Image.fromarray(np.dstack([pixels, pixels[..., :1]]))
    with_alpha.save(tmp_path / "alpha.png")
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    names = ["rgb.png", "grey.png", "alpha.png", "turned.png"]
    expected = model.embed([tmp_path / name for name in names]).h
    assert torch.equal(model.embed([str(tmp_path / name) for name in names]).h, expected)
    assert torch.equal(model.embed([Image.open(tmp_path / name) for name in names]).h, expected)
    assert torch.equal(model.embed([pixels, pixels[..., 0], with_alpha]).h, expected[:3])
    assert len({row.numpy().tobytes() for row in expected}) == 4


def test_many_images_come_in_batches_in_their_order(canvas, tmp_path, monkeypatch):
    model, _ = run_on(tmp_path / "run", canvas / "train.beton", embedding={"stochastic": "h"})
    images = np.random.default_rng(0).integers(0, 255, (7, 40, 30, 3), dtype=np.uint8)
    whole = model.embed(images)
    monkeypatch.setattr("fastssl.models.embed.BATCH_SIZE", 3)
    for a, b in zip(model.embed(images)[:3], whole[:3]):
        torch.testing.assert_close(a, b)
    assert whole.h.shape[0] == 7 and torch.equal(whole.h, whole.mu)


@pytest.mark.parametrize("size, canvas_side", [(16, 32), (48, 64), (96, 256)])
def test_without_the_training_file_the_canvas_follows_the_views(size, canvas_side, photos, tmp_path):
    model, recipe = run_on(tmp_path / "run", tmp_path / "gone.beton", views={"size": size})
    build_beton("imagefolder", photos, tmp_path / "built", canvas=canvas_side, workers=1)
    expected = beton_inputs(tmp_path / "built/val.beton", recipe, "gpu")
    name = min(expected)
    with pytest.warns(UserWarning, match=f"gone.beton is not here.*canvas of {canvas_side} x {canvas_side} px"):
        found = model.embed([photos / name])
    assert torch.equal(found.h, model.embed(expected[name]).h)


def test_images_of_a_training_file_without_a_manifest(canvas, photos, tmp_path):
    (tmp_path / "train.beton").write_bytes((canvas / "train.beton").read_bytes())
    model, _ = run_on(tmp_path / "run", tmp_path / "train.beton")
    with pytest.warns(UserWarning, match="train.beton.json is not next to"):
        model.embed([photos / "val/class0/000.jpg"])


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8.*eval_transform"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(2, 16, 16, 3), ValueError, r"\(B, 3, H, W\), not \(2, 16, 16, 3\)"),
        (torch.zeros(3, 16, 16), ValueError, r"images\[None\]"),
        (torch.zeros(2, 1, 16, 16), ValueError, "not .2, 1, 16, 16"),
        (torch.full((2, 3, 16, 16), 255.0), ValueError, "255.*eval_transform"),
        (torch.rand(2, 3, 16, 16) * 255, ValueError, "normalized"),
        (torch.full((2, 3, 16, 16), torch.nan), ValueError, "not finite"),
        (torch.full((2, 3, 16, 16), -torch.inf), ValueError, "not finite"),
        ([], ValueError, "empty"),
        ("photo.jpg", TypeError, "list"),
        (Path("photo.jpg"), TypeError, "list"),
        (Image.new("RGB", (4, 4)), TypeError, "list"),
        ([3], TypeError, "not int"),
        ([torch.zeros(3, 16, 16)], TypeError, "not Tensor"),
        (["no/such/photo.jpg"], fastssl.common.errors.UserError, "no/such"),
        ([__file__], ValueError, "Image 0 .*test_embed.py. is bad: not an image"),
        ([np.zeros((4, 4, 3), np.float32)], ValueError, "Image 0 is bad: .*uint8"),
    ],
)
def test_what_embed_refuses(images, error, message, canvas, tmp_path):
    for objective in ({"name": "barlow_twins"}, {"name": "supervised", "classes": 3}):
        model, _ = run_on(tmp_path / objective["name"], canvas / "train.beton", objective=objective)
        with pytest.raises(error, match=message):
            model.embed(images)


def test_a_backbone_of_one_size_refuses_another(canvas, tmp_path):
    model, _ = run_on(
        tmp_path / "run",
        canvas / "train.beton",
        views={"size": 32},
        model={"backbone": "test_vit", "projector": {"out": 8}},
    )
    assert model.embed(torch.zeros(1, 3, 32, 32)).h.ndim == 2
    with pytest.raises(ValueError, match="test_vit was built for images of 32 x 32 px, not 48 x 32"):
        model.embed(torch.zeros(1, 3, 48, 32))


def test_embed_restores_the_mode_and_the_limit_of_pillow(canvas, photos, tmp_path):
    model, _ = run_on(tmp_path / "run", canvas / "train.beton")
    model.train()
    limit = Image.MAX_IMAGE_PIXELS
    model.embed([photos / "val/class0/000.jpg"])
    assert model.training and limit == Image.MAX_IMAGE_PIXELS
    assert model.embed(torch.zeros(0, 3, 16, 16)).h.shape[0] == 0
