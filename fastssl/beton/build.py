"""Build .beton files: a builder lists the images, worker processes encode and write them.

To follow an image: build_beton and _encode_images here, Pool.write_encoded in pool.py, encode_image in images.py.

FFCV's own DatasetWriter is not used: it waits forever when a worker meets a bad image, and can neither skip one, nor
store a JPEG's bytes as they are, nor resume after it was stopped.

The same source and options give the same bytes, whatever the number of workers and however often the build was stopped.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from fastssl.beton.accounting import account_for_files
from fastssl.beton.format import (
    BC4_SIDE,
    LARGEST_BC4_SIDE,
    MOST_CHANNELS,
    PAGE_SIZE,
    RGB,
    UNLABELLED,
    Manifest,
    indexed_names_path,
    is_bc4_side,
    manifest_path,
    names_path,
)
from fastssl.beton.images import MAX_MEGAPIXELS, Case, Codec, StoragePlan
from fastssl.beton.partial_build import BadImage, PartialBuild, partial_folder
from fastssl.beton.pool import DIED, NO_MEMORY, WORKER_DIED, Pool, WrittenChunk, worker_pool
from fastssl.beton.ranges import Range, format_range, parse_range
from fastssl.beton.reading import MISSING
from fastssl.beton.shards import (
    MOST_SHARDS,
    Shard,
    exists,
    is_shard,
    set_manifest_path,
    set_path,
    sets_in,
    shard_path,
)
from fastssl.beton.source import (
    ORDER_SEED,
    ImageSource,
    Order,
    Sample,
    SourceSplit,
    SplitRule,
    as_utf8,
    changed_since,
    digest,
    download_dataset,
    list_splits,
    load_builder,
)
from fastssl.common.errors import UserError, quote
from fastssl.common.files import explain_write_errors, read_text, write_atomically
from fastssl.common.system import resolve_workers
from fastssl.common.terminal import console, print_line, progress

LARGEST_LIST = 1 << 30  # bytes of bad_images.jsonl; a million bad images take 0.1 GB
LARGEST_SIDE = 65500  # px; the limit of the JPEG format, and FFCV stores sides in 16 bits
MOST_NAMED = 5  # images of which workers have died
MOST_BAD = 10  # bad images of a split that are no problem, however small the split is
JPEG_QUALITY = 90


@dataclass(frozen=True)
class BuildOptions:
    """The options of `build_beton`, checked. Raises UserError if one is out of range."""

    canvas: int | None = None  # px; layout "canvas": each image is resized to a square. None: the builder's CANVAS
    max_side: int | None = None  # px; layout "full": images are shrunk to fit, JPEGs that fit keep their bytes
    codec: Codec | None = None  # of a canvas; None: see StoragePlan
    quality: int | None = None  # of the JPEGs that are encoded, 1 to 100; None: JPEG_QUALITY
    order: Order = "shuffle"  # of the samples in the file: a fixed random order, or the builder's
    workers: int | None = None  # processes; None: one for each core
    limit: int | None = None  # images to take from each split, spread over its classes; None: all
    strict: bool = False  # stop at the first bad image
    allow_bad: float | None = None  # bad images of a split, in %, that are no problem; None: 1 %, or 10 images
    download: bool = False  # let the builder download the data set to `source` first
    value_range: Range = "full"  # (low, high) of pixels of more than 8 bits; "full": 0 to 65,535; "auto": by image
    max_megapixels: int = MAX_MEGAPIXELS  # larger images are bad
    splits: SplitRule = "auto"  # whether names such as train/ and validation/ tell splits; "none": no name does
    channels: int = RGB  # of the stored images; 1: gray; others only of TIFF and .npy files (channels.py)
    shards: int | None = None  # files for each split, see shards.py; None: one file
    shard: int | None = None  # build only this one of them, from 0; None: all

    def __post_init__(self) -> None:
        if self.canvas is not None and self.max_side is not None:
            raise UserError("--canvas and --max-side exclude each other", hint="use one of them")
        for option, side in (("--canvas", self.canvas), ("--max-side", self.max_side)):
            if side is not None and not 1 <= side <= LARGEST_SIDE:
                raise UserError(
                    f"{option} must be from 1 to {LARGEST_SIDE} px, got {side}",
                    hint=f"write a side in px, such as {option} 256",
                )
        if self.codec not in (None, *get_args(Codec)):
            raise UserError(
                f"--codec must be {' or '.join(get_args(Codec))}, got {quote(self.codec)}",
                hint="leave out --codec for the builder's choice",
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, got {self.quality}", hint="leave out --quality for 90")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be 1 or more, got {self.limit}", hint="leave out --limit to use all images")
        if self.allow_bad is not None and not 0 <= self.allow_bad <= 100:
            raise UserError(
                f"--allow-bad must be from 0 to 100 %, got {self.allow_bad:g} %",
                hint="write a percentage, such as --allow-bad 5%",
            )
        if self.max_megapixels < 1:
            raise UserError(
                f"--max-megapixels must be 1 or more, got {self.max_megapixels}",
                hint="leave out --max-megapixels for its default",
            )
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise UserError(
                f"--channels must be from 1 to {MOST_CHANNELS}, got {self.channels}",
                hint="write 1 for gray images, 3 for RGB",
            )
        if self.shards is not None and not 1 <= self.shards <= MOST_SHARDS:
            raise UserError(
                f"--shards must be from 1 to {MOST_SHARDS:,}, got {self.shards}", hint="leave out --shards for one file"
            )
        if self.shard is not None and (self.shards is None or not 0 <= self.shard < self.shards):
            has = "needs --shards" if self.shards is None else f"must be from 0 to {self.shards - 1}, got {self.shard}"
            raise UserError(f"--shard {has}", hint="write --shards N --shard K, with K from 0 to N - 1")
        if self.codec == "bc4" and self.max_side is not None:
            raise UserError("--codec bc4 stores squares", hint="use --canvas in place of --max-side")
        if self.codec is not None and self.channels != RGB:
            raise UserError(
                f"--channels {self.channels} stores pixels, and --codec is for RGB images", hint="leave out --codec"
            )
        if self.channels != RGB and self.max_side is not None:
            raise UserError(
                f"--channels {self.channels} stores squares of pixels", hint="use --canvas in place of --max-side"
            )
        resolve_workers(self.workers)

    def plan(self, default_canvas: int) -> StoragePlan:
        """Return how images are stored; `default_canvas` is the builder's, in px."""
        quality = JPEG_QUALITY if self.quality is None else self.quality
        if self.max_side is not None:
            return StoragePlan("full", self.max_side, quality, self.value_range, self.max_megapixels)
        side = self.canvas or default_canvas
        if side**2 > self.max_megapixels * 1_000_000:
            raise UserError(
                f"A canvas of {side} x {side} px has {side**2 / 1e6:,.0f} megapixels, more than "
                f"--max-megapixels {self.max_megapixels}",
                hint=f"use --canvas {math.isqrt(self.max_megapixels * 1_000_000)} or less",
            )
        if self.channels != RGB and side**2 * self.channels > PAGE_SIZE:
            raise UserError(
                f"Images of {side} x {side} px with {self.channels} channels take more than a page of {PAGE_SIZE:,} "
                "bytes",
                hint=f"use --canvas {math.isqrt(PAGE_SIZE // self.channels)} or less",
            )
        if self.codec == "bc4" and not is_bc4_side(side):
            fitting = max(BC4_SIDE, min(side, LARGEST_BC4_SIDE) // BC4_SIDE * BC4_SIDE)
            raise UserError(
                f"--codec bc4 stores squares whose side is a multiple of {BC4_SIDE} px and at most {LARGEST_BC4_SIDE} "
                f"px, not of {side} px",
                hint=f"use --canvas {fitting}",
            )
        plan = StoragePlan("canvas", side, quality, self.value_range, self.max_megapixels, self.channels, self.codec)
        if self.quality is not None and plan.storage != "jpg":
            instead = "leave out --quality" + (", or add --codec jpeg" if self.channels == RGB else "")
            raise UserError(
                f"--quality is of JPEGs, and a canvas of {side} px is stored as {plan.described}", hint=instead
            )
        return plan


@dataclass(frozen=True)
class BuildReport:
    """The result of a build."""

    splits: list["SplitReport"]
    problem: str | None  # a sentence about splits with too many bad images
    account: str  # a sentence that accounts for every file of the source, and for every image


class SplitReport(NamedTuple):
    """The result of building one split."""

    split: str
    path: Path  # of shards, the pattern that names them all
    samples: int
    classes: int
    bytes: int
    bad: int  # images that were skipped
    bad_images: Path  # the list of them; of shards, a pattern
    unlabelled: int  # of the samples: images without a label, stored with -1
    nearly_black: int  # of the samples: no stored value is above 1/8 of the range; JPEGs stored unchanged do not count
    empty_classes: list[str]  # names of classes without images in the source
    up_to_date: bool  # nothing was done: the file had been built from the same images with the same options


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
        canvas, max_side, codec, quality, order, workers, limit, strict, allow_bad, download, value_range,
            max_megapixels, splits, channels, shards, shard: see `BuildOptions`.

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
    )
    plan = options.plan(load_builder(builder).CANVAS)
    refuse_output_in_source(source, out)
    if download:
        download_dataset(builder, source)
    recorded: dict[str, Any] = {
        "builder": builder,
        "source": as_utf8(str(source)) if source else None,
        "limit": limit,
        "layout": plan.layout,
        "canvas" if plan.layout == "canvas" else "max_side": plan.side,
        "storage": plan.storage,
        "quality": plan.quality if plan.storage == "jpg" else None,
        "order": {"shuffled_with_seed": ORDER_SEED} if order == "shuffle" else "source",
    }
    # Only what is not the default, so that files of before these options existed stay up to date.
    if splits == "none":
        recorded["splits"] = splits
    if value_range != "full":
        recorded["range"] = format_range(value_range)
    if max_megapixels != MAX_MEGAPIXELS:
        recorded["max_megapixels"] = max_megapixels
    if channels != RGB:
        recorded["channels"] = channels
    if shards is not None:
        recorded["shards"] = shards
    arrays = channels != RGB
    listed = list_splits(builder, source, order, limit, splits, arrays)
    for split in listed:
        check_shards(split, out, shards)
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with worker_pool(resolve_workers(workers)) as pool:
            reports = [_build_split(split, out, plan, pool, recorded, strict, shards, shard) for split in listed]
    stored, bad = sum(report.samples for report in reports), sum(report.bad for report in reports)
    others = 0 if shard is None else sum(len(split.order) for split in listed) - stored - bad
    account = account_for_files(builder, source, listed, stored, bad, arrays=arrays, in_other_shards=others)
    return BuildReport(reports, _too_many_bad(reports, allow_bad), account)


