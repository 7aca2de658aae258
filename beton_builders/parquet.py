"""Parquet files of images, as Hugging Face's datasets store them; needs the package pyarrow.

    SOURCE/**/*.parquet   or SOURCE is one such file. A word of its name, train, val, validation or test, gives the
                          split: data/train-00000-of-00010.parquet. Without one it is train.
    its image column      binary, or a struct with the bytes of the image file, as Hugging Face writes it; of several
                          the one named image or img
    its label column      whole numbers from 0, named label, labels or fine_label, or the one that Hugging Face's
                          metadata in the file calls a ClassLabel; without one, or if all are -1 (hidden), there is one
                          class, unlabelled

Class names come from Hugging Face's metadata in the file; without it they are the numbers.

Images are stored in groups of rows that can only be read whole, so in shuffled order each image costs reading its group
(often 100 images): `--order source` is faster here. Order: by file name, then by row. License: that of the data set.
Get one with, for example, `hf download uoft-cs/cifar10 --repo-type dataset --local-dir SOURCE`.
"""

import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beton_builders import Splits
from beton_builders._files import MAX_LABEL, UNLABELLED, files_with_suffix, has_labels, split_of
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "a folder of .parquet files or one of them"

IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")


class ParquetFile(NamedTuple):
    """The images of one file, without an object per image."""

    path: str
    name: str  # its path within SOURCE
    column: str  # that of the images
    groups: list[int]  # number of rows of each row group
    labels: np.ndarray  # int64 (rows,)
    classes: list[str]  # as named by Hugging Face's metadata; empty without it


def splits(source: Path) -> Splits:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet reads its files with the package pyarrow: pip install pyarrow") from error

    files: dict[str, list[ParquetFile]] = {}
    for path, name in files_with_suffix(source, (".parquet",)):
        files.setdefault(split_of(name), []).append(read_file(path, name))
    if not files:
        raise FileNotFoundError(f"parquet found no .parquet files in {source}: name their folder.")
    classes = class_names([file for found in files.values() for file in found])
    found_splits: Splits = {}
    for split, found in sorted(files.items()):
        labelled = has_labels([(file.path, file.labels) for file in found], "remove them")
        found_splits[split] = (classes if labelled else ["unlabelled"], samples(found))
    return found_splits


def samples(files: list[ParquetFile]) -> Iterator[Sample]:
    for file in files:
        position = 0
        for group, rows in enumerate(file.groups):
            for row in range(rows):
                image = partial(read_row, file.path, file.column, group, row)
                label = max(int(file.labels[position]), 0)
                yield Sample(image, label, f"{file.name}/{position}")
                position += 1


def read_row(path: str, column: str, group: int, row: int) -> bytes:
    content = read_group(path, column, group)[row].as_py()
    if content is None:
        raise ValueError(f"row {row} of row group {group} of {path} holds no image")
    return content


@lru_cache(maxsize=1)  # a group often has 10 MB and can have 100
def read_group(path: str, column: str, group: int) -> Any:
    """Return the bytes of all images in a row group."""
    from pyarrow import compute, types

    file = open_file(path)
    struct = types.is_struct(file.schema_arrow.field(column).type)
    wanted = f"{column}.bytes" if struct else column
    images = file.read_row_group(group, columns=[wanted], use_threads=False).column(column)
    return compute.struct_field(images, "bytes") if struct else images


@lru_cache(maxsize=16)  # reading a file's table of groups takes milliseconds
def open_file(path: str) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path)


def read_file(path: str, name: str) -> ParquetFile:
    import pyarrow
    from pyarrow import compute, parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            features = hugging_face_features(file.schema_arrow)
            column = image_column(file.schema_arrow, path)
            label = label_column(file.schema_arrow, features, path)
            if not 0 <= sum(groups) <= os.path.getsize(path) or min(groups, default=0) < 0:
                raise pyarrow.ArrowInvalid(f"its header claims {sum(groups):,} rows")
            labels = np.full(sum(groups), UNLABELLED)
            if label is not None:
                stored = file.read(columns=[label]).column(label).cast(pyarrow.int64())
                labels = compute.fill_null(stored, UNLABELLED).to_numpy()
            if len(labels) != sum(groups):
                raise pyarrow.ArrowInvalid(f"{len(labels):,} labels for {sum(groups):,} rows")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # it can be several lines
        raise ValueError(f"{path} is not a whole parquet file ({reason}): download it again.") from error
    if len(labels) and not UNLABELLED <= labels.min() <= labels.max() <= MAX_LABEL:
        raise ValueError(
            f"{path} holds labels from {labels.min()} to {labels.max()} in its column {label}: "
            "they must be numbers of classes, from 0."
        )
    names = features.get(label or "", {}).get("names")
    classes = [str(each) for each in names] if isinstance(names, list) else []
    return ParquetFile(path, name, column, groups, labels, classes)


def hugging_face_features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's metadata by column; empty if it did not write the file."""
    try:
        notes = json.loads((schema.metadata or {})[b"huggingface"])
        return {name: feature for name, feature in notes["info"]["features"].items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def image_column(schema: Any, path: str) -> str:
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            position = kind.get_field_index("bytes")
            return position >= 0 and holds_bytes(kind.field(position).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in found if name in IMAGES] or found
    if len(named) != 1:
        raise ValueError(
            f"{path} must have one column of images (bytes), named image if there are more; it has "
            f"{', '.join(found) or 'none'} among {', '.join(schema.names)}."
        )
    return named[0]


def label_column(schema: Any, features: dict[str, dict[str, Any]], path: str) -> str | None:
    from pyarrow import types

    named = [name for name in LABELS if name in schema.names][:1]
    found = named or [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(found) > 1:
        raise ValueError(f"{path} has several columns of classes, {', '.join(found)}: name the one to use label.")
    if found and not types.is_integer(schema.field(found[0]).type):
        raise ValueError(
            f"{path} holds {schema.field(found[0]).type} in its column {found[0]}: it must hold "
            "whole numbers, as a ClassLabel does."
        )
    return found[0] if found else None


def class_names(files: list[ParquetFile]) -> list[str]:
    """Return the names in the files, or the numbers up to the largest label of any split."""
    largest = max((int(file.labels.max()) for file in files if len(file.labels)), default=-1)
    named = [file for file in files if file.classes]
    if not named:
        return [str(label) for label in range(largest + 1)]
    for file in named:
        if file.classes != named[0].classes:
            raise ValueError(f"{named[0].path} and {file.path} name different classes: give files of one data set.")
    if largest >= len(named[0].classes):
        raise ValueError(
            f"{named[0].path} names {len(named[0].classes)} classes, but there is a label {largest}: download it again."
        )
    return named[0].classes
