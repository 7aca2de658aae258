"""Look into a .beton: what it holds, whether all of it is sound, and some of its images.

inspect_beton gathers a Summary and summary_tables shows it; verify decodes every image and compares
it with the checksums that the build left in the manifest; draw_sheet draws some images.
Files of stock FFCV, which have neither manifest nor names, are looked into as far as they go.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastssl.recipe import UserError

from . import jpeg
from .atomic import write_atomically
from .build import settle_workers
from .format import FIELD, HEADER, RAW
from .index_list import read_index_list
from .pool import worker_pool
from .progress import progress
from .read import BetonInfo, read_header, read_samples
from .unfinished import manifest_path, names_path

# --- what it holds ------------------------------------------------------------------------------


class ClassCounts(NamedTuple):
    """The classes in the order of their labels, and the samples of each, int64 (classes,)."""

    names: list[str]
    samples: np.ndarray


class Summary(NamedTuple):
    """What a file holds. Columns have one value a sample, in the order of the file.

    `sides` maps "stored height", "stored width", and where the file has the columns "source
    height" and "source width" to px; `image_bytes` are those stored. `classes` is None where the
    file has no integer field 'label'.
    """

    info: BetonInfo
    file_bytes: int
    sides: dict[str, np.ndarray]
    image_bytes: np.ndarray
    classes: ClassCounts | None
    has_names: bool


def inspect_beton(path: str | Path) -> Summary:
    """Read all that a .beton says about itself; no image is decoded."""
    info = read_header(path)
    metadata, image_bytes = read_samples(path)
    sides = {f"stored {side}": metadata["image"][side] for side in ("height", "width")}
    for side in ("height", "width"):
        if info.fields.get(side) == "IntField":
            sides[f"source {side}"] = metadata[side]
    return Summary(
        info=info,
        file_bytes=info.path.stat().st_size,
        sides=sides,
        image_bytes=image_bytes,
        classes=_count_classes(info, metadata),
        has_names=names_path(info.path).exists(),
    )


def subset_table(path: str | Path, list_path: str | Path) -> Table:
    """How many images of the file a list names (see index_list.py), and of which classes."""
    listed = read_index_list(path, list_path)
    info = read_header(path)
    metadata, _ = read_samples(path)
    chosen = metadata[np.isin(metadata["index"], listed)]
    share = len(listed) / info.num_samples
    title = f"{list_path} names {len(listed):,} of {info.num_samples:,} images, {share:.2%}"
    classes = _count_classes(info, chosen)
    return _classes_table(title, classes) if classes else _table(title, "")


def _count_classes(info: BetonInfo, metadata: np.ndarray) -> ClassCounts | None:
    if info.fields.get("label") != "IntField":
        return None
    labels, samples = np.unique(metadata["label"], return_counts=True)
    known = info.classes or []
    if known and labels.min() >= 0 and labels.max() < len(known):
        samples = np.bincount(metadata["label"], minlength=len(known))  # classes may be empty
        return ClassCounts([str(name) for name in known], samples)
    return ClassCounts([str(label) for label in labels], samples)


# --- as tables ----------------------------------------------------------------------------------

LISTED_CLASSES = 20  # with more classes the largest and the smallest ten are listed
LONGEST_BAR = 30  # characters
STORAGE = {"raw": "pixels", "jpg": "JPEG", "mixed": "some as pixels, some as JPEG"}


def summary_tables(summary: Summary) -> Group:
    """A Summary for the terminal."""
    tables = [_file_table(summary), _sizes_table(summary)]
    if summary.info.manifest:
        tables.append(_build_table(summary.info.manifest))
    if summary.classes:
        tables.append(_classes_table("what it shows", summary.classes))
    return Group(*(Padding(table, (0, 0, 1, 0)) for table in tables))


def _file_table(summary: Summary) -> Table:
    info, files = summary.info, summary.info.path.name
    has_checksums = bool(info.manifest and info.manifest.get("checksums"))
    if info.resolution:
        resolution = "{} x {} px, all images (height x width)".format(*info.resolution)
    else:
        resolution = "up to {} x {} px (height x width)".format(*info.max_resolution)
    without = "none, as of files that stock FFCV or an older version built"
    return _pairs(
        str(info.path),
        {
            "samples": f"{info.num_samples:,}",
            "size": f"{summary.file_bytes / 1e6:,.1f} MB",
            "fields": ", ".join(f"{name} ({kind})" for name, kind in info.fields.items()),
            "layout": info.layout,
            "images as": STORAGE[info.storage],
            "resolution": resolution,
            "manifest": f"{files}.json" if info.manifest else without,
            "checksums": "of every sample" if has_checksums else without,
            "names": f"{files}.names.txt" if summary.has_names else without,
        },
    )


def _sizes_table(summary: Summary) -> Table:
    """Quantiles of the bytes of an image and of the sides, if these differ."""
    columns = {"bytes an image": summary.image_bytes}
    columns |= {f"{name}, px": side for name, side in summary.sides.items()}
    if summary.info.resolution:
        columns = {name: column for name, column in columns.items() if "stored" not in name}
    table = _table("sizes", "", "min", "25 %", "median", "mean", "75 %", "95 %", "max")
    for name, column in columns.items():
        low, quarter, half, three, most, high = np.quantile(column, (0, 0.25, 0.5, 0.75, 0.95, 1))
        figures = (low, quarter, half, column.mean(), three, most, high)
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures))
    return table


def _build_table(manifest: dict) -> Table:
    """How it was built and what became of the images; shows what the manifest has."""
    order = manifest.get("order")
    if isinstance(order, dict):
        order = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in order.items())
    rows = {
        "builder": manifest.get("builder"),
        "source": manifest.get("source"),
        "canvas": _with_unit(manifest.get("canvas"), "px"),
        "largest side": _with_unit(manifest.get("max_side"), "px"),
        "JPEG quality": manifest.get("quality"),
        "order": order,
        "limit": _with_unit(manifest.get("limit"), "images"),
        "fastssl": manifest.get("fastssl"),
        "Pillow": manifest.get("pillow"),
    }
    counts, because = manifest.get("counts") or {}, manifest.get("encoded_because") or {}
    reasons = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in because.items())
    for name, what in (
        ("passed_through", "own bytes kept"),
        ("encoded", "encoded anew"),
        ("raw", "as pixels"),
        ("bad", "bad, left out"),
    ):
        if counts.get(name):
            why = f" ({reasons})" if name == "encoded" and reasons else ""
            rows[what] = f"{counts[name]:,} images{why}"
    return _pairs("how it was built", {name: row for name, row in rows.items() if row is not None})


def _with_unit(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value} {unit}"


def _classes_table(title: str, classes: ClassCounts) -> Table:
    """A bar for each class; of many the largest and smallest, with the others in one line."""
    samples = classes.samples
    figures = f"min {samples.min():,}, median {np.median(samples):,.0f}, max {samples.max():,}"
    title += f"\n{len(samples):,} {'class' if len(samples) == 1 else 'classes'}, samples of each: {figures}"
    table = _table(title, "class", "samples")
    table.add_column("", justify="left")

    def add(places: np.ndarray) -> None:
        for place in places:
            bar = "█" * max(1, round(LONGEST_BAR * samples[place] / samples.max()))
            name = Text(printable(classes.names[place]))  # as Text, ":cat:" stays what it is
            table.add_row(name, f"{samples[place]:,}", bar if samples[place] else "")

    if len(samples) <= LISTED_CLASSES:
        add(np.arange(len(samples)))
        return table
    by_size = np.argsort(-samples, kind="stable")
    half = LISTED_CLASSES // 2
    add(by_size[:half])
    between = samples[by_size[half:-half]]
    table.add_row(f"… {len(between):,} more", f"{between[-1]:,} to {between[0]:,}", "", style="dim")
    add(by_size[-half:])
    return table


def _table(title: str, first: str, *figures: str) -> Table:
    width = max(map(len, title.split("\n")))  # rich would break the title at the table's width
    table = Table(title=Text(title), title_justify="left", box=None, min_width=width)
    table.add_column(first)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _pairs(title: str, rows: dict[str, object]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(str(value))))
    return table


def printable(name: str) -> str:
    """A name as it can be shown: control characters and broken UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# --- whether it is sound ------------------------------------------------------------------------

