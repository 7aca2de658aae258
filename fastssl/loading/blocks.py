"""Batches of images that are still compressed in blocks (build-beton --codec bc4), on any device."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastssl.beton.bc4 import (
    BLOCK,
    BLOCK_BYTES,
    BLUE_OF_CB_Q16,
    GREEN_OF_CB_Q16,
    GREEN_OF_CR_Q16,
    RED_OF_CR_Q16,
    read_only,
)
from fastssl.beton.format import bc4_bytes, is_bc4_side
from fastssl.common.constants import constant
from fastssl.common.threads import run_in_threads
from fastssl.loading import kernels

# The parts of an interpolated level that come from the two endpoints, by index: of 7, if the first endpoint is larger.
_OF_7 = ((7, 0), (0, 7), (6, 1), (5, 2), (4, 3), (3, 4), (2, 5), (1, 6))
_OF_5 = ((5, 0), (0, 5), (4, 1), (3, 2), (2, 3), (1, 4), (0, 0), (0, 0))  # else of 5, and the last two are 0 and 255


@dataclass(frozen=True, slots=True, eq=False)
class BlockImages:
    """Images that are compressed in blocks: those of a batch, or all of a resident set.

    Raises:
        ValueError: for a tensor of another type or shape, so that no kernel reads beyond it.

    Example:
        >>> batch.image.pixels()  # uint8 (B, H, W, 3)
    """

    blocks: Tensor  # uint8 (B, bytes): the planes Y, Cb and Cr of each image, see fastssl/beton/bc4.py
    side: int  # px
    codec: Literal["bc4"] = "bc4"

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.blocks.shape), self.blocks.dtype
        if not is_bc4_side(self.side) or shape[1:] != (bc4_bytes(self.side),) or dtype != torch.uint8:
            raise ValueError(f"Blocks of shape {shape} and type {dtype} are not images of {self.side} px in BC4.")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, rows: slice | Tensor) -> "BlockImages":
        """Some of the images."""
        return replace(self, blocks=self.blocks[rows])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the pixels: (B, H, W, 3)."""
        return len(self.blocks), self.side, self.side, 3

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def is_cuda(self) -> bool:
        return self.blocks.is_cuda

    def to(self, device: str | torch.device) -> "BlockImages":
        return replace(self, blocks=self.blocks.to(device))

    def planes(self) -> tuple[Tensor, Tensor]:
        """Decode to planes: uint8 (B, H, W, 1), luma; uint8 (B, H/2, W/2, 2), chroma Cb and Cr."""
        luma_bytes = self.side * self.side // 2
        y, cb, cr = self.blocks.split([luma_bytes, luma_bytes // 4, luma_bytes // 4], dim=1)
        return _decode_plane(y)[..., None], torch.stack([_decode_plane(cb), _decode_plane(cr)], dim=3)

    def pixels(self) -> Tensor:
        """Decode to RGB pixels, uint8 (B, H, W, 3). Chroma is interpolated between the centers of its pixels.

        Every device gives the same pixels: on a CPU they come from compiled code, in as many threads as torch may use.
        """
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return self._pixels_in_torch()
        out_BHWC = np.empty(self.shape, np.uint8)
        run_in_threads(kernels.decode_blocks, read_only(self.blocks.numpy()), out_BHWC, np.zeros(1, np.int64))
        return torch.from_numpy(out_BHWC)

    def _pixels_in_torch(self) -> Tensor:
        y_BHW1, c_BHW2 = self.planes()
        c_BHW2 = c_BHW2.int()
        for axis in (1, 2):
            c_BHW2 = _double(c_BHW2, axis)
        blue, red = (c_BHW2 - 2048).unbind(3)  # times 16, around 0
        luma = (y_BHW1[..., 0].int() << 20) + (1 << 19)
        channels = (
            luma + RED_OF_CR_Q16 * red,
            luma + GREEN_OF_CB_Q16 * blue + GREEN_OF_CR_Q16 * red,
            luma + BLUE_OF_CB_Q16 * blue,
        )
        return torch.stack([(channel >> 20).clamp(0, 255).to(torch.uint8) for channel in channels], dim=3)


def _decode_plane(blocks: Tensor) -> Tensor:
    """(B, side, side) uint8: a square plane that is stored in the blocks of uint8 (B, bytes)."""
    across = math.isqrt(blocks.shape[1] // BLOCK_BYTES)
    blocks_BNK = blocks.unflatten(1, (-1, BLOCK_BYTES)).int()
    first = blocks_BNK[..., 0:1]
    second = blocks_BNK[..., 1:2]
    of_7 = constant(_OF_7, blocks.device).int()
    of_5 = constant(_OF_5, blocks.device).int()
    of_5_levels = (of_5[:, 0] * first + of_5[:, 1] * second) // 5
    of_5_levels[..., 7] = 255
    levels_BN8 = torch.where(first > second, (of_7[:, 0] * first + of_7[:, 1] * second) // 7, of_5_levels)
    # Three bytes hold the indices of eight pixels.
    bytes_BN23 = blocks_BNK[..., 2:].unflatten(2, (2, 3))
    bits_BN2 = bytes_BN23[..., 0] | bytes_BN23[..., 1] << 8 | bytes_BN23[..., 2] << 16
    shifts = 3 * torch.arange(8, device=blocks.device, dtype=torch.int32)
    index_BNP = (bits_BN2[..., None] >> shifts & 7).flatten(2)
    values = levels_BN8.gather(2, index_BNP.long()).to(torch.uint8)
    tiles = values.view(-1, across, across, BLOCK, BLOCK)
    return tiles.transpose(2, 3).reshape(-1, BLOCK * across, BLOCK * across)


def _double(x: Tensor, axis: int) -> Tensor:
    """Twice the resolution along an axis, times 4: 3 times the pixel that a new one lies in, plus its neighbor."""
    count = x.shape[axis]
    near = torch.arange(2 * count, device=x.device) // 2
    step = 2 * (torch.arange(2 * count, device=x.device) % 2) - 1
    far = (near + step).clamp(0, count - 1)
    return 3 * x.index_select(axis, near) + x.index_select(axis, far)
