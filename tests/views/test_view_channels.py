"""Views of images with one or many channels: no color operation, all others per channel."""

import pytest
import torch

from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, describe_eval_transform, eval_transform, operations
from fastssl.views.cpu import cpu_views
from fastssl.views.paired import torch_views
from fastssl.views.parameters import draw_parameters, draw_uniforms

CHANNELS = [1, 2, 4, 5]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def views_config(**keys) -> ViewsConfig:
    return ViewsConfig(**{"size": 16, "mean": (0.0,), "std": (1.0,), **keys})


def batch(channels: int, side: int = 24) -> torch.Tensor:
    return torch.randint(
        0, 256, (4, side, side, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(channels)
    )


@pytest.mark.parametrize("channels", CHANNELS)
def test_color_operations_are_left_out_and_others_are_not(channels):
    x = torch.rand(6, channels, 8, 8)
    order = torch.tensor([HUE, SATURATION, BRIGHTNESS, CONTRAST]).expand(6, 4)
    apply = torch.ones(6, dtype=torch.bool)
    colors = operations.color_jitter(x, apply, order, torch.tensor([[1.0, 1.0, 0.3, 0.4]]).expand(6, 4), with_hue=True)
    torch.testing.assert_close(colors, x)
    factor = torch.tensor([[0.5, 0.7, 0.3, 0.4]]).expand(6, 4)
    both = operations.color_jitter(x, apply, order, factor, with_hue=True)
    dark = 0.5 * x
    want = 0.7 * dark + 0.3 * dark.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(both, want)


def test_a_hue_of_strength_zero_changes_nothing():
    x = torch.rand(6, 3, 8, 8)
    order = torch.tensor([HUE, SATURATION, BRIGHTNESS, CONTRAST]).expand(6, 4)
    factor = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(6, 4)
    same = operations.color_jitter(x, torch.ones(6, dtype=torch.bool), order, factor, with_hue=False)
    torch.testing.assert_close(same, x)


@pytest.mark.parametrize("channels", CHANNELS)
def test_views_have_the_channels_of_the_images(channels):
    views = views_config(first=PerViewConfig(blur=0.5, solarize=0.5))
    image, index = batch(channels), torch.arange(4)
    pair = PairedViews(views, seed=3)(image, index, 0)
    assert [v.shape for v in pair] == [(4, channels, 16, 16)] * 2
    assert all(0 <= v.min() and v.max() <= 1 for v in pair)
    assert not torch.equal(*pair)
    # The channels of gray images stay equal: no operation treats one of them in another way.
    gray = image[..., :1].expand(-1, -1, -1, channels)
    for v in PairedViews(views, seed=3)(gray, index, 0):
        torch.testing.assert_close(v, v[:, :1].expand_as(v))


@pytest.mark.parametrize("channels", CHANNELS)
def test_crops_of_a_channel_are_those_of_rgb(channels):
    plain = {"jitter": JitterConfig(p=0), "gray": 0.0, "first": PerViewConfig(), "second": PerViewConfig()}
    views, index = views_config(**plain), torch.arange(4)
    image = batch(channels)
    ours = PairedViews(views)(image, index, 2)
    for channel in range(channels):
        rgb = image[..., channel, None].expand(-1, -1, -1, 3)
        for v, want in zip(ours, PairedViews(views)(rgb, index, 2)):
            torch.testing.assert_close(v[:, channel], want[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("eval", ["squash", "center"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_the_evaluation_transform_of_a_channel_is_that_of_rgb(channels, eval):
    views = views_config(eval=eval)
    image = batch(channels)
    ours = eval_transform(views)(image)
    assert ours.shape == (4, channels, 16, 16)
    want = eval_transform(views)(image[..., -1:].expand(-1, -1, -1, 3))
    torch.testing.assert_close(ours[:, -1], want[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", [(24, 24), (70, 40), (9, 20)])
def test_the_cpu_kernel_equals_the_torch_chain(channels, shape):
    views = views_config(first=PerViewConfig(blur=0.5, solarize=0.5), mean=(0.4,) * channels, std=(0.3,))
    count = 40
    image = torch.randint(0, 256, (count, *shape, channels), dtype=torch.uint8)
    drawn_uniforms = draw_uniforms(1, 0, torch.arange(count))
    drawn = draw_parameters(drawn_uniforms, views)
    box_N4 = PairedViews(views).crop_boxes(drawn_uniforms, image, None, None)
    ours, want = cpu_views(image, box_N4, drawn, views), torch_views(image, box_N4, drawn, views)
    difference = (ours - want).abs() * 0.3
    assert (difference < 1e-5).float().mean() > 0.999  # solarize jumps at its threshold
    assert difference.median() < 1e-6


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_one_mean_serves_every_channel(channels):
    one = views_config(mean=(0.4,), std=(0.2,))
    each = views_config(mean=(0.4,) * channels, std=(0.2,) * channels)
    image = batch(channels)
    assert torch.equal(eval_transform(one)(image), eval_transform(each)(image))
    for v, want in zip(PairedViews(one)(image, torch.arange(4), 0), PairedViews(each)(image, torch.arange(4), 0)):
        assert torch.equal(v, want)
    assert describe_eval_transform(one)["mean"] == [0.4]