def recorded_plan(manifest: Manifest) -> StoragePlan:
    """Return how the images of a file are stored, by its manifest. Raises UserError if it holds impossible values."""
    canvas, max_side = manifest.get("canvas"), manifest.get("max_side")
    quality = manifest.get("quality")  # null where no JPEG was encoded
    value_range, megapixels = manifest.get("range", "full"), manifest.get("max_megapixels", MAX_MEGAPIXELS)
    channels = manifest.get("channels", RGB)
    numbers = [megapixels, channels, *(number for number in (canvas, max_side, quality) if number is not None)]
    if (
        canvas is max_side is None
        or any(type(number) is not int for number in numbers)
        or not isinstance(value_range, str)
    ):
        raise UserError(
            "it has no canvas and no max_side, or a value that build-beton does not write", hint="build the file again"
        )
    options = BuildOptions(
        canvas,
        max_side,
        _recorded_codec(manifest),
        quality,
        value_range=parse_range(value_range),
        max_megapixels=megapixels,
        channels=channels,
    )
    return options.plan(default_canvas=0)  # not used, as there is one of the sides


def _recorded_codec(manifest: Manifest) -> Codec | None:
    """Return the codec of a canvas by its manifest; None for pixels, and for the full layout."""
    codecs: dict[str, Codec] = {"jpg": "jpeg", "bc4": "bc4"}
    return codecs.get(str(manifest.get("storage"))) if manifest.get("canvas") else None


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


