"""Faster convolutions of few positions on a CPU, as in the last stages of a ResNet at 32 px.

A 3x3 convolution of 2x2 px reads mostly padding, and oneDNN multiplies the padding too. There every output position
sees the whole image, so the convolution is one product of matrices: 1.6 times as fast for a whole step of ResNet-18
at 32 px (records/cpu-precision.md).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallConvolution(nn.Conv2d):
    """nn.Conv2d without bias, groups and dilation. Outputs and gradients are the same to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        stride, padding = self.stride, cast(tuple[int, int], self.padding)
        rows = _first_taps(input.shape[-2], self.kernel_size[0], stride[0], padding[0])
        columns = _first_taps(input.shape[-1], self.kernel_size[1], stride[1], padding[1])
        if input.ndim != 4 or not rows or not columns:
            return super().forward(input)
        height, width = input.shape[-2:]
        weight_OKKC = self.weight.permute(0, 2, 3, 1)
        # For each output position: the part of the kernel that lies on the image.
        parts = [weight_OKKC[:, y : y + height, x : x + width].flatten(1) for y in rows for x in columns]
        matrix = parts[0] if len(parts) == 1 else torch.cat(parts)  # one part is a view of the weight
        flat = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix)
        return flat.view(len(input), len(rows), len(columns), self.out_channels).permute(0, 3, 1, 2)


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


def _first_taps(size: int, kernel: int, stride: int, padding: int) -> list[int]:
    """Along one axis and for each output position: the kernel's offset on the image's first pixel.

    Empty if a position does not see all `size` pixels: then a product of matrices would multiply zeros as well.
    """
    offsets = [padding - start for start in range(0, size + 2 * padding - kernel + 1, stride)]
    return offsets if all(0 <= offset <= kernel - size for offset in offsets) else []
