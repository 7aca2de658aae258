"""Estimate the size and duration of a build from a few hundred images of each split: `build-beton --dry-run`."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from fastssl.beton.build import BuildOptions
from fastssl.beton.format import ALLOCATION, data_start
from fastssl.beton.images import StoragePlan, encode_all
from fastssl.beton.pool import Pool, in_chunks, worker_pool
from fastssl.beton.source import SourceSplit, list_splits, load_builder
from fastssl.common.system import free_memory, resolve_workers

SAMPLED = 512  # images of each split that are encoded
SAMPLED_PER_TASK = 4  # few, so that all workers finish at nearly the same time


class SplitEstimate(NamedTuple):
    """The expected result of building one split."""

    split: str
    path: Path
    images: int
    classes: int
    bytes: int
    bad: float  # share of the sampled images that cannot be read
    seconds: float


class BuildEstimate(NamedTuple):
    splits: list[SplitEstimate]
    free_disk: int  # bytes, where the files would be
    free_memory: int  # bytes, for the page cache


def estimate_build(builder: str, source: Path | None, out: Path, options: BuildOptions) -> BuildEstimate:
    """Estimate what `build_beton` would write with these options, and how long it would take. Writes nothing."""
    plan = options.plan(load_builder(builder).CANVAS)
    splits = list_splits(builder, source, options.order, options.limit)
    with worker_pool(resolve_workers(options.workers)) as pool:
        # Wait until the workers have started, so that their start does not count.
        for _ in pool.in_order(os.getpid, [()] * pool.workers):
            pass
        estimates = [_estimate_split(split, out, plan, pool) for split in splits]
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return BuildEstimate(estimates, shutil.disk_usage(folder).free, free_memory())


def _estimate_split(split: SourceSplit, out: Path, plan: StoragePlan, pool: Pool) -> SplitEstimate:
    start = time.monotonic()
    images = len(split.order)
    # Every n-th image, because with order "source" the first ones are not a fair sample.
    step = max(1, images // SAMPLED)
    sampled = (split.samples[index].image for index in split.order[::step][:SAMPLED])
    tasks = ((chunk, plan) for chunk in in_chunks(sampled, SAMPLED_PER_TASK))
    results = [result for chunk in pool.in_order(encode_all, tasks) for result in chunk]
    seconds = time.monotonic() - start
    good = [result for result in results if not isinstance(result, str)]
    bytes_per_image = sum(len(result.payload) for result in good) / len(results)
    return SplitEstimate(
        split=split.name,
        path=out / f"{split.name}.beton",
        images=images,
        classes=len(split.classes),
        # The allocation table comes after the images, all other tables before them.
        bytes=data_start(images) + round((bytes_per_image + ALLOCATION.itemsize) * images),
        bad=1 - len(good) / len(results),
        seconds=seconds * images / len(results),
    )