def _build_split(
    split: SourceSplit,
    out: Path,
    plan: StoragePlan,
    pool: Pool,
    options: dict[str, Any],
    strict: bool,
    shards: int | None,
    only: int | None,
) -> SplitReport:
    """Build one split, as one file or in shards, of which `only` may be one. `options` are those of the manifest."""
    from fastssl.beton.set_manifest import write_set_manifest

    # Another machine may have the source of its shards elsewhere.
    list_sha256 = digest(split.samples, paths=shards is None)
    options = {**options, "sample_list_sha256": list_sha256, "classes": split.classes}
    if shards is None:
        return _build_if_outdated(split, out / f"{split.name}.beton", plan, pool, options, strict)
    reports = []
    for number in range(shards) if only is None else [only]:
        shard = Shard(number, shards)
        of_shard = split._replace(order=split.order[shard.bounds(len(split.order))])
        path, key = shard_path(out, split.name, shard), {**options, "shard": number}
        reports.append(_build_if_outdated(of_shard, path, plan, pool, key, strict, shard))
    is_written = set_manifest_path(set_path(out, split.name, shards)).exists()
    if not is_written or not all(report.up_to_date for report in reports):
        write_set_manifest(out, split.name, shards)
    if only is not None:
        return reports[0]
    return SplitReport(
        split.name,
        set_path(out, split.name, shards),
        samples=sum(report.samples for report in reports),
        classes=len(split.classes),
        bytes=sum(report.bytes for report in reports),
        bad=sum(report.bad for report in reports),
        bad_images=out / f"bad_images-*-of-{shards:05}.jsonl",
        unlabelled=sum(report.unlabelled for report in reports),
        nearly_black=sum(report.nearly_black for report in reports),
        empty_classes=split.empty_classes,
        up_to_date=all(report.up_to_date for report in reports),
    )


