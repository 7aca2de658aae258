"""What a build would give, from encoding a few hundred images of each split: --dry-run."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Literal, NamedTuple

from fastssl.beton.build import Split, list_splits, plan_storage
from fastssl.beton.builders import load_builder
from fastssl.beton.format import ALLOCATION
from fastssl.beton.images import Plan, encode_all
from fastssl.beton.pool import Pool, in_chunks, worker_pool
from fastssl.beton.write import data_start
from fastssl.common.system import free_memory, resolve_workers

SAMPLED = 512  # images of each split that are encoded
SAMPLED_AT_ONCE = 4  # so that many workers end at nearly the same time


class SplitEstimate(NamedTuple):
    """What building one split would give. `bad` is the share of images that cannot be read."""

    split: str
    path: Path
    images: int
    classes: int
    bytes: int
    bad: float
    seconds: float


class BuildEstimate(NamedTuple):
    """`free_disk` where the files would go and `free_memory` for the page cache, in bytes."""

    splits: list[SplitEstimate]
    free_disk: int
    free_memory: int


def estimate_build(
    builder: str,
    source: Path | None,
    out: Path,
    *,
    canvas: int | None = None,
    max_side: int | None = None,
    quality: int = 90,
    order: Literal["shuffle", "source"] = "shuffle",
    workers: int | None = None,
    limit: int | None = None,
) -> BuildEstimate:
    """What `build_beton` with these options would write, and how long it would take."""
    module = load_builder(builder)
    plan = plan_storage(module.CANVAS, canvas, max_side, quality)
    splits = list_splits(module, builder, source, order, limit)
    with worker_pool(resolve_workers(workers)) as pool:
        for _ in pool.in_order(os.getpid, [()] * pool.workers):
            pass  # the workers have started: their start is not part of the rate
        forecasts = [_forecast(split, out, plan, pool) for split in splits]
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return BuildEstimate(forecasts, shutil.disk_usage(there).free, free_memory())


def _forecast(split: Split, out: Path, plan: Plan, pool: Pool) -> SplitEstimate:
    start, images = time.monotonic(), len(split.order)
    # The written order is a shuffle unless asked otherwise; here the images must be a fair sample.
    step = max(1, images // SAMPLED)
    sampled = (split.samples[index].image for index in split.order[::step][:SAMPLED])
    chunks = in_chunks(sampled, SAMPLED_AT_ONCE)
    results = [result for chunk in pool.in_order(encode_all, ((c, plan) for c in chunks)) for result in chunk]
    seconds = time.monotonic() - start
    good = [result for result in results if not isinstance(result, str)]
    bytes_an_image = sum(len(result.payload) for result in good) / len(results)
    bytes_a_row = ALLOCATION.itemsize  # behind the images; the other tables are in front of them
    return SplitEstimate(
        split.name,
        out / f"{split.name}.beton",
        images,
        len(split.classes),
        data_start(images) + round((bytes_an_image + bytes_a_row) * images),
        1 - len(good) / len(results),
        seconds * images / len(results),
    )
