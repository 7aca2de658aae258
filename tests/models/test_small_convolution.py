"""The gradient of convolutions with small outputs: that of torch, in every geometry and precision."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import conv2d

from fastssl.models.small_convolution import SmallConvolution, use_small_convolutions, weight_gradient

GEOMETRIES = [  # kernel, stride, padding, input's size
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (2, 2)),
    ((3, 3), (2, 2), (1, 1), (2, 2)),
    ((3, 3), (2, 2), (1, 1), (3, 4)),
    ((1, 1), (2, 2), (0, 0), (2, 2)),
    ((7, 5), (2, 3), (3, 2), (4, 5)),
    ((2, 3), (1, 2), (0, 1), (3, 3)),
    ((4, 4), (4, 4), (0, 0), (9, 4)),
]


@pytest.mark.parametrize("kernel, stride, padding, size", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_the_convolution(kernel, stride, padding, size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(5, 6, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 6, *kernel, dtype=torch.float64, requires_grad=True)
    y = conv2d(x, weight, None, stride, padding)
    grad = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, weight, grad)
    torch.testing.assert_close(weight_gradient(x, grad, weight.shape[2:], stride, padding), want)


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
    same, got = step_of(model, images, dtype)
    assert torch.equal(loss, same)
    assert [g.dtype for g in got] == [torch.float32] * len(want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert torch.equal(model(images), model(images))


def test_other_convolutions_stay():
    convolutions = [
        nn.Conv2d(4, 4, 3, bias=True), nn.Conv2d(4, 4, 3, bias=False, groups=4),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"), nn.Conv2d(4, 4, 3, bias=False, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2), nn.ConvTranspose2d(4, 4, 3, bias=False),
    ]  # fmt: skip
    model = nn.ModuleList(convolutions)
    use_small_convolutions(model)
    assert not any(isinstance(layer, SmallConvolution) for layer in model)