def check_shards(split: SourceSplit, out: Path, shards: int | None) -> None:
    """Refuse shards without an image, and a second set: nobody would know which of them a folder stands for."""
    own = out / f"{split.name}.beton" if shards is None else set_path(out, split.name, shards)
    there = [path for path in (out / f"{split.name}.beton", *sets_in(out, split.name)) if exists(path) and path != own]
    if there:
        raise UserError(
            f"{there[0]} exists, and a folder holds the split {split.name!r} once, as one file or in shards",
            hint="use another --out, or delete it",
        )
    if shards is not None and shards > len(split.order):
        raise UserError(
            f"--shards {shards:,} are more than the {len(split.order):,} images of the split {split.name!r}",
            hint=f"use --shards {len(split.order)} or less",
        )


def _build_if_outdated(
    split: SourceSplit,
    path: Path,
    plan: StoragePlan,
    pool: Pool,
    key: dict[str, Any],
    strict: bool,
    shard: Shard | None = None,
) -> SplitReport:
    """Build one file of the images in `split.order`, unless it is up to date by its `key`, which the manifest holds."""
    if os.path.lexists(path) and not manifest_path(path).exists() and not partial_folder(path).exists():
        raise UserError(
            f"{path} exists without a manifest, so it may not be of build-beton", hint="move it, or use another --out"
        )
    old = _read_if_up_to_date(path, key, split, shard)
    if old is None:
        _say_what_is_replaced(path, key, len(split.samples))
    bad_images = path.parent / f"bad_images{shard.suffix if shard else ''}.jsonl"  # other processes build other shards
    manifest = old or _build_file(split, path, plan, pool, key, strict, bad_images)
    samples, bad = manifest["samples"], manifest["counts"]["bad"]
    return SplitReport(
        split.name,
        path,
        samples,
        classes=len(split.classes),
        bytes=path.stat().st_size,
        bad=bad,
        bad_images=bad_images,
        unlabelled=manifest.get("unlabelled", 0),
        nearly_black=manifest.get("nearly_black", 0),
        empty_classes=split.empty_classes,
        up_to_date=old is not None,
    )


