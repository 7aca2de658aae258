"""The lines of benchmarks/loading.py that run in fastssl's own Python: fastssl, stock FFCV and memcpy."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loading_shared import CANVAS, MEAN, SIZE, STD, Views

BETONS = {
    "originals": "full/train.beton",
    "canvas": "canvas/train.beton",
    "blocks": "blocks/train.beton",
    "raw": "raw.beton",
}


def fastssl_batches(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """BetonLoader, and PairedViews for the jobs "floats" and "whole". With a GPU, batches and views are made there."""
    import torch

    from fastssl.loading import BetonLoader
    from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
    from fastssl.views import PairedViews

    torch.set_num_threads(workers)
    plain = {"jitter": JitterConfig(p=0), "gray": 0, "first": PerViewConfig(), "second": PerViewConfig()}
    colored = {"first": PerViewConfig(blur=1.0), "second": PerViewConfig(blur=0.1, solarize=0.2)}
    recipe = ViewsConfig(size=CANVAS if job == "decode" else SIZE, **(colored if job == "whole" else plain))
    of_originals = "eval" if job == "decode" else "cpu"
    crop = of_originals if source == "originals" else "cpu" if job == "crops" else "gpu"
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    loader = BetonLoader(folder / BETONS[source], batch, crop=crop, views=recipe, workers=workers, device=device)
    views = PairedViews(recipe, compiled=on_gpu)
    while True:
        for got in loader:
            if job == "bytes":
                yield [got.image.blocks]
            elif job in ("floats", "whole"):
                epoch = torch.full((), loader.epoch, device=device)
                yield list(views(got.image, got.index, epoch, got.height, got.width))
            elif crop == "gpu":
                yield [got.pixels()]
            else:
                yield list(got.image.unbind(1))
            if on_gpu:
                torch.cuda.synchronize()


def ffcv_batches(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """Stock FFCV on the same files.

    Two views need a pipeline for each, which decodes again: one is timed, and its rate halved (`share` of the line),
    which leaves out what two cost in parallel. Without a crop it decodes images of one size only.
    """
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    from fastssl.beton import read_header

    crop = [decoders.RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip()]
    mean, std = (255 * np.array(values) for values in (MEAN, STD))
    image = {
        "bytes": [decoders.NDArrayDecoder(), ToTensor()],
        "decode": [decoders.SimpleRGBImageDecoder(), ToTensor()],
        "crops": [*crop, ToTensor()],
        "floats": [*crop, NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()],
    }[job]
    path = folder / BETONS[source]
    pipelines = dict.fromkeys(read_header(path).fields)
    pipelines["image"] = image
    loader = Loader(
        str(path), batch, num_workers=workers, order=OrderOption.RANDOM, drop_last=True, pipelines=pipelines
    )
    while True:
        for (images,) in loader:
            yield [images]


def memcpy_batches(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """Copy the stored bytes of random rows by the C library, without anything else: a bound."""
    import numba
    from numba import types

    from fastssl.beton import read_samples

    path = folder / BETONS[source]
    metadata, size = read_samples(path)
    file, start = np.memmap(path, np.uint8, mode="r"), np.ascontiguousarray(metadata["image"]["data_ptr"])
    memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uint64))

    @numba.njit(nogil=True)
    def copy(target, source, start_B, size):
        for b in range(len(start_B)):
            memcpy(target + b * size, source + start_B[b], size)

    buffers = itertools.cycle([np.empty((batch, int(size[0])), np.uint8) for _ in range(4)])
    share = -(-batch // workers)
    with ThreadPoolExecutor(workers) as pool:
        for epoch in itertools.count():
            order = np.random.default_rng(epoch).permutation(len(start))
            for first in range(0, len(order) - batch + 1, batch):
                start_B, out = start[order[first : first + batch]], next(buffers)
                parts = [
                    pool.submit(copy, out[b:].ctypes.data, file.ctypes.data, start_B[b : b + share], size[0])
                    for b in range(0, batch, share)
                ]
                for part in parts:
                    part.result()
                yield [out]
