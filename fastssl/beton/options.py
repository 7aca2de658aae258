"""The options of a build: which exclude each other, how images are stored, and what the manifest holds of them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fastssl.beton.format import BC4_SIDE, LARGEST_BC4_SIDE, MOST_CHANNELS, PAGE_SIZE, RGB, Manifest, is_bc4_side
from fastssl.beton.images import MAX_MEGAPIXELS, Codec, StoragePlan
from fastssl.beton.ranges import Range, format_range, parse_range
from fastssl.beton.shards import MOST_SHARDS
from fastssl.beton.source import ORDER_SEED, Order, SplitRule, as_utf8
from fastssl.common.errors import UserError, quote
from fastssl.common.system import resolve_workers

LARGEST_SIDE = 65500  # px; the limit of the JPEG format, and FFCV stores sides in 16 bits
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
    hold_out: float | None = None  # images, in %, of a source without splits that become val; None: none

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
        if self.hold_out is not None and not 0 < self.hold_out < 100:
            raise UserError(
                f"--hold-out must be more than 0 % and less than 100 %, got {self.hold_out:g} %",
                hint="write a percentage, such as --hold-out 10%",
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

    def recorded(self, builder: str, source: Path | None, plan: StoragePlan) -> dict[str, Any]:
        """Return what the manifest holds of a build of `source` with these options."""
        recorded: dict[str, Any] = {
            "builder": builder,
            "source": as_utf8(str(source)) if source else None,
            "limit": self.limit,
            "layout": plan.layout,
            "canvas" if plan.layout == "canvas" else "max_side": plan.side,
            "storage": plan.storage,
            "quality": plan.quality if plan.storage == "jpg" else None,
            "order": {"shuffled_with_seed": ORDER_SEED} if self.order == "shuffle" else "source",
        }
        # Only what is not the default, so that files of before these options existed stay up to date.
        if self.splits == "none":
            recorded["splits"] = self.splits
        if self.value_range != "full":
            recorded["range"] = format_range(self.value_range)
        if self.max_megapixels != MAX_MEGAPIXELS:
            recorded["max_megapixels"] = self.max_megapixels
        if self.channels != RGB:
            recorded["channels"] = self.channels
        if self.shards is not None:
            recorded["shards"] = self.shards
        if self.hold_out is not None:
            recorded["hold_out"] = self.hold_out
        return recorded


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
