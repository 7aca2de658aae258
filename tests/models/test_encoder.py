"""Backbones by name: shapes, timm's parameter names, and error messages."""

import pytest
import timm
import torch

from fastssl.common.errors import UserError
from fastssl.models import build_encoder


@pytest.mark.parametrize(
    "stem, kernel, map_size",
    [("imagenet", (7, 7), 1), ("small", (3, 3), 4)],  # of a 32 px image after stage 4
)
def test_resnet18(stem, kernel, map_size):
    encoder = build_encoder("resnet18", stem, 32).eval()
    assert encoder.num_features == 512
    assert encoder.conv1.weight.shape == (64, 3, *kernel)
    images = torch.randn(2, 3, 32, 32)
    assert encoder(images).shape == (2, 512)
    assert encoder.forward_features(images).shape == (2, 512, map_size, map_size)
    of_timm = timm.create_model("resnet18", num_classes=0)
    assert list(encoder.state_dict()) == list(of_timm.state_dict())


def test_small_stem_is_initialized_as_in_timm():
    weight = build_encoder("resnet18", "small", 32).conv1.weight
    # He initialization by fan-out, 64 channels x 9 weights; 1,728 numbers, 5 standard errors.
    want = (2 / (64 * 9)) ** 0.5
    assert abs(weight.std().item() / want - 1) < 5 / (2 * 1728) ** 0.5


@pytest.mark.parametrize(
    "backbone, width",
    [
        ("vit_tiny_patch16_224", 192),  # its position embedding must fit another image size
        ("mobilenetv3_small_050", 1024),  # its features widen once more after pooling
    ],
)
def test_other_families(backbone, width):
    encoder = build_encoder(backbone, "imagenet", 64).eval()
    assert encoder.num_features == width
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, width)
    of_timm = timm.create_model(backbone, num_classes=0)
    assert list(encoder.state_dict()) == list(of_timm.state_dict())


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match=r"'resnet_18'.* resnet18"):
        build_encoder("resnet_18", "imagenet", 32)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp/x", "timm/resnet18"])
def test_names_that_may_download_are_refused(name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("timm was called"))
    with pytest.raises(UserError, match="model.backbone"):
        build_encoder(name, "imagenet", 32)


def test_small_stem_needs_a_resnet():
    with pytest.raises(UserError, match="model.stem=imagenet"):
        build_encoder("vit_tiny_patch16_224", "small", 32)