CHECKED_AT_ONCE = 256  # samples handed to a worker: little to send, and progress that moves


class Fault(NamedTuple):
    """A sample that is not as it was written. `name` is "" where names or indices are missing."""

    position: int  # in the file
    index: int | None
    name: str
    what: str

    def __str__(self) -> str:
        index = "" if self.index is None else f", index {self.index}"
        name = f", {printable(self.name)}" if self.name else ""
        return f"sample {self.position}{index}{name}: {self.what}"


class Verification(NamedTuple):
    """What `verify` found. Without checksums `is_table_sound` is True: nothing speaks against it."""

    path: Path
    samples: int
    has_checksums: bool
    is_table_sound: bool
    faults: list[Fault]

    def lines(self) -> Iterator[str]:
        """What was found, a line each."""
        if not self.is_table_sound:
            yield "metadata table: does not match its checksum; labels, indices or sizes are wrong"
        yield from map(str, self.faults)
        if not self.has_checksums:
            yield (
                f"There are no checksums for {self.path}: stock FFCV or an older version built it. "
                "Decoding alone does not see a pixel that has changed."
            )

    def verdict(self) -> str:
        """That all is well in one sentence; UserError where it is not."""
        if self.faults or not self.is_table_sound:
            bad = [] if self.is_table_sound else ["its metadata table"]
            bad += [f"{len(self.faults):,} of {self.samples:,} samples"] if self.faults else []
            raise UserError(
                f"{self.path} is damaged: {' and '.join(bad)}; copy it again from where it was "
                "sound, or delete it and build it again."
            )
        matching = " and match their checksums" if self.has_checksums else ""
        return f"All {self.samples:,} samples decode{matching}."


