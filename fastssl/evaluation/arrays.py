"""Arrays that are numpy arrays, memory maps or tensors: conversion, reading in chunks, shuffled mini-batches.

Feature matrices (N, D) need not fit into memory. Functions that take one read it in chunks, and all rows at once only
where those fit.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor
Device: TypeAlias = torch.device | str
Advance: TypeAlias = Callable[[int], object]  # advances a progress bar by a number of steps

# Bytes of features that are read at a time: 131,072 samples of 512 float32 numbers, so all of CIFAR-10, and on a GPU
# all of ImageNet.
GROUP_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
BLOCK_ROWS = 1 << 6  # neighboring rows that are read together: a group holds some 2,000 blocks from all over the file


def as_numpy(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def as_labels(x: Array) -> np.ndarray:
    """Class numbers as an array. Raises ValueError if one is negative, which means that an image has no label."""
    labels = as_numpy(x)
    if (labels < 0).any():
        raise ValueError(f"{(labels < 0).sum():,} of {labels.size:,} labels are negative, which means no label.")
    return labels


def as_tensor(x: Array) -> Tensor:
    """A tensor as it is, an array as a copy: torch must not write to a read-only memory map."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def read_rows(features_ND: Array, rows: np.ndarray, device: Device) -> Tensor:
    """Copy some rows to the device, in their type."""
    part_RD = features_ND[rows]
    return (part_RD if isinstance(part_RD, Tensor) else torch.from_numpy(part_RD)).to(device)


def read_if_small(features_ND: Array, rows: np.ndarray, device: torch.device) -> tuple[Array, np.ndarray]:
    """The rows copied to the device, and their new numbers, if all of them may stay there; else the arguments."""
    if len(rows) * features_ND[:1].nbytes > GROUP_BYTES[device.type]:
        return features_ND, rows
    return read_rows(features_ND, rows, device), np.arange(len(rows))


def read_in_chunks(features_ND: Array, rows: np.ndarray, device: Device, classes: int = 1) -> Iterator[Tensor]:
    """Yield the rows in order, on the device and in their type, in chunks that fit into memory as float64.

    classes: number of classes; the logits of a chunk fit into memory as well.
    """
    step = max(1, GROUP_BYTES["cpu"] // (8 * max(features_ND.shape[1], classes)))
    for first in range(0, len(rows), step):
        yield read_rows(features_ND, rows[first : first + step], device)


def mean_and_std(features_ND: Array, rows: np.ndarray, device: Device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over the rows, (D,) float64.

    A feature that hardly varies (below 1e-6 of the largest deviation) has deviation 1, so standardization leaves it 0.
    """
    # Sums are taken of x - shift, where the shift is near the mean: nothing cancels in the variance.
    shift_D = read_rows(features_ND, rows[:1], device)[0].double()
    total_D, square_D = torch.zeros_like(shift_D), torch.zeros_like(shift_D)
    for part_RD in read_in_chunks(features_ND, rows, device):
        # In place, as a chunk is large. It is a copy of the caller's numbers.
        x_RD = part_RD.double().sub_(shift_D)
        total_D += x_RD.sum(dim=0)
        square_D += x_RD.square_().sum(dim=0)
    mean_D = total_D / len(rows)
    std_D = (square_D / len(rows) - mean_D.square()).clamp_min(0).sqrt()
    return mean_D + shift_D, torch.where(std_D > 1e-6 * std_D.max(), std_D, 1.0)


class ShuffledBatches:
    """Mini-batches of some rows of a feature matrix, in a new order every epoch.

    Rows that fit into one group are shuffled together and stay on the device. Otherwise blocks of neighboring rows are
    taken in random order, and the rows of each group of blocks are shuffled: so a disk reads pieces of 64 kB or more in
    ascending order, and each group is a random sample even if the file is sorted by class.
    """

    def __init__(self, features_ND: Array, rows: np.ndarray, batch_size: int, seed: int, device: Device):
        self.features_ND = features_ND
        self.rows = rows
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._rng = np.random.default_rng(seed)
        batch_bytes = features_ND[:1].nbytes * batch_size
        self.group_rows = max(1, GROUP_BYTES[self.device.type] // batch_bytes) * batch_size
        only_one = len(rows) <= self.group_rows
        self._only_group = read_rows(features_ND, np.sort(rows), self.device) if only_one else None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row numbers (B,) and float32 features (B, D) on the device, each row once."""
        order = self.rows
        if self._only_group is None:
            blocks = np.split(order, range(BLOCK_ROWS, len(order), BLOCK_ROWS))
            order = np.concatenate([blocks[b] for b in self._rng.permutation(len(blocks))])
        for first in range(0, len(order), self.group_rows):
            rows = np.sort(order[first : first + self.group_rows])
            group_RD = read_rows(self.features_ND, rows, self.device) if self._only_group is None else self._only_group
            row_R, shuffled_R = (torch.from_numpy(x).to(self.device) for x in (rows, self._rng.permutation(len(rows))))
            for position_B in shuffled_R.split(self.batch_size):
                yield row_R[position_B], group_RD[position_B].float()
            del group_RD  # before the next one is read: only one group is in memory
