"""The tables of `fastssl inspect`: what a .beton contains and how it was built.

Files of stock FFCV have neither manifest nor names: their tables show what the file itself tells.
"""

from pathlib import Path

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastssl.beton.format import RGB, UNLABELLED, Manifest, manifest_path
from fastssl.beton.index_list import read_index_list
from fastssl.beton.read import BetonInfo, has_names, names_file, read_header
from fastssl.beton.shards import is_set, set_manifest_path
from fastssl.beton.tables import Tables
from fastssl.common.terminal import count_of, pairs_table, printable, size_in_words

MOST_CLASSES = 20  # with more classes only the largest ten and the smallest ten are shown
LONGEST_BAR = 30  # characters
STORAGE = {"raw": "pixels", "jpg": "JPEG", "bc4": "BC4 blocks", "mixed": "some as pixels, some as JPEG"}
OUTCOMES = {  # key of the manifest's "counts" -> name of the row
    "passed_through": "stored unchanged",
    "encoded": "encoded again",
    "raw": "stored as pixels",
    "bad": "bad, skipped",
}


def inspect_beton(path: str | Path) -> Group:
    """Return tables of a file's fields, sizes and classes, and of how it was built. No image is decoded."""
    info = read_header(path)
    tables = [_file_table(info)]
    if isinstance(info.tables, Tables):
        tables.append(_sizes_table(info, info.tables.metadata, info.tables.image_bytes))
    if info.manifest:
        tables.append(_build_table(info.manifest))
    if not isinstance(info.tables, Tables):
        tables.append(
            _table("Sizes and classes are not shown: the tables of so many samples are read in pieces only.", "")
        )
    elif info.fields.get("label") == "IntField":
        tables.append(_classes_table("classes", info.tables.metadata["label"], info.classes or []))
    return Group(*(Padding(table, (0, 0, 1, 0)) for table in tables))


def subset_table(path: str | Path, list_path: str | Path) -> Table:
    """Return a table of the images that a list names (see index_list.py), counted by class."""
    listed = read_index_list(path, list_path)
    info = read_header(path)
    share = f"{len(listed):,} of {info.num_samples:,} images, {len(listed) / info.num_samples:.2%}"
    title = f"{printable(str(list_path))} names {share}"
    if info.fields.get("label") != "IntField":
        return _table(title, "")
    if isinstance(info.tables, Tables):
        metadata = info.tables.metadata
        label_L = metadata["label"][np.isin(metadata["index"], listed)]
    else:
        pieces = zip(info.tables.pieces_of("label"), info.tables.pieces_of("index"))
        label_L = np.concatenate([label_n[np.isin(index_n, listed)] for label_n, index_n in pieces])
    return _classes_table(title, label_L, info.classes or [])


def _file_table(info: BetonInfo) -> Table:
    # The manifest of a set has one checksum for each file.
    has_checksums = bool((info.manifest or {}).get("files" if is_set(info.path) else "checksums"))
    height, width = info.max_resolution
    shards = len(info.parts) if is_set(info.path) else 0
    each = "of each shard" if shards else ""
    none = "none: built by stock FFCV or an older version"
    return pairs_table(
        str(info.path),
        {
            "samples": f"{info.num_samples:,}",
            "size": size_in_words(info.file_bytes) + (f" in {count_of(shards, 'shard')}" if shards else ""),
            "fields": ", ".join(f"{name} ({kind})" for name, kind in info.fields.items()),
            "layout": info.layout,
            "images stored as": STORAGE[info.storage],
            **({"channels": str(info.channels)} if info.channels != RGB else {}),
            "height x width": f"{height} x {width} px" + (", all images" if info.resolution else " at most"),
            "manifest": _manifest_of(info) if info.manifest else none,
            "checksums": "for every sample" if has_checksums else none,
            "names": (each or names_file(info.path).name) if has_names(info.path) else none,
        },
    )


def _manifest_of(info: BetonInfo) -> str:
    if not is_set(info.path):
        return manifest_path(info.path).name
    of_set = set_manifest_path(info.path)
    return of_set.name if of_set.exists() else "of each shard"


