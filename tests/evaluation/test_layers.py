"""Intermediate layers as features: what they are, their cache, and runs whose backbone has none."""

import numpy as np
import pytest
import torch
from many_channels import write_images
from small_models import make_run

from fastssl.beton import build_beton
from fastssl.common.errors import UserError
from fastssl.evaluation import BetonSubset, cached_features, load_run_encoder
from fastssl.evaluation.embed import embed_images
from fastssl.evaluation.features import eval_input, eval_loader
from fastssl.evaluation.ood import evaluate, evaluate_ood, find_sets, layers
from fastssl.evaluation.ood.layers import MAX_LAYERS, cached_layers, layer_means
from fastssl.models.encoder import build_encoder

PROJECTOR = {"layers": 2, "hidden": 16, "out": 8}


def run_of(folder, canvas, **model):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    sections = {"model": {"backbone": "test_resnet", "projector": PROJECTOR} | model, "views": {"size": 32}}
    return make_run(folder, data, **sections)[0]


def hooked_means(encoder, names, images):
    """The outputs of modules, averaged over positions or, for tokens, over all but the class token."""
    found = {}
    for name in names:
        encoder.get_submodule(name).register_forward_hook(lambda module, _, out, name=name: found.update({name: out}))
    with torch.no_grad():
        encoder(images)
    return [x.mean(dim=(2, 3)) if x.ndim == 4 else x[:, 1:].mean(dim=1) for x in (found[name] for name in names)]


@pytest.mark.parametrize(
    ("backbone", "stem", "names"),
    [
        ("test_resnet", "imagenet", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_resnet", "small", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", "imagenet", ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.5"]),
        ("test_vit3", "imagenet", ["blocks.0", "blocks.2", "blocks.4", "blocks.6", "blocks.8"]),
        ("test_convnext", "imagenet", ["stages.0", "stages.1", "stages.2", "stages.3"]),
    ],
)
def test_layers_are_stages_or_blocks_averaged_over_positions(backbone, stem, names, monkeypatch):
    torch.manual_seed(0)
    encoder = build_encoder(backbone, stem, 64).eval()
    images = torch.randn(7, 3, 64, 64)
    expected = hooked_means(encoder, names, images)
    monkeypatch.setattr(layers, "CHUNK_IMAGES", 3)
    with torch.no_grad():
        found = layer_means(encoder, images)
    assert len(found) <= MAX_LAYERS
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_cached_layers_are_those_of_each_image(backbone, canvas, tmp_path, monkeypatch):
    encoder = load_run_encoder(run_of(tmp_path / "run", canvas, backbone=backbone), device="cpu")
    data = BetonSubset(canvas / "val.beton")
    found = cached_layers(encoder, data)
    (batch,) = eval_loader(data, encoder.recipe.views, encoder.device)
    images = eval_input(encoder.recipe.views)(batch)[batch.valid]
    with torch.no_grad():
        for i, image in enumerate(images):
            for layer, own in zip(found, layer_means(encoder.model.encoder, image[None]), strict=True):
                np.testing.assert_allclose(layer[i], own[0], rtol=1e-3, atol=1e-5)
    assert not encoder.model.training
    # Written once; a cache that is damaged, or of other widths, is written again.
    monkeypatch.setattr(layers, "layers_of_batch", None)
    for ours, theirs in zip(cached_layers(encoder, data), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    monkeypatch.undo()
    (folder,) = (encoder.run_dir / "features").iterdir()
    expected = [layer.copy() for layer in found]
    (folder / "h.npy").write_bytes(b"no array")
    for ours, theirs in zip(cached_layers(encoder, data), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The cache of h has another name, and is not touched.
    h = cached_features(encoder, data).h
    assert h.shape == (12, encoder.model.encoder.num_features)
    assert len(list((encoder.run_dir / "features").iterdir())) == 2


def test_a_backbone_without_layers_is_skipped_with_the_reason(canvas, tmp_path, monkeypatch):
    encoder = load_run_encoder(run_of(tmp_path / "run", canvas), device="cpu")
    monkeypatch.delattr(type(encoder.model.encoder), "forward_intermediates")
    monkeypatch.setattr(evaluate.plots, "draw_ood_plots", lambda *arguments: None)
    names = ("knn_cosine", "layers_unlabelled", "layers_mahalanobis")
    monkeypatch.setattr(evaluate, "DETECTORS", {name: evaluate.DETECTORS[name] for name in names})
    result = evaluate_ood(encoder, find_sets(encoder, near=[canvas / "train.beton"]))
    reason = "timm does not return the intermediate layers of this backbone"
    assert result["skipped"] == dict.fromkeys(names[1:], reason) and set(result["detectors"]) == {"knn_cosine"}
    with pytest.raises(UserError, match=f"--score layers_unlabelled: {reason}"):
        embed_images(encoder, canvas / "val.beton", tmp_path / "x.npz", score="layers_unlabelled")
    assert not (tmp_path / "x.npz").exists()


def test_an_interrupted_pass_leaves_no_cache(canvas, tmp_path, monkeypatch):
    encoder = load_run_encoder(run_of(tmp_path / "run", canvas), device="cpu")
    data = BetonSubset(canvas / "val.beton")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "layers_of_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_layers(encoder, data)
    assert list((encoder.run_dir / "features").iterdir()) == []
    monkeypatch.undo()
    assert len(cached_layers(encoder, data)[0]) == 12


def test_layers_that_are_not_finite_are_refused(canvas, tmp_path):
    encoder = load_run_encoder(run_of(tmp_path / "run", canvas), device="cpu")
    with torch.no_grad():
        next(encoder.model.encoder.layer4.parameters()).fill_(torch.inf)
    with pytest.raises(UserError, match=r"not finite on .*val.beton"):
        cached_layers(encoder, BetonSubset(canvas / "val.beton"))
    assert list((encoder.run_dir / "features").iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*smaller than.*")
def test_layers_of_images_of_one_channel(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "source" / split, 1, 12)
    build_beton("imagefolder", tmp_path / "source", tmp_path / "built", canvas=32, workers=1, channels=1)
    views = {"size": 32, "mean": [0.5], "std": [0.25]}
    data = {"train": str(tmp_path / "built/train.beton"), "val": str(tmp_path / "built/val.beton")}
    model = {"backbone": "test_resnet", "in_chans": 1, "projector": PROJECTOR}
    folder, _, _ = make_run(tmp_path / "run", data, views=views, model=model)
    encoder = load_run_encoder(folder, device="cpu")
    found = cached_layers(encoder, BetonSubset(tmp_path / "built/val.beton"))
    assert [layer.shape[1] for layer in found] == [32, 32, 48, 192, 96]
