"""The legs in front of the device: decoding, crops on the CPU, the hand-over, and the loader as a whole."""

from collections.abc import Iterator

import numpy as np
import torch

from fastssl.loading import Batch, BetonLoader, kernels
from fastssl.loading.decoding import DecodeTask, PendingBatch, ThreadDecoder
from fastssl.loading.loader import PENDING_BATCHES, READY_BATCHES
from fastssl.loading.order import epoch_order
from fastssl.recipe import Recipe
from fastssl.training.setup import training_loader

AHEAD = PENDING_BATCHES + READY_BATCHES  # batches after which a loader that was just started has its usual pace
PREPARED = 512  # images that the decoding legs decode: fewer may be smaller or larger than the others


def worker_counts(workers: int, cores: int) -> list[int]:
    """1, 2, 4 and so on up to the cores, and what the run has."""
    powers = [2**n for n in range(cores.bit_length())]
    return sorted({*(count for count in powers if count <= cores), cores, workers})


def prepared_batches(loader: BetonLoader, crops: int) -> list[DecodeTask]:
    """Batches for a decoder, decoded once, so that their bytes are in memory."""
    order = loader.rows[epoch_order(loader.order, loader.seed, loader.epoch + 1, loader.samples.page_N[loader.rows])]
    own, batch = order[loader.rank * loader.batch_size :], loader.batch_size
    decoder = loader.make_decoder(crops=crops)
    prepared = []
    for number in range(max(PENDING_BATCHES, PREPARED // batch)):
        rows = own.take(number * batch * loader.world + np.arange(batch), mode="wrap")
        prepared.append(decoder.prepare(rows, 0))
        decoder.begin(prepared[-1]).wait()
    decoder.close()
    return prepared


class Decoding:
    """A leg's work: decode prepared batches again and again, two at a time under way as in the loader."""

    def __init__(self, decoder: ThreadDecoder, prepared: list[DecodeTask]):
        self.decoder, self.prepared = decoder, prepared
        self.turn = 0
        self.pending: list[PendingBatch] = []

    def __call__(self) -> int:
        work = self.prepared[self.turn % len(self.prepared)]
        self.turn += 1
        work.counter[0] = 0
        self.pending.append(self.decoder.begin(work))
        if len(self.pending) == PENDING_BATCHES:
            self.pending.pop(0).wait()
        return len(work.status_B)

    def end(self) -> None:
        """Other decoders take the same batches."""
        for decoding in self.pending:
            decoding.wait()
        self.pending.clear()

    def close(self) -> None:
        self.end()
        self.decoder.close()


class _NoDecoder(ThreadDecoder):
    def begin(self, task: DecodeTask) -> PendingBatch:
        task.status_B[:] = kernels.DECODED
        return PendingBatch(task, [])


class Undecoded(BetonLoader):
    """A loader that does everything but decode: what is left is the hand-over."""

    decoder_type = _NoDecoder


def endless(loader: BetonLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


class Loading:
    """A leg's work: take a batch from the loader and do nothing with it."""

    def __init__(self, recipe: Recipe, device: torch.device, epoch: int, kind: type[BetonLoader] = BetonLoader):
        self.loader = training_loader(recipe, device, kind=kind)
        self.loader.set_epoch(epoch)
        self.begin()

    def begin(self) -> None:
        self.batches = endless(self.loader)

    def __call__(self) -> int:
        return len(next(self.batches).index)

    def close(self) -> None:
        """Stop decoding ahead: it would go on while something else is measured."""
        self.batches.close()
