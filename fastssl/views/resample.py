"""Cropping and resizing as one matrix product along each axis."""

import torch
from torch import Tensor


def resize_matrix(start_N: Tensor, length_N: Tensor, flip_N: Tensor, in_size: int, out_size: int) -> Tensor:
    """(N, out_size, in_size) float32: bilinear resampling of the interval [start, start + length).

    The filter is a triangle of radius max(1, length / out_size) input pixels, cut off at the interval
    and normalised: Pillow's and torchvision's antialiased bilinear filter after a crop. The interval is
    in input pixels and may be fractional; pixels that it touches count. flip_N reverses the output.
    """
    start, length = start_N.float()[:, None, None], length_N.float()[:, None, None]
    out = torch.arange(out_size, device=start.device)[:, None] + 0.5
    out = torch.where(flip_N[:, None, None], out_size - out, out)
    pixel = torch.arange(in_size, device=start.device) + 0.5

    scale = length / out_size
    distance = (pixel - (start + out * scale)).abs()
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    touched = (pixel + 0.5 > start) & (pixel - 0.5 < start + length)
    weight = weight * touched
    return weight / weight.sum(dim=-1, keepdim=True)


def resample(image_NCHW: Tensor, rows_Nyh: Tensor, columns_Nxw: Tensor) -> Tensor:
    """Apply a matrix along the height and one along the width: (N, C, H, W) to (N, C, y, x)."""
    return rows_Nyh[:, None] @ image_NCHW @ columns_Nxw[:, None].transpose(-1, -2)
