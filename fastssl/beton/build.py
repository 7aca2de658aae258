"""Build .beton files: a builder lists the images, worker processes encode and write them.

To follow an image: build_beton, FileBuild in file_build.py, Pool.write_encoded in pool.py, encode_image in images.py.

FFCV's own DatasetWriter is not used: it waits forever when a worker meets a bad image, and can neither skip one, nor
store a JPEG's bytes as they are, nor resume after it was stopped.

The same source and options give the same bytes, whatever the number of workers and however often the build was stopped.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.beton.accounting import account_for_files
from fastssl.beton.file_build import MOST_BLACK_NAMED, FileBuild, SplitReport
from fastssl.beton.format import RGB
from fastssl.beton.images import MAX_MEGAPIXELS, Codec, StoragePlan
from fastssl.beton.listing import ListedSplit, Listing, list_source
from fastssl.beton.options import BuildOptions
from fastssl.beton.pool import Pool, worker_pool
from fastssl.beton.ranges import Range
from fastssl.beton.shards import Shard, check_shards, set_manifest_path, set_path, shard_path
from fastssl.beton.source import Order, SourceSplit, SplitRule, download_dataset, load_builder
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors
from fastssl.common.system import resolve_workers

MOST_BAD = 10  # bad images of a split that are no problem, however small the split is


@dataclass(frozen=True)
class BuildReport:
    """The result of a build."""

    splits: list["SplitReport"]
    problem: str | None  # a sentence about splits with too many bad images
    account: str  # a sentence that accounts for every file of the source, and for every image


def build_beton(
    builder: str,
    source: Path | None,
    out: Path,
    *,
    canvas: int | None = None,
    max_side: int | None = None,
    codec: Codec | None = None,
    quality: int | None = None,
    order: Order = "shuffle",
    workers: int | None = None,
    limit: int | None = None,
    strict: bool = False,
    allow_bad: float | None = None,
    download: bool = False,
    value_range: Range = "full",
    max_megapixels: int = MAX_MEGAPIXELS,
    splits: SplitRule = "auto",
    channels: int = RGB,
    shards: int | None = None,
    shard: int | None = None,
    hold_out: float | None = None,
) -> BuildReport:
    """Build OUT/SPLIT.beton, with its manifest and its list of names, for every split that the builder finds.

    With `shards`, each split becomes OUT/SPLIT-00000-of-00064.beton and so on. Each shard is a build of its own, and
    several processes or machines may build different ones at the same time.

    Bad images are skipped and listed in OUT/bad_images.jsonl. A build that was stopped resumes. A split that is up to
    date is not built again.

    Args:
        builder: name of a module of beton_builders.
        source: folder or archive with the images; None for a builder that brings its own.
        out: folder for the files.
        workers: number of processes; None: all cores.
        download: download the data set to `source` first.

    The other arguments are those of `fastssl build-beton`.

    Raises:
        UserError: an option or the source is wrong, `out` cannot be written or holds a .beton that is not of
            build-beton, or, with `strict`, an image is bad.

    Example:
        build_beton("imagefolder", Path("photos"), Path("data/photos"), max_side=500)
    """
    options = BuildOptions(
        canvas,
        max_side,
        codec,
        quality,
        order,
        workers,
        limit,
        strict,
        allow_bad,
        download,
        value_range,
        max_megapixels,
        splits,
        channels,
        shards,
        shard,
        hold_out,
    )
    return run_build(builder, source, out, options)


def run_build(builder: str, source: Path | None, out: Path, options: BuildOptions) -> BuildReport:
    """Do as `build_beton` does."""
    check_build(builder, source, out, options)
    with explain_write_errors(out):
        listing = list_images(builder, source, out, options, by_list=options.shard is not None)
        files = files_to_build(builder, source, out, options, listing)
        return build_files(builder, source, options, listing, files)


def check_build(builder: str, source: Path | None, out: Path, options: BuildOptions) -> None:
    """Refuse what cannot be built before any work starts, and download the source if asked to."""
    options.plan(load_builder(builder).CANVAS)
    refuse_output_in_source(source, out)
    if options.download:
        download_dataset(builder, source)


def list_images(builder: str, source: Path | None, out: Path, options: BuildOptions, by_list: bool) -> Listing:
    """Return the images to build: all, or with `options.shard` those of this shard.

    by_list: whether a list in OUT is used, which processes share, each of which builds a shard.
    """
    if options.shards is None:
        listing = list_source(builder, source, options)
    else:
        # Not at the start: it imports pydantic, and every worker process imports this module.
        from fastssl.beton.shared_list import make_list, read_or_make_list

        listing = (read_or_make_list if by_list else make_list)(builder, source, out, options)
    for each in listing.splits:
        check_shards(each.split.name, each.images, out, options.shards)
    return listing


def build_files(
    builder: str, source: Path | None, options: BuildOptions, listing: Listing, files: list[list[FileBuild]]
) -> BuildReport:
    """Build the files of each split that are not up to date, and report on all."""
    files[0][0].path.parent.mkdir(parents=True, exist_ok=True)
    with worker_pool(resolve_workers(options.workers)) as pool:
        reports = [_build_split(each, pool) for each in files]
    stored, bad = sum(report.samples for report in reports), sum(report.bad for report in reports)
    account = account_for_files(
        builder,
        source,
        [each.split for each in listing.splits],
        stored,
        bad,
        arrays=options.channels != RGB,
        in_other_shards=0 if options.shard is None else sum(each.images for each in listing.splits) - stored - bad,
        files=listing.files,
    )
    return BuildReport(reports, _too_many_bad(reports, options.allow_bad), account)


def refuse_output_in_source(source: Path | None, out: Path) -> None:
    # realpath, because Path.resolve raises an error for a link to itself.
    if source is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise UserError(
            f"--out {out} is in --source {source}, where a later build would take it for a part of the data set",
            hint="choose a folder outside of it",
        )


def _too_many_bad(reports: list[SplitReport], allow_bad: float | None) -> str | None:
    """Return a sentence about the first split with more bad images than allowed; None if there is none."""
    for report in reports:
        images = report.samples + report.bad
        allowed = max(MOST_BAD, images / 100) if allow_bad is None else images * allow_bad / 100
        if report.bad > allowed:
            return (
                f"{report.bad:,} of the {images:,} images of the split {report.split!r} are bad, "
                f"{report.bad / images:.1%}: see {report.bad_images} and repair them, or allow that with "
                f"--allow-bad {np.ceil(100 * report.bad / images):.0f}%."
            )
    return None


def files_to_build(
    builder: str, source: Path | None, out: Path, options: BuildOptions, listing: Listing
) -> list[list[FileBuild]]:
    """Return the files of each split: one, or its shards, of which one may be asked for."""
    plan = options.plan(load_builder(builder).CANVAS)
    recorded = options.recorded(builder, source, plan)
    refuse_held_out_images(out, [each.split.name for each in listing.splits])
    return [_files_of_split(each, out, plan, options, recorded) for each in listing.splits]


def refuse_held_out_images(out: Path, splits: list[str]) -> None:
    """Raise UserError if a build with --hold-out has left its val in `out`, and this one puts those images in train."""
    from fastssl.beton.manifest import MOST_COUNTED, read_manifest

    if "train" not in splits or "val" in splits:
        return
    for path in [*out.glob("val.beton"), *out.glob("val-*-of-*.beton")]:
        try:
            held_out = read_manifest(path, MOST_COUNTED).get("hold_out")
        except (OSError, ValueError):  # not of build-beton, which then says so
            continue
        if held_out is not None:
            files = "its files, val*" if path.name != "val.beton" else "it"
            raise UserError(
                f"{path} holds images that --hold-out {held_out:g}% has taken, and they would be in train too",
                hint=f"delete {files}, or use another --out",
            )


def _files_of_split(
    listed: ListedSplit, out: Path, plan: StoragePlan, options: BuildOptions, recorded: dict[str, Any]
) -> list[FileBuild]:
    split, shards = listed.split, options.shards
    key = {**recorded, "sample_list_sha256": listed.sha256, "classes": split.classes}
    if shards is None:
        return [FileBuild(out / f"{split.name}.beton", split, None, plan, key, options.strict)]
    files = []
    for number in range(shards) if options.shard is None else [options.shard]:
        shard = Shard(number, shards)
        # With --shard only the images of this shard are listed.
        order = split.order[shard.bounds(listed.images)] if options.shard is None else split.order
        path, of_shard = shard_path(out, split.name, shard), split._replace(order=order)
        of_key = {**key, "shard": number, "spot_check": listed.spot_check}
        if options.limit is not None:
            of_key["listed"] = len(split.samples)  # a shard has no names of the images that were left out
        files.append(FileBuild(path, of_shard, shard, plan, of_key, options.strict))
    return files


def _build_split(files: list[FileBuild], pool: Pool) -> SplitReport:
    """Build the files of one split, and complete the set if they are shards."""
    reports = [file.run(pool) for file in files]
    shard = files[0].shard
    if shard is None:
        return reports[0]
    out, split = files[0].path.parent, files[0].split
    _complete_set(out, split.name, shard.shards, reports)
    return reports[0] if len(files) < shard.shards else _report_set(split, out, shard.shards, reports)


def _complete_set(out: Path, split: str, shards: int, reports: list[SplitReport]) -> None:
    """Write the manifest of the set unless it is there and true, and if all shards are there.

    A process that has found one shard up to date does not read the manifests of all others, which may be gigabytes.
    """
    from fastssl.beton.set_manifest import write_set_manifest

    is_there = set_manifest_path(set_path(out, split, shards)).exists()
    if not is_there or len(reports) == shards or not all(report.up_to_date for report in reports):
        write_set_manifest(out, split, shards)


def _report_set(split: SourceSplit, out: Path, shards: int, reports: list[SplitReport]) -> SplitReport:
    return SplitReport(
        split.name,
        set_path(out, split.name, shards),
        samples=sum(report.samples for report in reports),
        classes=split.classes,
        bytes=sum(report.bytes for report in reports),
        bad=sum(report.bad for report in reports),
        bad_images=out / f"bad_images-*-of-{shards:05}.jsonl",
        unlabelled=sum(report.unlabelled for report in reports),
        nearly_black=sum(report.nearly_black for report in reports),
        nearly_black_names=[name for report in reports for name in report.nearly_black_names][:MOST_BLACK_NAMED],
        enlarged=sum(report.enlarged for report in reports),
        empty_classes=split.empty_classes,
        up_to_date=all(report.up_to_date for report in reports),
    )
