"""The stages in front of the device: decoding or copying images, crops on the CPU, transfer, the loader as a whole."""

from collections.abc import Generator
from contextlib import ExitStack, closing
from itertools import cycle

import numpy as np

from fastssl.common.distributed import broadcast_from_main
from fastssl.common.terminal import count_of
from fastssl.loading import Batch, BetonLoader, kernels
from fastssl.loading.decoding import DecodeTask, PendingBatch, ThreadDecoder
from fastssl.loading.loader import PENDING_BATCHES, READY_BATCHES
from fastssl.loading.order import epoch_order
from fastssl.profiling.profile import Rate, Stages
from fastssl.profiling.timing import StageTimer, difference_result
from fastssl.profiling.wording import STAGE_NAMES
from fastssl.recipe import Recipe
from fastssl.training.setup import training_loader

AHEAD = PENDING_BATCHES + READY_BATCHES  # batches after which a loader that was just started has its usual speed
PREPARED = 512  # images that the decoding stages decode: fewer could have an unusual size
# The loader stages follow the order of this epoch. Training itself is measured in another one, so that it does not read
# what these have just read.
EPOCH = 1


class LoaderStages:
    """Timers of decode or copy_images, cpu_augment, transfer and loader for one run.

    `stack` closes the loaders and decoders.
    """

    def __init__(self, recipe: Recipe, loader: BetonLoader, seconds: float, cores: int, stack: ExitStack):
        self.loader, self.seconds, self.stack = loader, seconds, stack
        # As the run decided: what is free on the GPU is another amount now.
        resident = loader.resident
        self.whole = self._loading(training_loader(recipe, loader.device, resident=resident))
        self.transfer = self._loading(training_loader(recipe, loader.device, NoDecoder, resident))
        counts = broadcast_from_main(lambda: worker_counts(loader.workers, cores))  # other hosts may have other cores
        prepared = prepared_batches(loader, crops=0)
        self.decode = {workers: self._decoding(workers, 0, prepared) for workers in counts}
        self.with_crops = None
        if loader.crop == "cpu":
            self.with_crops = self._decoding(loader.workers, loader.crops, prepared_batches(loader, loader.crops))

    def timers(self) -> dict[str, StageTimer]:
        """Return the timers by what they time."""
        images = STAGE_NAMES["copy_images" if self.loader.only_copies else "decode"]
        timers = {f"{images}, {count_of(count, 'thread')}": timer for count, timer in self.decode.items()}
        if self.with_crops:
            timers[f"{images} and {STAGE_NAMES['cpu_augment']}"] = self.with_crops
        return timers | {STAGE_NAMES["transfer"]: self.transfer, STAGE_NAMES["loader"]: self.whole}

    def add_results(self, stages: Stages, copy_peak: float | None) -> None:
        """Fill in these stages. copy_peak: bytes per second of one large copy to the GPU, None without a GPU."""
        rates = {workers: timer.images_per_second() for workers, timer in self.decode.items()}
        best = max(rate.median for rate in rates.values())
        # On a host with fewer cores than the main process's, the run's number of workers may be missing.
        own = self.decode.get(self.loader.workers) or list(self.decode.values())[-1]
        result = own.result()
        result.workers = rates
        result.knee = min(workers for workers, rate in rates.items() if rate.median >= 0.95 * best)
        if self.loader.only_copies:
            stages.copy_images = result
            stages.decode.missing = f"The file holds {'blocks' if self.loader.samples.in_blocks else 'pixels'}."
        else:
            stages.decode = result
            stages.copy_images.missing = "The images are decoded."
        if self.with_crops:
            stages.cpu_augment = difference_result(self.with_crops, own)
        else:
            stages.cpu_augment.missing = "The crops are made on the device."
        stages.transfer = self.transfer.result()
        if copy_peak:  # on a CPU nothing is copied
            windows = self.transfer.windows
            stages.transfer.bytes_per_second = Rate.of(
                [w.images * self.loader.image_bytes / w.seconds for w in windows]
            )
            stages.transfer.peak_bytes_per_second = copy_peak
        stages.loader = self.whole.result()

    def _loading(self, loader: BetonLoader) -> StageTimer:
        loader.set_epoch(EPOCH)
        work = self.stack.enter_context(closing(Loading(loader)))
        return StageTimer(work, loader.device, self.seconds, skipped_batches=AHEAD, min_batches=AHEAD, after=work.close)

    def _decoding(self, workers: int, crops: int, prepared: list[DecodeTask]) -> StageTimer:
        decoder = self.loader.make_decoder(workers=workers, crops=crops)
        work = self.stack.enter_context(closing(Decoding(decoder, prepared)))
        return StageTimer(work, self.loader.device, self.seconds, after=work.finish_pending)


def worker_counts(workers: int, cores: int) -> list[int]:
    """Return the numbers of decoding threads to try: 1, 2, 4, ... up to the cores, and the run's own."""
    return sorted({*(2**n for n in range(cores.bit_length())), cores, workers})


def prepared_batches(loader: BetonLoader, crops: int) -> list[DecodeTask]:
    """Return batches for a decoder. They are decoded once, so that their bytes are in memory."""
    order = epoch_order(loader.order, loader.seed, loader.epoch + 1, loader.samples, loader.rows)
    batch = loader.batch_size
    decoder = loader.make_decoder(crops=crops)
    prepared = []
    for number in range(max(PENDING_BATCHES, PREPARED // batch)):
        position_B = (number * loader.world + loader.rank) * batch + np.arange(batch)
        prepared.append(decoder.prepare(loader.rows[order[position_B % len(order)]], 0))
        decoder.begin(prepared[-1]).wait()
    decoder.close()
    return prepared


class Decoding:
    """Decodes prepared batches again and again, two in parallel as in the loader."""

    def __init__(self, decoder: ThreadDecoder, prepared: list[DecodeTask]):
        self.decoder, self.tasks = decoder, cycle(prepared)
        self.pending: list[PendingBatch] = []

    def __call__(self) -> int:
        task = next(self.tasks)
        task.arrays.counter[0] = 0
        self.pending.append(self.decoder.begin(task))
        if len(self.pending) == PENDING_BATCHES:
            self.pending.pop(0).wait()
        return len(task.image)

    def finish_pending(self) -> None:
        """Finish what is pending, as other decoders take the same batches."""
        for batch in self.pending:
            batch.wait()
        self.pending.clear()

    def close(self) -> None:
        self.finish_pending()
        self.decoder.close()


class NoDecoder(ThreadDecoder):
    """Lets a loader do everything but decode: order, crop boxes, batches, queue, and on a GPU the copy."""

    def begin(self, task: DecodeTask) -> PendingBatch:
        task.arrays.status_B[:] = kernels.DECODED
        return PendingBatch(task, [])


class Loading:
    """Takes batches from a loader and does nothing with them."""

    def __init__(self, loader: BetonLoader):
        self.loader, self.batches = loader, endless(loader)

    def __call__(self) -> int:
        return len(next(self.batches).index)

    def close(self) -> None:
        """Stop decoding ahead, which would go on while another stage is measured, until the next call."""
        self.batches.close()
        self.batches = endless(self.loader)


def endless(loader: BetonLoader) -> Generator[Batch, None, None]:
    """Yield the batches of epoch after epoch."""
    while True:
        yield from loader
