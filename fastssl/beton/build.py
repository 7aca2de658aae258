"""Build .beton files: the builder lists the images, workers encode and write them.

FFCV's own DatasetWriter is not used: it waits for ever when a worker meets a bad image, and can
neither skip one, nor store a JPEG's bytes as they are, nor go on after it was stopped.

The same source and options give the same bytes whatever the number of workers, and however often
the build was stopped. Samples stand in a fixed shuffle (a file sorted by class would make its
first thousand samples one class) or in the builder's order; `index` is always the latter.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from fastssl.beton.builders import load_builder
from fastssl.beton.images import Case, Plan
from fastssl.beton.partial_build import PartialBuild, manifest_path, names_path
from fastssl.beton.pool import Pool, worker_pool
from fastssl.beton.sample import Sample
from fastssl.beton.sample_list import SampleList, changed_since, digest
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.system import resolve_workers
from fastssl.common.terminal import progress

LARGEST_SIDE = 65500  # px; the limit of the JPEG format, and FFCV stores sides in 16 bits
ORDER_SEED = 0
LISTED_AT_ONCE = 10_000  # images between two updates of the progress of listing


class SplitReport(NamedTuple):
    """What became of one split."""

    split: str
    path: Path
    samples: int
    classes: int
    bytes: int
    bad: int
    passed_through: int
    seconds: float
    kept: bool  # the file was there already, built from the same images with the same options


class Split(NamedTuple):
    """One split as its builder gives it, and how it is to be built."""

    name: str
    classes: list[str]
    samples: Sequence[Sample]
    order: np.ndarray  # positions in `samples`, in the order in which they are written


def build_beton(
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
    strict: bool = False,
    download: bool = False,
) -> list[SplitReport]:
    """Write OUT/{split}.beton with its manifest for every split that `builder` finds in `source`.

    `canvas` px (layout "canvas", the builder's own default) or `max_side` px (layout "full") set
    what is stored; `quality` is that of JPEGs made here. `limit` takes that many images of each
    split, spread over its classes. Bad images are skipped and listed in OUT/bad_images.jsonl;
    with `strict` the first one is a UserError. A build that was stopped goes on where it was, and
    a split that is there already is kept if the same call would write it again.
    """
    module = load_builder(builder)
    plan = plan_storage(module.CANVAS, canvas, max_side, quality)
    workers = resolve_workers(workers)
    if download:
        download_dataset(module, builder, source)
    options = {
        "builder": builder,
        "source": _as_utf8(str(source)) if source else None,
        "limit": limit,
        "layout": plan.layout,
        "canvas" if plan.layout == "canvas" else "max_side": plan.side,
        "storage": plan.storage,
        "quality": plan.quality if plan.storage == "jpg" else None,
        "order": {"shuffled_with_seed": ORDER_SEED} if order == "shuffle" else "source",
    }
    splits = list_splits(module, builder, source, order, limit)
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with worker_pool(workers) as pool:
            return [_build_split(split, out, plan, pool, options, strict) for split in splits]


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


def download_dataset(module: ModuleType, builder: str, source: Path | None) -> None:
    """Download the builder's data set into `source` with torchvision, which compares checksums."""
    if not hasattr(module, "DOWNLOAD"):
        raise UserError(f"{builder} cannot be downloaded; `fastssl build-beton --list` says what can.")
    if source is None:
        raise UserError("--download needs --source, the folder to download into.")
    source.mkdir(parents=True, exist_ok=True)
    try:
        from torchvision import datasets

        for call in module.DOWNLOAD:
            options = {name: value for name, value in call.items() if name != "dataset"}
            getattr(datasets, call["dataset"])(root=source, download=True, **options)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{builder} could not be downloaded into {source}: {error}") from error


def list_splits(
    module: ModuleType,
    builder: str,
    source: Path | None,
    order: Literal["shuffle", "source"] = "shuffle",
    limit: int | None = None,
) -> list[Split]:
    """Ask the builder what is in `source`; its complaint about the layout becomes a UserError."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be 1 or more.")
    if source is None and hasattr(module, "SOURCE"):
        raise UserError(f"{builder} needs --source, {module.SOURCE}.")
    if source is not None and not source.exists():
        fetching = "; --download fetches it" if hasattr(module, "DOWNLOAD") else ""
        raise UserError(f"{source} does not exist; --source must be what {builder} is built from{fetching}.")
    splits = []
    try:
        for name, (classes, samples) in module.splits(source).items():
            classes = [_as_utf8(class_name) for class_name in classes]
            listed = samples if isinstance(samples, Sequence) else SampleList(_counted(samples, name))
            splits.append(Split(name, classes, listed, _order(len(listed), order, limit)))
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: give yourself the right to.") from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    for split in splits:
        if not split.samples:
            raise UserError(f"{source} holds no images for the split {split.name!r}.")
    return splits


def _counted(samples: Iterable[Sample], split: str) -> Iterator[Sample]:
    """The samples as they are, with their number shown: a million on a slow disk take minutes."""
    samples = iter(samples)
    with progress(f"{split}: listing", None) as advance:
        while some := list(itertools.islice(samples, LISTED_AT_ONCE)):
            yield from some
            advance(len(some))


def _order(samples: int, order: Literal["shuffle", "source"], limit: int | None) -> np.ndarray:
    """Positions in the builder's order, in the order in which they are written."""
    shuffled = np.random.default_rng(ORDER_SEED).permutation(samples)[:limit]
    return shuffled if order == "shuffle" else np.sort(shuffled)


def _build_split(split: Split, out: Path, plan: Plan, pool: Pool, options: dict, strict: bool) -> SplitReport:
    """Write one split beside its final name, then rename it; or keep the one that is there."""
    start = time.monotonic()
    path = out / f"{split.name}.beton"
    key = {**options, "listing": digest(split.samples), "classes": split.classes}
    if manifest := _finished(path, key, split.samples):
        return _report(split, path, manifest, time.monotonic() - start, kept=True)

    versions = {
        "fastssl": importlib.metadata.version("fastssl-trainer"),
        "pillow": importlib.metadata.version("pillow"),
    }
    with PartialBuild(path, {**versions, **key}, capacity=len(split.order)) as unfinished:
        done = (split.samples[index] for index in unfinished.rows["index"])
        if changed_since(done, unfinished.started):
            unfinished.begin_anew()
        _handle_images(split, unfinished, plan, pool, strict)
        _record_bad_images(out / "bad_images.jsonl", split.name, unfinished.bad)
        if not len(unfinished.good):
            raise UserError(
                f"Not one of the {len(unfinished.bad)} images of the split {split.name!r} could be "
                f"read (the first: {unfinished.bad[0]['reason']}); all are listed in "
                f"{out}/bad_images.jsonl."
            )
        manifest = {**versions, **key, **_counts(unfinished.rows)}
        unfinished.finish(manifest, (sample.name for sample in split.samples))
    return _report(split, path, manifest, time.monotonic() - start, kept=False)


def _handle_images(split: Split, unfinished: PartialBuild, plan: Plan, pool: Pool, strict: bool) -> None:
    """Encode and write the images that have not been handled yet."""
    if strict and unfinished.bad:
        raise _strictly(unfinished.bad[0])
    done = len(unfinished.rows)
    images = (_checked(split.samples[index], split).image for index in split.order[done:])
    with progress(split.name, len(split.order), done=done) as advance:
        written = pool.write_encoded(unfinished.pages, unfinished.position, images, plan)
        for rows, reasons in written:
            rows["index"] = split.order[done : done + len(rows)]
            rows["label"] = [split.samples[index].label for index in rows["index"]]
            bad = [
                _bad_image(split, int(index), reason)
                for index, reason in zip(rows["index"][rows["case"] == Case.BAD], reasons, strict=True)
            ]
            if strict and bad:
                raise _strictly(bad[0])
            unfinished.add(rows, bad)
            done += len(rows)
            advance(len(rows), int(rows["size"].sum()))


def _finished(path: Path, key: dict, samples: Sequence[Sample]) -> dict | None:
    """The manifest of the file that is there, if this build would write the same one again."""
    try:
        manifest = json.loads(manifest_path(path).read_bytes())
        is_same = all(manifest[name] == value for name, value in key.items())
        is_whole = path.stat().st_size == manifest["bytes"] and names_path(path).exists()
        began = manifest_path(path).stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if is_same and is_whole and not changed_since(samples, began) else None


def _counts(rows: np.ndarray) -> dict:
    """For the manifest: how many samples, and what became of all images."""
    numbers = np.bincount(rows["case"], minlength=len(Case)).tolist()
    cases = {case.name.lower(): numbers[case] for case in Case if numbers[case]}
    counts = {name: cases.pop(name, 0) for name in ("passed_through", "raw", "bad")}
    counts["encoded"] = sum(cases.values())
    formats, numbers = np.unique(rows["source_format"][rows["case"] != Case.BAD], return_counts=True)
    return {
        "samples": len(rows) - counts["bad"],
        "counts": counts,
        "encoded_because": cases,
        "source_formats": {name.decode(): number for name, number in zip(formats, numbers.tolist())},
    }


def _report(split: Split, path: Path, manifest: dict, seconds: float, kept: bool) -> SplitReport:
    return SplitReport(
        split.name,
        path,
        manifest["samples"],
        len(split.classes),
        path.stat().st_size,
        manifest["counts"]["bad"],
        manifest["counts"]["passed_through"],
        seconds,
        kept,
    )


def _checked(sample: Sample, split: Split) -> Sample:
    if not 0 <= sample.label < len(split.classes):
        raise UserError(
            f"The builder gave {sample.name} the label {sample.label}, but the split "
            f"{split.name!r} has {len(split.classes)} classes: the builder needs mending."
        )
    return sample


def _bad_image(split: Split, index: int, reason: str) -> dict:
    name = _as_utf8(split.samples[index].name)
    return {"split": split.name, "name": name, "index": index, "reason": _as_utf8(reason)}


def _as_utf8(name: str) -> str:
    """A name with escapes for what is not UTF-8 in it: a file may have any name."""
    return name.encode("utf-8", "backslashreplace").decode()


def _strictly(bad: dict) -> UserError:
    return UserError(f"{bad['name']} is bad: {bad['reason']}; mend it or take it away, or leave out --strict.")


def _record_bad_images(path: Path, split: str, bad: list[dict]) -> None:
    """Put the bad images of a split into the list of all, one JSON object a line; none, no file."""
    try:
        entries = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        entries = [entry for entry in entries if entry["split"] != split]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or not ours
        entries = []
    entries += sorted(bad, key=lambda entry: entry["index"])
    if not entries:
        path.unlink(missing_ok=True)
        return
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_atomically(path, text)
