"""Batches of a feature matrix that need not fit into memory: a map of a file is read in large parts."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# Read at a time: 131,072 samples of 512 float32 numbers, so all of CIFAR-10's at once. On a GPU all of ImageNet's.
GROUP_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
BLOCK_ROWS = 1 << 6  # read in one piece from a file: a group has some 2,000 of them, from everywhere in the file


class Batches:
    """Mini-batches of some rows of features (N, D), in a new order every epoch, as float32 on the device.

    Rows that fit into one group are shuffled as a whole, and stay on the device. Of more, blocks of neighbouring rows
    come in random order and are shuffled within their group: a disk reads pieces of 64 kB and more, in order, and each
    group is a fair sample even where a file is sorted by class.
    """

    def __init__(
        self, features_ND: ArrayLike | Tensor, rows: np.ndarray, batch_size: int, seed: int, device: torch.device | str
    ):
        self.features_ND, self.rows, self.batch_size = features_ND, rows, batch_size
        self.device = torch.device(device)
        self._rng = np.random.default_rng(seed)
        row_bytes = features_ND[:1].nbytes
        whole_batches = GROUP_BYTES[self.device.type] // (row_bytes * batch_size)
        self.group_rows = max(1, whole_batches) * batch_size
        self._group: Tensor | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every row once: which rows (B,), and their features (B, D), on the device; no copy to it for each batch."""
        order = self._block_order()
        for first in range(0, len(order), self.group_rows):
            rows = np.sort(order[first : first + self.group_rows])
            group_RD = self._read(rows)  # the one before it is gone by now: one group at a time is in memory
            row_R, shuffled_R = (torch.from_numpy(x).to(self.device) for x in (rows, self._rng.permutation(len(rows))))
            for place_B in shuffled_R.split(self.batch_size):
                yield row_R[place_B], group_RD[place_B].float()
            del group_RD

    def _block_order(self) -> np.ndarray:
        if len(self.rows) <= self.group_rows:
            return self.rows
        blocks = [self.rows[first : first + BLOCK_ROWS] for first in range(0, len(self.rows), BLOCK_ROWS)]
        return np.concatenate([blocks[b] for b in self._rng.permutation(len(blocks))])

    def _read(self, rows: np.ndarray) -> Tensor:
        if self._group is not None:
            return self._group
        group_RD = take(self.features_ND, rows, self.device)
        if len(rows) == len(self.rows):
            self._group = group_RD
        return group_RD


def fits(features_ND: ArrayLike | Tensor, rows: np.ndarray, device: torch.device) -> bool:
    """Whether the rows may stay on the device, as they are stored."""
    return len(rows) * features_ND[:1].nbytes <= GROUP_BYTES[device.type]


def in_order(
    features_ND: ArrayLike | Tensor, rows: np.ndarray, device: torch.device | str, classes: int = 1
) -> Iterator[Tensor]:
    """The rows' features in order, as they are stored, on the device, in parts that fit into memory in float64, as do
    their logits for so many classes."""
    step = max(1, GROUP_BYTES["cpu"] // (8 * max(features_ND.shape[1], classes)))
    for first in range(0, len(rows), step):
        yield take(features_ND, rows[first : first + step], device)


def mean_and_std(
    features_ND: ArrayLike | Tensor, rows: np.ndarray, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """(D,) each, float64, over the rows; a feature that hardly varies has deviation 1, so that it stays at zero."""
    total_D = square_D = 0.0
    shift_D = next(in_order(features_ND, rows[:1], device))[0].double()  # near the mean: nothing cancels below
    for part_RD in in_order(features_ND, rows, device):
        x_RD = part_RD.double().sub_(shift_D)  # in place, here and below: a part is large
        total_D, square_D = total_D + x_RD.sum(dim=0), square_D + x_RD.square_().sum(dim=0)
    mean_D = total_D / len(rows)
    std_D = (square_D / len(rows) - mean_D.square()).clamp_min(0).sqrt()
    return mean_D + shift_D, torch.where(std_D > 1e-6 * std_D.max(), std_D, 1.0)


def take(features_ND: ArrayLike | Tensor, rows: np.ndarray, device: torch.device | str) -> Tensor:
    """Some rows on the device. Indexing has copied them: the result is no map of a file."""
    part_RD = features_ND[rows]
    return (part_RD if isinstance(part_RD, Tensor) else torch.from_numpy(part_RD)).to(device)