class _Checksums(NamedTuple):
    metadata: int
    samples: np.ndarray  # uint32 (samples,)


def verify(path: str | Path, workers: int | None = None) -> Verification:
    """Decode every image with the loader's decoder and compare all bytes with their checksums.

    A worker process for each core unless `workers` says otherwise. Memory does not grow with the
    images; of each sample some 100 bytes of metadata are held.
    """
    info = read_header(path)
    checksums = _read_checksums(info)
    metadata, image_bytes = read_samples(path)
    image = metadata["image"]
    is_table_sound = checksums is None or checksums.metadata == _table_crc32(info, metadata.nbytes)

    def task(start: int) -> tuple:
        chunk = slice(start, start + CHECKED_AT_ONCE)
        columns = [image[name][chunk] for name in ("data_ptr", "mode", "height", "width")]
        expected = checksums.samples[chunk] if checksums else None
        return info.path, start, image_bytes[chunk], *columns, expected

    found: list[tuple[int, str]] = []
    tasks = (task(start) for start in range(0, len(image), CHECKED_AT_ONCE))
    with (
        worker_pool(settle_workers(workers)) as pool,
        progress("verifying", len(image)) as advance,
    ):
        for count, size, faults in pool.in_order(_check_chunk, tasks):
            found += faults
            advance(count, size)

    positions = [position for position, _ in found]
    indices = metadata["index"][positions] if info.fields.get("index") == "IntField" else None
    names = _names_of(info.path, [] if indices is None else indices)
    faults = []
    for number, (position, what) in enumerate(found):
        index = None if indices is None else int(indices[number])
        faults.append(Fault(position, index, names.get(index, ""), what))
    return Verification(info.path, len(image), checksums is not None, is_table_sound, faults)


def _read_checksums(info: BetonInfo) -> _Checksums | None:
    """Those of the manifest, None where it has none."""
    checksums = (info.manifest or {}).get("checksums")
    if checksums is None:
        return None
    try:
        if checksums["algorithm"] != "crc32":
            raise ValueError
        metadata, samples = (_from_hex(checksums[name]) for name in ("metadata", "samples"))
        if (len(metadata), len(samples)) != (1, info.num_samples):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The checksums in {manifest_path(info.path)} are damaged: they must be crc32, 8 hex "
            f"digits for each of {info.num_samples:,} samples; take 'checksums' out of it to "
            "verify by decoding alone, or build the file again."
        ) from error
    return _Checksums(int(metadata[0]), samples)


