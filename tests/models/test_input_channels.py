"""Encoders of images with one or many channels, and weights of RGB encoders for them."""

import pytest
import timm
import torch

from fastssl.models import build_encoder
from fastssl.models.encoder import adapt_input_channels


@pytest.mark.parametrize("in_chans", [1, 2, 5])
@pytest.mark.parametrize(
    "backbone, stem, layer",
    [
        ("test_resnet", "imagenet", "conv1.0"),
        ("resnet18", "small", "conv1"),
        ("vit_tiny_patch16_224", "imagenet", "patch_embed.proj"),
        ("convnext_atto", "imagenet", "stem.0"),
    ],
)
def test_the_first_layer_reads_all_channels(backbone, stem, layer, in_chans):
    encoder = build_encoder(backbone, stem, 64, in_chans).eval()
    assert encoder.get_submodule(layer).in_channels == in_chans
    images = torch.randn(2, in_chans, 64, 64)
    changed = images.clone()
    changed[:, -1] += 1
    assert not torch.equal(encoder(images), encoder(changed))


def test_weights_are_adapted_as_timm_does():
    rgb = torch.randn(8, 3, 3, 3)
    torch.testing.assert_close(adapt_input_channels(rgb, 1), rgb.sum(1, keepdim=True))
    torch.testing.assert_close(adapt_input_channels(rgb, 5), rgb[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert adapt_input_channels(rgb, 3) is rgb
    # Equal channels give the output that the encoder gave for gray images.
    gray = torch.randn(2, 1, 16, 16)
    want = torch.conv2d(gray.expand(-1, 3, -1, -1), rgb)
    torch.testing.assert_close(torch.conv2d(gray, adapt_input_channels(rgb, 1)), want)
    torch.testing.assert_close(torch.conv2d(gray.expand(-1, 6, -1, -1), adapt_input_channels(rgb, 6)), want)


@pytest.mark.parametrize("shape, in_chans", [((8, 192), 1), ((8, 192), 5), ((8, 48, 3, 3), 5)])
def test_layers_that_timm_cannot_adapt_give_none(shape, in_chans):
    assert adapt_input_channels(torch.zeros(shape), in_chans) is None


def test_three_channels_draw_the_same_weights_as_ever():
    torch.manual_seed(0)
    ours = build_encoder("test_resnet", "imagenet", 32)
    torch.manual_seed(0)
    of_timm = timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(ours.layer1[0].conv1.weight, of_timm.layer1[0].conv1.weight)
