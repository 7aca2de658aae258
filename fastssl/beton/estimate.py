"""Estimate what a build would write, and how long it would take, from some of the images (`build-beton --dry-run`)."""

import contextlib
import dataclasses
import shutil
import time
from pathlib import Path
from typing import NamedTuple, get_args

from fastssl.beton.build import refuse_held_out_images, refuse_output_in_source
from fastssl.beton.format import ALLOCATION, allocate, data_start
from fastssl.beton.images import Codec, StoragePlan, is_much_enlarged
from fastssl.beton.listing import splits_of
from fastssl.beton.options import BuildOptions
from fastssl.beton.pool import Pool, plain_image, worker_pool
from fastssl.beton.shards import Shard, check_shards, set_path, shard_path
from fastssl.beton.source import SourceSplit, load_builder
from fastssl.common.errors import UserError
from fastssl.common.system import free_memory, resolve_workers
from fastssl.common.terminal import console, count_of, print_line

SAMPLED = 512  # images of each split that are encoded for an estimate
SAMPLED_PER_TASK = 4  # few, so that all workers finish at nearly the same time


class SplitEstimate(NamedTuple):
    """The expected result of building one split."""

    split: str
    path: Path
    images: int
    classes: list[str]  # their names
    stored: str  # as what, for users
    bytes: int
    bad: float  # share of the sampled images that cannot be read
    enlarged: float  # share of the others whose sides are less than half of the canvas's
    seconds: float


class BuildEstimate(NamedTuple):
    splits: list[SplitEstimate]
    others: list[list[SplitEstimate]]  # the same splits with each of the other codecs that --codec may name
    free_disk: int  # bytes, where the files would be
    free_memory: int  # bytes, for the page cache


def estimate_build(
    builder: str, source: Path | None, out: Path, options: BuildOptions, images: int | None = None
) -> BuildEstimate:
    """Estimate what `build_beton` would write with these options, and how long it would take. Writes nothing.

    images: estimate for this many images in all, of which those of the source are a sample; None: for those alone.
    """
    refuse_output_in_source(source, out)
    canvas = load_builder(builder).CANVAS
    plan = options.plan(canvas)
    others = _other_plans(options, canvas)
    splits = splits_of(builder, source, options)
    refuse_held_out_images(out, [split.name for split in splits])
    if images is None:  # a sample may have fewer images than shards
        for split in splits:
            check_shards(split.name, len(split.order), out, options.shards)
    factor = 1.0 if images is None else images / sum(len(split.order) for split in splits)
    if options.shards is not None and options.shard is not None:
        shard = Shard(options.shard, options.shards)
        splits = [split._replace(order=split.order[shard.bounds(len(split.order))]) for split in splits]
    sampled = sum(min(SAMPLED, len(split.order)) for split in splits)
    print_line(
        console(stderr=True),
        f"Encoding {count_of(sampled, 'image')} as a sample. The first time after an installation, the processes "
        "compile for about a minute.",
    )
    with worker_pool(resolve_workers(options.workers)) as pool:
        _warm_up(pool, plan)
        estimates = [_estimate_split(split, out, plan, pool, options, factor) for split in splits]
        # Now the files are in the page cache, so other codecs are compared with the chosen one once more.
        again = [_estimate_split(split, out, plan, pool, options, factor) for split in splits] if others else []
        of_others = []
        for other in others:
            with contextlib.suppress(UserError):  # it does not work on this machine, and is not what was asked for
                _warm_up(pool, other)
                compared = [_estimate_split(split, out, other, pool, options, factor) for split in splits]
                of_others.append(
                    [
                        estimate._replace(seconds=max(0.0, first.seconds + estimate.seconds - second.seconds))
                        for estimate, first, second in zip(compared, estimates, again, strict=True)
                    ]
                )
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return BuildEstimate(estimates, of_others, shutil.disk_usage(folder).free, free_memory())


def _warm_up(pool: Pool, plan: StoragePlan) -> None:
    """Wait until the workers have started and have compiled what they need, so that this does not count."""
    for _ in pool.encode([plain_image(plan.channels)] * (2 * pool.workers), plan, 1):
        pass


def _other_plans(options: BuildOptions, canvas: int) -> list[StoragePlan]:
    """Return the plans that another --codec would give."""
    chosen = options.plan(canvas).storage
    plans = []
    for codec in get_args(Codec):
        with contextlib.suppress(UserError):  # not for this size, layout or number of channels
            plans.append(dataclasses.replace(options, codec=codec, quality=None).plan(canvas))
    return [plan for plan in plans if plan.storage != chosen and plan.layout == "canvas"]


def _estimate_split(
    split: SourceSplit, out: Path, plan: StoragePlan, pool: Pool, options: BuildOptions, factor: float
) -> SplitEstimate:
    """Estimate a split of `factor` times as many images as it has."""
    start = time.monotonic()
    images = round(len(split.order) * factor)
    # Every n-th image, because with order "source" the first ones are not a fair sample.
    step = max(1, len(split.order) // SAMPLED)
    sampled = (split.samples[index].image for index in split.order[::step][:SAMPLED])
    sizes = []
    bad = enlarged = 0
    for result in pool.encode(sampled, plan, SAMPLED_PER_TASK):
        if isinstance(result, str):
            bad += 1
        else:
            sizes.append(len(result.payload))
            enlarged += bool(is_much_enlarged(result.source_width, result.source_height, result.width))
    seconds = time.monotonic() - start
    of_images = images / (len(sizes) + bad)
    _, end = allocate(sizes, 0)  # with what is left empty at the ends of pages
    # The allocation table comes after the images, all other tables before them: in each shard.
    files = 1 if options.shards is None or options.shard is not None else options.shards
    size = files * data_start(-(-images // files)) + round(end * of_images) + ALLOCATION.itemsize * images
    path = out / f"{split.name}.beton"
    if options.shards is not None:
        only = None if options.shard is None else Shard(options.shard, options.shards)
        path = shard_path(out, split.name, only) if only else set_path(out, split.name, options.shards)
    return SplitEstimate(
        split.name,
        path,
        images,
        split.classes,
        plan.described,
        size,
        bad / (len(sizes) + bad),
        enlarged / max(1, len(sizes)),
        seconds * of_images,
    )
