"""Build one .beton file, which is a split or a shard of it, unless it is up to date.

The same source and options give the same bytes, whatever the number of workers and however often the build was stopped.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastssl.beton.format import UNLABELLED, Manifest, indexed_names_path, manifest_path, names_path
from fastssl.beton.images import Case, StoragePlan, is_much_enlarged
from fastssl.beton.partial_build import BadImage, PartialBuild, partial_folder
from fastssl.beton.pool import DIED, NO_MEMORY, WORKER_DIED, Pool, WrittenChunk
from fastssl.beton.reading import MISSING
from fastssl.beton.shards import Shard
from fastssl.beton.source import ImageSource, Sample, SourceSplit, as_utf8, changed_since
from fastssl.common.errors import UserError, quote
from fastssl.common.files import read_text, write_atomically
from fastssl.common.terminal import console, listed, print_line, progress

LARGEST_LIST = 1 << 30  # bytes of bad_images.jsonl; a million bad images take 0.1 GB
MOST_NAMED = 5  # images of which workers have died
MOST_BLACK_NAMED = 20  # nearly black images


class SplitReport(NamedTuple):
    """The result of building one split, or one shard of it."""

    split: str
    path: Path  # of shards, the pattern that names them all
    samples: int
    classes: list[str]  # their names
    bytes: int
    bad: int  # images that were skipped
    bad_images: Path  # the list of them; of shards, a pattern
    unlabelled: int  # of the samples: images without a label, stored with -1
    nearly_black: int  # of the samples: no stored value is above 1/8 of the range; JPEGs stored unchanged do not count
    nearly_black_names: list[str]  # of the first of them
    enlarged: int  # of the samples: images whose sides are less than half of the canvas's
    empty_classes: list[str]  # names of classes without images in the source
    up_to_date: bool  # nothing was done: the file had been built from the same images with the same options


@dataclass(frozen=True)
class FileBuild:
    """A file to build: what goes into it, and how."""

    path: Path
    split: SourceSplit  # `order` names the images of this file
    shard: Shard | None  # None: the file is the whole split
    plan: StoragePlan
    key: dict[str, Any]  # options and images, as the manifest holds them: all that the file depends on
    strict: bool  # stop at the first bad image

    @property
    def names_file(self) -> Path:
        """Where the names of the images go; of a shard, with their indices, as it holds some only."""
        return indexed_names_path(self.path) if self.shard else names_path(self.path)

    @property
    def bad_images(self) -> Path:
        """The list of bad images; of a shard it is its own, as other processes build other shards."""
        return self.path.parent / f"bad_images{self.shard.suffix if self.shard else ''}.jsonl"

    def run(self, pool: Pool) -> SplitReport:
        """Build the file, or resume its build, unless it is up to date."""
        path = self.path
        if os.path.lexists(path) and not manifest_path(path).exists() and not partial_folder(path).exists():
            raise UserError(
                f"{path} exists without a manifest, so it may not be of build-beton",
                hint="move it, or use another --out",
            )
        old = self.read_if_up_to_date()
        if old is None:
            self._say_what_is_replaced()
        manifest = old or self._build(pool)
        return SplitReport(
            self.split.name,
            path,
            samples=manifest["samples"],
            classes=self.split.classes,
            bytes=path.stat().st_size,
            bad=manifest["counts"]["bad"],
            bad_images=self.bad_images,
            unlabelled=manifest.get("unlabelled", 0),
            nearly_black=manifest.get("nearly_black", 0),
            nearly_black_names=manifest.get("nearly_black_names", []),
            enlarged=manifest.get("enlarged", 0),
            empty_classes=self.split.empty_classes,
            up_to_date=old is not None,
        )

    def read_if_up_to_date(self) -> Manifest | None:
        """Return the manifest of the file if a build would give the same file."""
        from fastssl.beton.manifest import read_manifest

        path, split = self.path, self.split
        # Another machine may have the source of a shard elsewhere: see `_refuse_other_source`.
        ignored = ("source", "spot_check") if self.shard else ()
        compared = {name: value for name, value in self.key.items() if name not in ignored}
        try:
            manifest = read_manifest(path, len(split.samples))
            is_same = all(manifest[name] == value for name, value in compared.items())
            is_complete = path.stat().st_size == manifest["bytes"] and self.names_file.is_file()
            # `finish` sets this to the time at which the build was started.
            started = manifest_path(path).stat().st_mtime_ns
            missing = set(manifest.get("missing", ()))
            is_complete &= "bad" in manifest["counts"]
        except (OSError, ValueError, KeyError):
            return None
        if not (is_same and is_complete):
            return None
        self._refuse_other_source(manifest)
        # Sorted: samples of one archive follow each other. Images outside of --limit do not matter.
        return None if changed_since(split.samples, np.sort(split.order).tolist(), started, missing) else manifest

    def _refuse_other_source(self, manifest: Manifest) -> None:
        """Raise UserError for a shard of another data set whose images have the same names and labels."""
        before, now = manifest.get("source"), self.key["source"]
        if self.shard and before != now and manifest.get("spot_check") != self.key["spot_check"]:
            raise UserError(
                f"{self.path} is built from {quote(before)}, and --source {now} holds other images with the same names",
                hint="use another --out, or delete the shards of the other source",
            )

    def _say_what_is_replaced(self) -> None:
        """Print how the file of an earlier build is stored, and how the new one: before the work, while it exists."""
        from fastssl.beton.manifest import read_manifest

        try:
            before = _stored_as(read_manifest(self.path, len(self.split.samples)))
        except (OSError, ValueError, KeyError, TypeError):
            return  # there is none, or its manifest says nothing
        now = _stored_as(self.key)
        what = f" with {now}" if before != now else ", whose images or other options have changed"
        print_line(console(stderr=True), f"Replaces {self.path} ({before}){what}.")

    def _build(self, pool: Pool) -> Manifest:
        """Build the file, or resume its build, and return its manifest."""
        split = self.split
        key = {"fastssl": version("fastssl-trainer"), "pillow": version("pillow"), **self.key}
        with PartialBuild(self.path, key, capacity=len(split.order)) as partial:
            missing = {image.index for image in partial.bad if image.reason == MISSING}
            is_of_split = np.array_equal(partial.rows["index"], split.order[: len(partial.rows)])
            if not is_of_split or changed_since(
                split.samples, np.sort(partial.rows["index"]).tolist(), partial.started, missing
            ):
                partial.restart()
            self._encode_images(partial, pool)
            _list_bad_images(self.bad_images, split.name, partial.bad)
            if not len(partial.good):
                what = f"the shard {self.path.stem}" if self.shard else f"the split {split.name!r}"
                fewer = ", or use fewer --shards" if self.shard else ""
                reason = partial.bad[0].reason
                raise UserError(
                    f"None of the {len(partial.bad)} images of {what} could be read (the first: {reason})",
                    hint=f"read {self.bad_images}, which lists them all with the reason{fewer}",
                )
            manifest = {**key, **_counts(partial.rows)}
            nearly_black = np.sort(partial.rows["index"][partial.rows["is_nearly_black"]])[:MOST_BLACK_NAMED]
            manifest["nearly_black_names"] = [as_utf8(split.samples[index].name) for index in nearly_black.tolist()]
            not_found = sorted(image.index for image in partial.bad if image.reason == MISSING)
            if not_found:
                manifest["missing"] = not_found
            partial.finish(manifest, self.names_file, self._lines_of_names())
        return manifest

    def _lines_of_names(self) -> Iterator[str]:
        if self.shard is None:
            return (sample.name for sample in self.split.samples)
        return (f"{index}\t{self.split.samples[index].name}" for index in np.sort(self.split.order).tolist())

    def _encode_images(self, partial: PartialBuild, pool: Pool) -> None:
        """Encode and write the images that have not been processed yet, without those of which a worker dies."""
        split, plan = self.split, self.plan
        self._refuse_bad_images(partial.bad)
        total = len(split.order)
        with progress(self.path.stem, total, done=len(partial.rows)) as advance:

            def images(end: int) -> Iterator[ImageSource]:
                for index in split.order[len(partial.rows) : end]:
                    yield _check_label(split.samples[index], split).image

            def record(written: Iterable[WrittenChunk]) -> None:
                for rows, reasons in written:
                    self._record(partial, rows, reasons)
                    advance(len(rows), int(rows["size"].sum()))

            while (done := len(partial.rows)) < total:
                try:
                    record(pool.write_encoded(partial.pages, partial.position, images(total), plan))
                except WORKER_DIED:
                    begun = min(done + pool.count_begun(), total)
                    bad_before = len(partial.bad)
                    record(pool.write_one_by_one(partial.pages, partial.position, images(begun), plan))
                    _say_what_died(split.name, partial.bad[bad_before:])

    def _record(self, partial: PartialBuild, rows: np.ndarray, reasons: list[str]) -> None:
        """Add the next images, which have been written, to the partial build."""
        split = self.split
        done = len(partial.rows)
        rows["index"] = split.order[done : done + len(rows)]
        rows["label"] = [split.samples[index].label for index in rows["index"]]
        bad_indices = rows["index"][rows["case"] == Case.BAD].tolist()
        bad = [
            BadImage(split.name, as_utf8(split.samples[index].name), index, as_utf8(reason))
            for index, reason in zip(bad_indices, reasons, strict=True)
        ]
        self._refuse_bad_images(bad)
        partial.add(rows, bad)

    def _refuse_bad_images(self, bad: list[BadImage]) -> None:
        if self.strict and bad:
            raise UserError(f"{bad[0].name} is bad: {bad[0].reason}", hint="repair or remove it, or leave out --strict")


def _check_label(sample: Sample, split: SourceSplit) -> Sample:
    if sample.label != UNLABELLED and not 0 <= sample.label < len(split.classes):
        raise UserError(
            f"The builder gave {sample.name} the label {sample.label}, but the split {split.name!r} has "
            f"{len(split.classes)} classes",
            hint="correct the builder's file",
        )
    return sample


def _say_what_died(split: str, bad: list[BadImage]) -> None:
    """Say of which of the new bad images a worker process has died; if of none, what else it may have been."""
    names = [image.name for image in bad if image.reason in (DIED, NO_MEMORY)]
    named = listed(names[:MOST_NAMED], len(names))
    no_image = "but of no image: perhaps there are too many --workers (dmesg tells what the kernel kills)"
    line = f"{split}: a worker process died or had too little memory, {f'of {named}' if names else no_image}."
    print_line(console(stderr=True), line)


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
    is_enlarged = is_much_enlarged(rows["source_width"], rows["source_height"], rows["width"])
    return {
        "samples": len(rows) - counts["bad"],
        "unlabelled": int(((rows["label"] == UNLABELLED) & (rows["case"] != Case.BAD)).sum()),
        "nearly_black": int(rows["is_nearly_black"].sum()),
        "enlarged": int(is_enlarged.sum()),
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
