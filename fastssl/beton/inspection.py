"""What a .beton holds: inspect_beton gathers a Summary, summary_tables shows it.

Files of stock FFCV, which have neither manifest nor names, are looked into as far as they go.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastssl.beton.index_list import read_index_list
from fastssl.beton.partial_build import names_path
from fastssl.beton.read import BetonInfo, read_header, read_samples
from fastssl.common.terminal import pairs_table, printable

LISTED_CLASSES = 20  # with more classes the largest and the smallest ten are listed
LONGEST_BAR = 30  # characters
STORAGE = {"raw": "pixels", "jpg": "JPEG", "mixed": "some as pixels, some as JPEG"}


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
    return pairs_table(
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
        "source's formats": ", ".join(f"{name} {n:,}" for name, n in (manifest.get("source_formats") or {}).items())
        or None,
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
    return pairs_table("how it was built", {name: row for name, row in rows.items() if row is not None})


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