def _build_file(
    split: SourceSplit,
    path: Path,
    plan: StoragePlan,
    pool: Pool,
    key: dict[str, Any],
    strict: bool,
    bad_images: Path,
) -> Manifest:
    """Build one file, or resume its build, and return its manifest."""
    key = {"fastssl": version("fastssl-trainer"), "pillow": version("pillow"), **key}
    with PartialBuild(path, key, capacity=len(split.order)) as partial:
        missing = {image.index for image in partial.bad if image.reason == MISSING}
        is_of_split = np.array_equal(partial.rows["index"], split.order[: len(partial.rows)])
        if not is_of_split or changed_since(
            split.samples, np.sort(partial.rows["index"]).tolist(), partial.started, missing
        ):
            partial.restart()
        _encode_images(split, partial, plan, pool, strict)
        _list_bad_images(bad_images, split.name, partial.bad)
        if not len(partial.good):
            what = f"the shard {path.stem}" if is_shard(path) else f"the split {split.name!r}"
            fewer = ", or use fewer --shards" if is_shard(path) else ""
            raise UserError(
                f"None of the {len(partial.bad)} images of {what} could be read (the first: {partial.bad[0].reason})",
                hint=f"read {bad_images}, which lists them all with the reason{fewer}",
            )
        manifest = {**key, **_counts(partial.rows)}
        not_found = sorted(image.index for image in partial.bad if image.reason == MISSING)
        if not_found:
            manifest["missing"] = not_found
        partial.finish(manifest, names_file_of(path), _lines_of_names(split, path))
    return manifest


def names_file_of(path: Path) -> Path:
    """Return where the names of the images of a file go; of a shard, with their indices, as it holds some only."""
    return indexed_names_path(path) if is_shard(path) else names_path(path)


def _lines_of_names(split: SourceSplit, path: Path) -> Iterator[str]:
    if not is_shard(path):
        return (sample.name for sample in split.samples)
    return (f"{index}\t{split.samples[index].name}" for index in np.sort(split.order).tolist())


def _encode_images(split: SourceSplit, partial: PartialBuild, plan: StoragePlan, pool: Pool, strict: bool) -> None:
    """Encode and write the images that have not been processed yet, without those of which a worker process dies."""
    _refuse_bad_images(partial.bad, strict)
    total = len(split.order)
    with progress(partial.path.stem, total, done=len(partial.rows)) as advance:

        def images(end: int) -> Iterator[ImageSource]:
            for index in split.order[len(partial.rows) : end]:
                yield _check_label(split.samples[index], split).image

        def record(written: Iterable[WrittenChunk]) -> None:
            for rows, reasons in written:
                _record(split, partial, rows, reasons, strict)
                advance(len(rows), int(rows["size"].sum()))

        while (done := len(partial.rows)) < total:
            try:
                record(pool.write_encoded(partial.pages, partial.position, images(total), plan))
            except WORKER_DIED:
                begun = min(done + pool.count_begun(), total)
                bad_before = len(partial.bad)
                record(pool.write_one_by_one(partial.pages, partial.position, images(begun), plan))
                _say_what_died(split.name, partial.bad[bad_before:])


def _say_what_died(split: str, bad: list[BadImage]) -> None:
    """Say of which of the new bad images a worker process has died; if of none, what else it may have been."""
    names = [image.name for image in bad if image.reason in (DIED, NO_MEMORY)]
    named = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    no_image = "but of no image: perhaps there are too many --workers (dmesg tells what the kernel kills)"
    line = f"{split}: a worker process died or had too little memory, {f'of {named}' if names else no_image}."
    print_line(console(stderr=True), line)


def _record(split: SourceSplit, partial: PartialBuild, rows: np.ndarray, reasons: list[str], strict: bool) -> None:
    """Add the next images, which have been written, to the partial build."""
    done = len(partial.rows)
    rows["index"] = split.order[done : done + len(rows)]
    rows["label"] = [split.samples[index].label for index in rows["index"]]
    bad_indices = rows["index"][rows["case"] == Case.BAD].tolist()
    bad = [
        BadImage(split.name, as_utf8(split.samples[index].name), index, as_utf8(reason))
        for index, reason in zip(bad_indices, reasons, strict=True)
    ]
    _refuse_bad_images(bad, strict)
    partial.add(rows, bad)


