"""Convolutions as products of matrices: outputs and gradients are those of torch, in every geometry and precision."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from fastssl.models.small_convolution import SmallConvolution, use_small_convolutions

GEOMETRIES = [  # kernel, stride, padding, input's size, whether every output position sees the whole input
    ((3, 3), (1, 1), (1, 1), (1, 1), True),
    ((3, 3), (1, 1), (1, 1), (2, 2), True),
    ((3, 3), (2, 2), (1, 1), (2, 2), True),
    ((3, 3), (2, 2), (1, 1), (1, 2), True),
    ((7, 5), (2, 3), (3, 2), (4, 3), True),
    ((4, 4), (4, 4), (0, 0), (4, 4), True),
    ((7, 3), (2, 1), (3, 1), (4, 1), True),
    ((3, 3), (2, 2), (1, 1), (3, 4), False),
    ((3, 3), (1, 1), (1, 1), (2, 3), False),
    ((1, 1), (2, 2), (0, 0), (2, 2), False),
    ((2, 3), (1, 2), (0, 1), (3, 3), False),
]


@pytest.mark.parametrize("kernel, stride, padding, size, sees_all", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_the_convolution(
    kernel, stride, padding, size, sees_all, memory_format, monkeypatch
):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, kernel, stride, padding, bias=False, dtype=torch.float64).to(memory_format=memory_format)
    x = torch.randn(5, 6, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    want = conv2d(x, layer.weight, None, stride, padding)
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, [x, layer.weight], grad)
    use_small_convolutions(nn.ModuleList([layer]))
    products = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: products.append(linear(*args)) or products[-1])
    got = layer(x)
    assert len(products) == sees_all
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, [x, layer.weight], grad), want_grads)


def step_of(model, images, dtype):
    """The loss and all gradients, of the images too."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        h = model(images)
    loss = h.float().square().sum()
    return loss, torch.autograd.grad(loss, [images, *model.parameters()])


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_resnet_has_the_same_outputs_and_gradients(dtype, tolerance):
    """bf16 rounds every product by 0.4 %, and a layer's gradient passes on to the layers before it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    names = list(model.state_dict())
    loss, want = step_of(model, images, dtype)
    use_small_convolutions(model)
    assert sum(isinstance(layer, SmallConvolution) for layer in model.modules()) > 5
    assert list(model.state_dict()) == names
    other_loss, got = step_of(model, images, dtype)
    torch.testing.assert_close(other_loss, loss, rtol=tolerance, atol=0)
    assert [g.dtype for g in got] == [torch.float32] * len(want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_other_convolutions_stay():
    convolutions = [
        nn.Conv2d(4, 4, 3, bias=True), nn.Conv2d(4, 4, 3, bias=False, groups=4),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"), nn.Conv2d(4, 4, 3, bias=False, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2), nn.ConvTranspose2d(4, 4, 3, bias=False),
    ]  # fmt: skip
    model = nn.ModuleList(convolutions)
    use_small_convolutions(model)
    assert not any(isinstance(layer, SmallConvolution) for layer in model)