def _from_hex(text: str) -> np.ndarray:
    """8 hex digits a number, nothing between them; uint32."""
    content = bytes.fromhex(text)
    if len(text) != 2 * len(content):  # fromhex passes over blanks
        raise ValueError
    return np.frombuffer(content, ">u4").astype(np.uint32)


def _table_crc32(info: BetonInfo, size: int) -> int:
    """Of the metadata table's bytes as they are in the file."""
    with open(info.path, "rb") as file:
        file.seek(HEADER.itemsize + len(info.fields) * FIELD.itemsize)
        return zlib.crc32(file.read(size))


def _check_chunk(
    path: Path,
    first: int,
    sizes: np.ndarray,
    starts: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    checksums: np.ndarray | None,
) -> tuple[int, int, list[tuple[int, str]]]:
    """Check the samples from position `first` on; all arrays (samples,), sizes in bytes.

    Gives their number, their bytes, and for each bad one its position and what is wrong. A worker
    process runs this; it reads one sample at a time.
    """
    faults = []
    with open(path, "rb", buffering=0) as file:
        for number, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist())):
            try:
                content = os.pread(file.fileno(), size, start)
            except OSError as error:  # the disk, not the file
                faults.append((first + number, f"cannot be read: {error.strerror}"))
                continue
            wrong = _decoding_fault(content, size, int(modes[number]), int(heights[number]), int(widths[number]))
            if checksums is not None and zlib.crc32(content) != checksums[number]:
                wrong = "does not match its checksum" + (f", and {wrong}" if wrong else ", but decodes")
            if wrong:
                faults.append((first + number, wrong))
    return len(sizes), int(sizes.sum()), faults


def _decoding_fault(content: bytes, size: int, mode: int, height: int, width: int) -> str:
    """What is wrong with an image as stored, "" where nothing is; sides in px as in the metadata."""
    if len(content) != size:
        return "the file ends within it"
    if mode == RAW:
        return "" if size == 3 * height * width else f"{size:,} bytes are not {height} x {width} pixels"
    try:
        stated = jpeg.read_size(content)
        if stated != (height, width):  # before decoding: a damaged header may state any size
            return "is {} x {} px, by its metadata {} x {} px".format(*stated, height, width)
        warning = jpeg.check(content)
    except ValueError as error:
        return f"does not decode: {error}"
    return f"decodes with a warning: {warning}" if warning else ""


def _names_of(path: Path, indices: np.ndarray | list) -> dict[int, str]:
    """The names of some images, by their index; {} without X.beton.names.txt."""
    wanted = {int(index) for index in indices}
    if not wanted or not names_path(path).exists():
        return {}
    with open(names_path(path), "rb") as file:
        return {
            index: line.removesuffix(b"\n").decode("utf-8", "surrogateescape")
            for index, line in enumerate(file)
            if index in wanted
        }


# --- what it looks like -------------------------------------------------------------------------

SHOWN = 40  # samples
COLUMNS = 8
SEED = 0
THUMBNAIL = 160  # px; the longer side of a thumbnail
GAP = 14  # px, around everything
LINE = 18  # px from one line of text to the next
PAGE, GREY, PALE = (240, 240, 240), (100, 100, 100), (230, 180, 180)