def _check_label(sample: Sample, split: SourceSplit) -> Sample:
    if sample.label != UNLABELLED and not 0 <= sample.label < len(split.classes):
        raise UserError(
            f"The builder gave {sample.name} the label {sample.label}, but the split {split.name!r} has "
            f"{len(split.classes)} classes",
            hint="correct the builder's file",
        )
    return sample


def _refuse_bad_images(bad: list[BadImage], strict: bool) -> None:
    if strict and bad:
        raise UserError(f"{bad[0].name} is bad: {bad[0].reason}", hint="repair or remove it, or leave out --strict")


def _read_if_up_to_date(path: Path, key: dict[str, Any], split: SourceSplit, shard: Shard | None) -> Manifest | None:
    """Return the manifest of the file if a build with this `key` would give the same file."""
    from fastssl.beton.manifest import read_manifest

    try:
        manifest = read_manifest(path, len(split.samples))
        compared = key if shard is None else {name: value for name, value in key.items() if name != "source"}
        is_same = all(manifest[name] == value for name, value in compared.items())
        is_complete = path.stat().st_size == manifest["bytes"] and names_file_of(path).is_file()
        # `finish` sets this to the time at which the build was started.
        started = manifest_path(path).stat().st_mtime_ns
        missing = set(manifest.get("missing", ()))
        is_complete &= "bad" in manifest["counts"]
    except (OSError, ValueError, KeyError):
        return None
    if not (is_same and is_complete):
        return None
    # Sorted: samples of one archive follow each other. Images outside of --limit do not matter.
    return None if changed_since(split.samples, np.sort(split.order).tolist(), started, missing) else manifest


def _say_what_is_replaced(path: Path, key: dict[str, Any], samples: int) -> None:
    """Print how the file of an earlier build is stored, and how the new one: before the work, while it still exists."""
    from fastssl.beton.manifest import read_manifest

    try:
        before = _stored_as(read_manifest(path, samples))
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is none, or its manifest says nothing
    now = _stored_as(key)
    what = f" with {now}" if before != now else ", whose images or other options have changed"
    print_line(console(stderr=True), f"Replaces {path} ({before}){what}.")


def _stored_as(manifest: Mapping[str, Any]) -> str:
    side = manifest["canvas"] if manifest["layout"] == "canvas" else manifest["max_side"]
    stored = {"raw": "pixels", "jpg": "JPEG", "bc4": "BC4"}[manifest["storage"]]
    quality = f" quality {quote(manifest['quality'])}" if manifest["storage"] == "jpg" else ""
    return f"{'canvas' if manifest['layout'] == 'canvas' else 'up to'} {quote(side)} px, {stored}{quality}"


def _counts(rows: np.ndarray) -> dict[str, Any]:
    """Count, for the manifest, what happened to the images of `rows` (format.ROW)."""
    numbers = np.bincount(rows["case"], minlength=len(Case)).tolist()
    cases = {case.name.lower(): numbers[case] for case in Case if numbers[case]}
    counts = {name: cases.pop(name, 0) for name in ("passed_through", "raw", "bad")}
    counts["encoded"] = sum(cases.values())
    formats, numbers = np.unique(rows["source_format"][rows["case"] != Case.BAD], return_counts=True)
    return {
        "samples": len(rows) - counts["bad"],
        "unlabelled": int(((rows["label"] == UNLABELLED) & (rows["case"] != Case.BAD)).sum()),
        "nearly_black": int(rows["is_nearly_black"].sum()),
        "counts": counts,
        "encoded_because": cases,
        "source_formats": {
            name.decode("ascii", "backslashreplace"): number for name, number in zip(formats, numbers.tolist())
        },
    }


def _list_bad_images(path: Path, split: str, bad: list[BadImage]) -> None:
    """Replace the bad images of a split in the list of all splits. An empty list has no file."""
    try:
        lines = read_text(path, LARGEST_LIST).split("\n")
        entries = [BadImage.from_json(line) for line in lines if line]
    except (FileNotFoundError, ValueError, RecursionError):  # there is none, or not one of ours
        entries = []
    entries = [entry for entry in entries if entry.split != split] + sorted(bad, key=lambda entry: entry.index)
    if entries:
        write_atomically(path, b"".join(entry.to_json() for entry in entries))
    else:
        path.unlink(missing_ok=True)
