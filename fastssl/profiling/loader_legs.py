"""The legs in front of the device: decoding, crops on the CPU, the hand-over, and the loader as a whole."""

from collections.abc import Iterator

import numpy as np
import torch

from fastssl.loading import Batch, BetonLoader, kernels
from fastssl.loading.decoding import ThreadDecoder, UnderWay, Work
from fastssl.loading.loader import READY, UNDER_WAY
from fastssl.loading.order import epoch_order
from fastssl.recipe import Recipe
from fastssl.training.setup import training_loader

AHEAD = UNDER_WAY + READY  # batches after which a loader that was just started has its usual pace
PREPARED = 4  # batches that the decoding legs decode again and again: their bytes are in memory


def worker_counts(workers: int, cores: int) -> list[int]:
    """1, 2, 4 and so on up to the cores, and what the run has."""
    powers = [2**n for n in range(cores.bit_length())]
    return sorted({*(count for count in powers if count <= cores), cores, workers})


class Decoding:
    """A leg's work: decode prepared batches, two at a time under way as in the loader."""

    def __init__(self, loader: BetonLoader, workers: int, crops: int):
        self.decoder = ThreadDecoder(
            loader.samples, loader.crop, loader.views, loader.seed, workers, loader._buffers, crops
        )
        order = loader.rows[epoch_order(loader.order, loader.seed, 0, loader.samples.page_N[loader.rows])]
        own = order[loader.rank * loader.batch_size :]
        self.prepared = [
            self.decoder.prepare(own.take(first + np.arange(loader.batch_size), mode="wrap"), 0)
            for first in range(0, PREPARED * loader.batch_size * loader.world, loader.batch_size * loader.world)
        ]
        self.turn = 0
        self.under_way: list[UnderWay] = []

    def __call__(self) -> int:
        work: Work = self.prepared[self.turn % PREPARED]
        self.turn += 1
        work.counter[0] = 0
        self.under_way.append(self.decoder.begin(work))
        if len(self.under_way) == UNDER_WAY:
            self.decoder.finish(self.under_way.pop(0))
        return len(work.status_B)

    def close(self) -> None:
        for decoding in self.under_way:
            self.decoder.finish(decoding)
        self.decoder.close()


class Undecoded(BetonLoader):
    """A loader that does everything but decode: what is left is the hand-over."""

    def _decoder(self) -> ThreadDecoder:
        arguments = self.samples, self.crop, self.views, self.seed, self.workers, self._buffers, self.crops
        return _NoDecoder(*arguments)


class _NoDecoder(ThreadDecoder):
    def begin(self, work: Work) -> UnderWay:
        work.status_B[:] = kernels.DECODED
        return UnderWay(work, [])


def endless(loader: BetonLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


class Loading:
    """A leg's work: take a batch from the loader and do nothing with it."""

    def __init__(self, recipe: Recipe, device: torch.device, kind: type[BetonLoader] = BetonLoader):
        self.loader = training_loader(recipe, device, kind=kind)
        self.batches = endless(self.loader)

    def begin(self) -> None:
        """Go on without what was decoded while nobody asked."""
        self.batches.close()
        self.batches = endless(self.loader)

    def __call__(self) -> int:
        return len(next(self.batches).index)

    def close(self) -> None:
        self.batches.close()
