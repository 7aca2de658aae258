"""One copy of a data set on a device, for all runs there.

A keeper is a process beside the runs of one GPU (or of the CPU). A run asks it for its images; the first to ask has
them loaded, and everyone gets a view of the same memory: by CUDA's inter-process handles on a GPU, by shared memory on
a CPU.
"""

import shutil
import signal
from multiprocessing.connection import Connection, wait

import torch

from fastssl.common.errors import UserError
from fastssl.loading import Batch
from fastssl.recipe import Recipe
from fastssl.training.setup import choose_device, training_loader

SHARED_MEMORY = "/dev/shm"


def keep(commands: Connection) -> None:
    """Answer the runs whose connections come through `commands`, until the sweep and all of them are gone.

    The memory must outlive the runs that read it, so a keeper does not end with the sweep, but with the last run.
    """
    # A group of processes may get these together.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept: dict[tuple, Batch] = {}
    readers: dict[Connection, tuple] = {}  # the set that each run reads
    sources: list[Connection] = [commands]
    while sources:
        for source in wait(sources):
            try:
                message = source.recv()
                if source is commands:
                    sources.append(message)
                else:
                    readers[source] = key = key_of(message)
                    for unread in kept.keys() - readers.values():  # room for the next one
                        del kept[unread]
                    source.send(images_for(message, key, kept))
            except (EOFError, OSError):  # whoever held the other end is gone
                sources.remove(source)
                readers.pop(source, None)


def key_of(recipe: Recipe) -> tuple:
    """What runs with the same images have in common."""
    return recipe.data.train, recipe.data.subset, recipe.data.limit, recipe.train.device


def images_for(recipe: Recipe, key: tuple, kept: dict[tuple, Batch]) -> Batch | UserError | None:
    """The images of a run, loaded once for all that have the same; None where shared memory is too small for them."""
    if key not in kept:
        device = choose_device(recipe.train.device)
        try:
            loader = training_loader(recipe, device)
            if device.type == "cpu" and loader.path.stat().st_size > shutil.disk_usage(SHARED_MEMORY).free:
                return None
            kept[key] = loader.whole_file()
        except UserError as error:
            return error
        for column in kept[key]:
            column.share_memory_()  # nothing to do on a GPU
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return kept[key]
