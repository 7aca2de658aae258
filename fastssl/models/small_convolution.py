"""A faster gradient for convolutions of few output positions on a CPU, as in the last stages of a ResNet at 32 px.

For the weight's gradient, oneDNN walks through the whole weight at each position, and multiplies the padding too. Here
each position of the kernel is one product of matrices, and those that only meet padding are zero: 6 times as fast for a
3x3 convolution of 512 channels at 1x1 px, and 1.2 to 1.3 times for a whole step of ResNet-18 at 32 px
(records/cpu-precision.md).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_POSITIONS = 4  # of the output: with more, oneDNN is as fast


class SmallConvolution(nn.Conv2d):
    """nn.Conv2d without bias, groups and dilation. Its output is the same, its weight's gradient to rounding.

    It has no second derivative.
    """

    def forward(self, input: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else self.weight.dtype
        # Autocast casts from fp32 only.
        castable = {torch.float32, dtype} if autocast else {dtype}
        if input.ndim != 4 or not {input.dtype, self.weight.dtype} <= castable:
            return super().forward(input)
        sizes = zip(input.shape[2:], self.kernel_size, self.stride, cast(tuple[int, int], self.padding))
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if height * width > MOST_POSITIONS or not learns or torch.compiler.is_compiling():
            return super().forward(input)
        return cast(Tensor, _Convolve.apply(input, self.weight, self.stride, self.padding, dtype))


def use_small_convolutions(model: nn.Module) -> None:
    """Make every convolution in `model` a SmallConvolution that can be one. Parameters and their names stay."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and layer.bias is None and layer.groups == 1 and layer.dilation == (1, 1):
            if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                layer.__class__ = SmallConvolution


def use_plain_convolutions(model: nn.Module) -> None:
    """The reverse of `use_small_convolutions`."""
    for layer in model.modules():
        if type(layer) is SmallConvolution:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
            )
        return grad_x, weight_gradient(x, grad, weight.shape[2:], ctx.stride, ctx.padding), None, None, None


def weight_gradient(
    x: Tensor, grad: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient (O, C, *kernel) of a convolution's weight, in fp32 (fp64 for fp64).

    Args:
        x: the input (B, C, H, W).
        grad: the gradient of the output (B, O, h, w).
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    result = torch.zeros(grad.shape[1], *kernel, x.shape[1], dtype=dtype, device=grad.device)
    columns = list(_taps(kernel[1], stride[1], padding[1], x.shape[3], grad.shape[3]))
    for row in _taps(kernel[0], stride[0], padding[0], x.shape[2], grad.shape[2]):
        for column in columns:
            x_NC = x[:, :, row.input, column.input].movedim(1, -1).flatten(0, -2)
            grad_NO = grad[:, :, row.output, column.output].movedim(1, -1).flatten(0, -2)
            result[:, row.offset, column.offset] = grad_NO.T @ x_NC
    return result.movedim(-1, 1)


class _Tap(NamedTuple):
    """An offset in the kernel, along one axis, with the positions of input and output that it joins."""

    offset: int
    input: slice
    output: slice


def _taps(kernel: int, stride: int, padding: int, size: int, positions: int) -> Iterator[_Tap]:
    """Yield the offsets that meet the image: of the input's `size`, at some of the output's positions."""
    for offset in range(kernel):
        first = max(0, -((offset - padding) // stride))
        last = min(positions - 1, (size - 1 + padding - offset) // stride)
        if first <= last:
            begin = first * stride + offset - padding
            end = last * stride + offset - padding + 1
            yield _Tap(offset, slice(begin, end, stride), slice(first, last + 1))