def _sizes_table(info: BetonInfo, metadata: np.ndarray, image_bytes: np.ndarray) -> Table:
    """Quantiles of the bytes per image, the stored sides (if they differ) and the source's sides (if known)."""
    columns = {"bytes per image": image_bytes}
    for side in ("height", "width"):
        if not info.resolution:
            columns[f"stored {side}, px"] = metadata["image"][side]
        if info.fields.get(side) == "IntField":
            columns[f"source {side}, px"] = metadata[side]
    table = _table("sizes", "", "min", "25 %", "median", "mean", "75 %", "95 %", "max")
    for name, column in columns.items():
        low, quarter, median, three_quarters, most, high = np.quantile(column, (0, 0.25, 0.5, 0.75, 0.95, 1))
        values = (low, quarter, median, column.mean(), three_quarters, most, high)
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    return table


def _build_table(manifest: Manifest) -> Table:
    """How the file was built and what happened to the images, as far as the manifest tells."""
    order = manifest.get("order")
    rows = {
        "builder": manifest.get("builder"),
        "source": manifest.get("source"),
        "source formats": _counts(manifest.get("source_formats")),
        "canvas, px": manifest.get("canvas"),
        "largest side, px": manifest.get("max_side"),
        "JPEG quality": manifest.get("quality"),
        "range": manifest.get("range"),
        "order": _counts(order) if isinstance(order, dict) else order,
        "limit, images": manifest.get("limit"),
        "fastssl": manifest.get("fastssl"),
        "Pillow": manifest.get("pillow"),
    }
    nearly_black = manifest.get("nearly_black") or 0
    rows["nearly black"] = nearly_black and f"{nearly_black:,} images: no value is above 1/8 of the range"
    for key, count in (manifest.get("counts") or {}).items():
        reasons = _counts(manifest.get("encoded_because")) if key == "encoded" else None
        rows[OUTCOMES.get(key, key)] = count and f"{count:,} images" + (f" ({reasons})" if reasons else "")
    return pairs_table("how it was built", {name: value for name, value in rows.items() if value})


def _counts(counts: dict[str, int] | None) -> str | None:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in (counts or {}).items()) or None


def _classes_table(title: str, label_N: np.ndarray, classes: list[str]) -> Table:
    """A bar for each class, in the order of the labels, or for the largest and smallest classes if there are many."""
    unlabelled = int((label_N == UNLABELLED).sum())
    if unlabelled == len(label_N):
        return _table(f"{title}\nnone of the {unlabelled:,} images has a label", "")
    label_N = label_N[label_N != UNLABELLED]
    labels, samples = np.unique(label_N, return_counts=True)
    names = [str(label) for label in labels]
    if classes and labels.min() >= 0 and labels.max() < len(classes):
        names = [printable(str(name)) for name in classes]
        samples = np.bincount(label_N, minlength=len(classes))  # classes may have no samples
    values = f"min {samples.min():,}, median {np.median(samples):,.0f}, max {samples.max():,}"
    noun = "class" if len(samples) == 1 else "classes"
    without = f"; {unlabelled:,} without a label" if unlabelled else ""
    table = _table(f"{title}\n{len(samples):,} {noun}, samples per class: {values}{without}", "class", "samples")
    table.add_column("", justify="left")

    def add(labels: np.ndarray) -> None:
        for label in labels:
            bar = "█" * max(1, round(LONGEST_BAR * samples[label] / samples.max())) if samples[label] else ""
            table.add_row(Text(names[label]), f"{samples[label]:,}", bar)  # Text: a name such as ":cat:" is no markup

    if len(samples) <= MOST_CLASSES:
        add(np.arange(len(samples)))
        return table
    by_size = np.argsort(-samples, kind="stable")
    half = MOST_CLASSES // 2
    add(by_size[:half])
    between = samples[by_size[half:-half]]
    table.add_row(f"… {len(between):,} more", f"{between[-1]:,} to {between[0]:,}", "", style="dim")
    add(by_size[-half:])
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    width = max(map(len, title.split("\n")))  # rich would break the title at the table's width
    table = Table(title=Text(title), title_justify="left", box=None, min_width=width)
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table