def draw_sheet(path: str | Path, sheet: str | Path) -> int:
    """Draw random samples, always the same, with class and index, into a PNG; returns how many."""
    sheet = Path(sheet)
    if sheet.suffix.lower() != ".png":
        raise UserError(f"The sheet is a PNG, but {sheet} does not end in .png: name it so.")
    info = read_header(path)
    metadata, image_bytes = read_samples(path)
    count = min(SHOWN, info.num_samples)
    positions = np.sort(np.random.default_rng(SEED).permutation(info.num_samples)[:count])
    columns = min(COLUMNS, count)
    cell_width, cell_height = THUMBNAIL + GAP, THUMBNAIL + 2 * LINE + GAP
    first_row = GAP + LINE + GAP
    width, height = GAP + columns * cell_width, first_row + -(-count // columns) * cell_height
    picture = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(picture)
    which = f"{count} of {info.num_samples:,} samples, drawn at random"
    title = f"{info.path.name}: {which if count < info.num_samples else f'all {count} samples'}"
    draw.text((GAP, GAP), _cut(title, width - 2 * GAP), "black", _font())

    with open(info.path, "rb") as file:
        for place, position in enumerate(positions):
            row, left = metadata[position], GAP + place % columns * cell_width
            top = first_row + place // columns * cell_height
            file.seek(int(row["image"]["data_ptr"]))
            try:
                thumbnail = _thumbnail(file.read(int(image_bytes[position])), row["image"])
            except (ValueError, OSError) as error:
                thumbnail = _crossed_box(f"does not decode: {error}")
            above = THUMBNAIL - thumbnail.height  # an image stands on its caption
            picture.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + above))
            for line, (text, colour) in enumerate(zip(_caption(info, row, position), ("black", GREY))):
                text = _cut(text, THUMBNAIL)
                middle = left + (THUMBNAIL - _font().getlength(text)) // 2
                draw.text((middle, top + THUMBNAIL + 2 + line * LINE), text, colour, _font())
    try:
        write_atomically(sheet, lambda beside: picture.save(beside, "PNG"))
    except OSError as error:
        raise UserError(f"Cannot write {sheet}: {error.strerror}; name another --sheet.") from error
    return count


def _thumbnail(content: bytes, image: np.void) -> Image.Image:
    """A stored image (a row of format.IMAGE), its longer side at most THUMBNAIL px."""
    if image["mode"] == RAW:
        pixels = np.frombuffer(content, np.uint8).reshape(image["height"], image["width"], 3)
    else:
        # A large one is shrunk as it is decoded, but not below twice of what is shown.
        longer = max(jpeg.read_size(content))
        shrink = next((s for s in (8, 4, 2) if longer >= 2 * THUMBNAIL * s), 1)
        pixels = jpeg.decode(content, shrink).pixels
    thumbnail = Image.fromarray(pixels)
    # A small one is enlarged by a whole number, so that its pixels are seen as they are.
    factor = max(1, THUMBNAIL // max(thumbnail.size))
    size = (thumbnail.width * factor, thumbnail.height * factor)
    thumbnail = thumbnail.resize(size, Image.Resampling.NEAREST)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return thumbnail


def _crossed_box(reason: str) -> Image.Image:
    box = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    draw, last = ImageDraw.Draw(box), THUMBNAIL - 1
    draw.line((0, 0, last, last), PALE, 3)
    draw.line((0, last, last, 0), PALE, 3)
    draw.rectangle((0, 0, last, last), outline=GREY)
    lines = [""]
    for word in printable(reason).split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= THUMBNAIL - GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    for line, text in enumerate(lines[: THUMBNAIL // LINE - 1]):
        draw.text((GAP // 2, GAP // 2 + line * LINE), _cut(text, THUMBNAIL - GAP), "black", _font())
    return box


def _caption(info: BetonInfo, row: np.void, position: int) -> tuple[str, str]:
    """The class and the index of a sample; without an index its position in the file."""
    label = int(row["label"]) if info.fields.get("label") == "IntField" else None
    is_named = label is not None and 0 <= label < len(info.classes or [])
    if is_named:
        name = printable(str(info.classes[label]))
    else:
        name = "no label" if label is None else f"label {label}"
    has_index = info.fields.get("index") == "IntField"
    return name, f"index {row['index']}" if has_index else f"sample {position}"


def _cut(text: str, width: float) -> str:
    """The text, cut to so many px."""
    if _font().getlength(text) <= width:
        return text
    text = text[:200]  # no more fits in any case, and what follows tries one length after the other
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
