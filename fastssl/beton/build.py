"""Build .beton files: the builder lists the images, workers encode them, this process writes.

FFCV's own DatasetWriter is not used: it waits for ever when a worker meets a bad image, and can
neither skip one nor store a JPEG's bytes as they are.

The same source and options give the same bytes whatever the number of workers: results are
written in the order in which the images were handed out, which is a fixed shuffle (a file sorted
by class would make its first thousand samples one class); `index` keeps the source order.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from fastssl.recipe import UserError

from .builders import load_builder
from .format import OUR_FIELDS, metadata_type
from .images import Plan
from .listing import Listing
from .pool import encoded_in_order, encoder_pool
from .progress import progress
from .sample import Sample
from .write import BetonWriter, replace_durably

LARGEST_SIDE = 65500  # px; the limit of the JPEG format, and FFCV stores sides in 16 bits
ORDER_SEED = 0
DRY_RUN_IMAGES = 256  # encoded to forecast the size of a file


class SplitReport(NamedTuple):
    """What became of one split. In a dry run `bytes` is the forecast and nothing is written."""

    split: str
    path: Path
    samples: int
    classes: int
    bytes: int
    bad: int
    passed_through: int
    seconds: float


class Split(NamedTuple):
    """One split as its builder gives it."""

    name: str
    classes: list[str]
    samples: Sequence[Sample]


def build_beton(
    builder: str,
    source: Path | None,
    out: Path,
    *,
    canvas: int | None = None,
    max_side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    limit: int | None = None,
    dry_run: bool = False,
) -> list[SplitReport]:
    """Write OUT/{split}.beton with its manifest for every split that `builder` finds in `source`.

    `canvas` px (layout "canvas", the builder's own default) or `max_side` px (layout "full") set
    what is stored; `quality` is that of JPEGs made here. `limit` takes that many images of each
    split, spread over its classes. Bad images are skipped and listed in OUT/bad_images.jsonl.
    """
    module = load_builder(builder)
    plan = plan_storage(module.CANVAS, canvas, max_side, quality)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for option, value in (("--workers", workers), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; it must be 1 or more.")
    splits = list_splits(module, builder, source)
    options = {
        "fastssl": importlib.metadata.version("fastssl-trainer"),
        "builder": builder,
        "source": str(source) if source else None,
        "limit": limit,
    }

    if dry_run:
        with encoder_pool(workers) as pool:
            return [_forecast(split, out, plan, pool, workers, limit) for split in splits]

    with _naming_the_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "bad_images.jsonl").unlink(missing_ok=True)
        reports: list[SplitReport] = []
        with encoder_pool(workers) as pool:
            for split in splits:
                reports.append(_build_split(split, out, plan, pool, workers, options))
    return reports


def plan_storage(default: int, canvas: int | None, max_side: int | None, quality: int) -> Plan:
    """Check the options against each other and settle the layout; sides in px."""
    if canvas is not None and max_side is not None:
        raise UserError("--canvas and --max-side exclude each other: give one of them.")
    side = max_side if max_side is not None else (canvas if canvas is not None else default)
    if not 1 <= side <= LARGEST_SIDE:
        option = "--max-side" if max_side is not None else "--canvas"
        raise UserError(f"{option} is {side}; it must be between 1 and {LARGEST_SIDE} pixels.")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}; it must be between 1 and 100.")
    return Plan("full" if max_side is not None else "canvas", side, quality)


def list_splits(module: ModuleType, builder: str, source: Path | None) -> list[Split]:
    """Ask the builder what is in `source`; its complaint about the layout becomes a UserError."""
    if source is not None and not source.exists():
        raise UserError(f"{source} does not exist; --source must be what {builder} is built from.")
    try:
        found = module.splits(source)
        splits = []
        for name, (classes, samples) in found.items():
            listed = samples if isinstance(samples, Sequence) else Listing(samples)
            splits.append(Split(name, classes, listed))
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: give yourself the right to.") from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    for split in splits:
        if not split.samples:
            raise UserError(f"{source} holds no images for the split {split.name!r}.")
    return splits


def _build_split(
    split: Split,
    out: Path,
    plan: Plan,
    pool: ProcessPoolExecutor,
    workers: int,
    options: dict,
) -> SplitReport:
    """Write one split beside its final name, then rename it."""
    start = time.monotonic()
    path, part = out / f"{split.name}.beton", out / f"{split.name}.beton.part"
    manifest_path = out / f"{split.name}.beton.json"
    manifest_part = out / f"{split.name}.beton.json.part"
    order = _order(split, options["limit"])
    bad: list[dict] = []
    how: Counter[str] = Counter()

    try:
        with open(part, "wb", buffering=1 << 20) as file:
            writer = BetonWriter(file, capacity=len(order))
            images = (split.samples[index].image for index in order)
            with progress(split.name, len(order)) as advance:
                results = encoded_in_order(pool, images, plan, workers)
                for index, result in zip(order, results, strict=True):
                    sample = split.samples[index]
                    if isinstance(result, str):
                        bad.append(_bad_image(split.name, sample, index, result))
                    else:
                        writer.add(result, _checked_label(sample, split), index)
                        how[result.how] += 1
                    advance()
            _append_bad_images(out / "bad_images.jsonl", bad)
            if not writer.samples:
                raise UserError(
                    f"Not one of the {len(bad)} images of the split {split.name!r} could be read "
                    f"(the first: {bad[0]['reason']}); all are listed in {out}/bad_images.jsonl."
                )
            writer.finish()

        manifest = {
            **options,
            "layout": plan.layout,
            "canvas" if plan.layout == "canvas" else "max_side": plan.side,
            "storage": plan.storage,
            "quality": plan.quality if plan.storage == "jpg" else None,
            "order": {"shuffled_with_seed": ORDER_SEED},
            "samples": writer.samples,
            "classes": split.classes,
            "counts": {
                "passed_through": how["passed_through"],
                "encoded": how["encoded"],
                "raw": how["raw"],
                "bad": len(bad),
            },
        }
        with open(manifest_part, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
        # The old manifest goes first: a .beton without one can be read, with a wrong one it
        # would be misread.
        manifest_path.unlink(missing_ok=True)
        replace_durably(part, path)
        replace_durably(manifest_part, manifest_path)
    finally:
        part.unlink(missing_ok=True)
        manifest_part.unlink(missing_ok=True)

    return SplitReport(
        split.name,
        path,
        writer.samples,
        len(split.classes),
        path.stat().st_size,
        len(bad),
        how["passed_through"],
        time.monotonic() - start,
    )


def _forecast(
    split: Split,
    out: Path,
    plan: Plan,
    pool: ProcessPoolExecutor,
    workers: int,
    limit: int | None,
) -> SplitReport:
    """What building a split would give, from encoding the first few hundred images in its order."""
    start = time.monotonic()
    order = _order(split, limit)
    images = (split.samples[index].image for index in itertools.islice(order, DRY_RUN_IMAGES))
    results = list(encoded_in_order(pool, images, plan, workers))
    good = [result for result in results if not isinstance(result, str)]
    seconds_an_image = (time.monotonic() - start) / len(results)
    bytes_an_image = sum(len(result.payload) for result in good) / len(results)
    bytes_a_row = metadata_type(OUR_FIELDS).itemsize
    passed_through = sum(result.how == "passed_through" for result in good)
    return SplitReport(
        split.name,
        out / f"{split.name}.beton",
        len(order),
        len(split.classes),
        round(len(order) * (bytes_an_image + bytes_a_row)),
        len(results) - len(good),
        passed_through,
        seconds_an_image * len(order),
    )


def _order(split: Split, limit: int | None) -> list[int]:
    """Positions in the builder's order, in the order in which they are written."""
    return np.random.default_rng(ORDER_SEED).permutation(len(split.samples))[:limit].tolist()


def _checked_label(sample: Sample, split: Split) -> int:
    if not 0 <= sample.label < len(split.classes):
        raise UserError(
            f"The builder gave {sample.name} the label {sample.label}, but the split "
            f"{split.name!r} has {len(split.classes)} classes: the builder needs mending."
        )
    return sample.label


def _bad_image(split: str, sample: Sample, index: int, reason: str) -> dict:
    return {"split": split, "name": sample.name, "index": index, "reason": reason}


def _append_bad_images(path: Path, bad: list[dict]) -> None:
    """One JSON object a line, in source order; no file where every image was good."""
    if bad:
        with open(path, "a", encoding="utf-8") as file:
            for entry in sorted(bad, key=lambda entry: entry["index"]):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _naming_the_disk(out: Path) -> Iterator[None]:
    """Turn what the operating system says about writing to `out` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            mend = "free some space or give another --out"
        else:
            mend = "give an --out that you can write to"
        raise UserError(f"Cannot write to {out}: {error.strerror}; {mend}.") from error
