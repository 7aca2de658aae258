"""Parquet files of images, as Hugging Face's datasets, pandas or polars store them; needs the package pyarrow.

    SOURCE/**/*.parquet   or SOURCE is one such file. A folder named train, val or test (or by another of Hugging Face's
                          words for them, such as validation) gives the split, or else a word of the name:
                          data/train-00000-of-00010.parquet. If no name has one, or with --splits none, all are train.
    its image column      the bytes of an image file in each row, or Hugging Face's struct of bytes and path, or a list
                          of one of these; of several columns the one named image, img or images. Where only the path is
                          given, the image is read from there; it must lie within SOURCE, and the path starts at the
                          folder of the parquet file or at SOURCE
    its label column      named label, labels or fine_label, or the one that Hugging Face's metadata in the file calls a
                          ClassLabel: whole numbers from 0, or names of classes, or true and false

An image has no label (-1 is stored) without such a column, and where it holds null, NaN, -1 or a word for it (none,
nan, null, na, n/a or nothing). Class names come from Hugging Face's metadata in the file; without it they are the
numbers, or the names in the column, sorted, of all files.

The rows are stored in groups that are read from their begin on. A process keeps groups of up to 128 MB in memory. So
with larger ones, in shuffled order, each image costs reading half of its group: `--order source` is faster, and a note
says so. Order: by file name, then by row. License: that of the data set. Get one with, for example,
`hf download uoft-cs/cifar10 --repo-type dataset --local-dir SOURCE`.
"""

import bisect
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beton_builders import Splits
from beton_builders._files import MAX_LABEL, UNLABELLED, is_no_label, number_classes
from beton_builders._shards import files_by_split
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "a folder of .parquet files or one of them"
LABEL_FILES = ("**/*.parquet",)
SPLITS_BY_NAME = True

IMAGES, LABELS = ("image", "img", "images"), ("label", "labels", "fine_label")
CACHED = 128 << 20  # bytes of images that a process keeps in memory
LARGEST_IMAGE = 1 << 30  # bytes; a larger file is a bad image, and so is a larger cell
BATCH_ROWS, BATCH_BYTES = 16, 16 << 20  # read at a time: at most so many rows, and about so many bytes
BUFFER = 1 << 20  # bytes; without it pyarrow reads all of a group's bytes at once

# On some damaged footers pyarrow ends the process (SIGABRT for 4 of 10,000 mutated files, pyarrow 26.0). This prints a
# dot for each file that it survives.
READ_FOOTERS_SAFELY = """
import os, resource, sys
from pyarrow import parquet
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in sys.stdin.buffer.read().split(b"\\0"):
    try:
        metadata = parquet.ParquetFile(os.fsdecode(path)).metadata
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                metadata.row_group(group).column(column).statistics
    except Exception:
        pass  # read_file says what is wrong
    print(end=".", flush=True)
"""


class ParquetFile(NamedTuple):
    """The images of one file, without an object per image."""

    path: str
    name: str  # its path within SOURCE
    column: str  # that of the images
    groups: list[int]  # number of rows of each row group
    labels: np.ndarray  # int64 (rows,): the label, or the position of its name in `texts`
    texts: list[str] | None  # the names of classes that the label column holds; None if it holds numbers
    classes: list[str]  # as named by Hugging Face's metadata; empty without it
    image_paths: list[str | None] | None  # of the image files, if the rows hold nothing but paths


def splits(source: Path, by_name: bool = True) -> Splits:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet reads its files with the package pyarrow: pip install pyarrow") from error

    root = str(source if source.is_dir() else source.parent)
    by_split = files_by_split(source, (".parquet",), by_name)
    check_footers([path for found in by_split.values() for path, _ in found])
    files = {split: [read_file(path, name) for path, name in found] for split, found in by_split.items()}
    if not files:
        raise FileNotFoundError(f"parquet found no .parquet files in {source}: name their folder.")
    classes, numbers = class_names([file for found in files.values() for file in found])
    found_splits: Splits = {}
    for split, found in files.items():
        labelled = [file._replace(labels=numbered(file, numbers)) for file in found]
        has_labels = any((file.labels != UNLABELLED).any() for file in labelled)
        found_splits[split] = (classes if has_labels else [], samples(labelled, root))
    return found_splits


def samples(files: list[ParquetFile], root: str) -> Iterator[Sample]:
    for file in files:
        position = 0
        for group, rows in enumerate(file.groups):
            for row in range(rows):
                label, name = int(file.labels[position]), f"{file.name}/{position}"
                path = file.image_paths and file.image_paths[position]
                if path:
                    found = find_image(path, file.path, root)
                    yield Sample(found, label, os.path.relpath(found, root))
                else:
                    yield Sample(RowImage(file.path, root, file.column, group, row), label, name)
                position += 1


@dataclass(frozen=True)
class RowImage:
    """Reads the image in a row of a file when it is called."""

    path: str
    root: str  # SOURCE or its folder
    column: str
    group: int
    row: int  # within the group

    def __call__(self) -> bytes:
        where = f"row {self.row} of row group {self.group} of {self.path}"
        cell = read_cell(self.path, self.column, self.group, self.row)
        if isinstance(cell, list):
            if len(cell) > 1:
                raise ValueError(f"{where} holds {len(cell)} images")
            cell = cell[0] if cell else None
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content is None and isinstance(cell, dict) and cell.get("path"):
            path = find_image(cell["path"], self.path, self.root)
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError(f"{where} names the image {path}, which is no file")
            with open(path, "rb") as file:
                return file.read(LARGEST_IMAGE + 1)
        if not isinstance(content, bytes):
            raise ValueError(f"{where} holds no image")
        return content


IMAGE_CLASSES = (RowImage,)


def find_image(path: str, parquet_path: str, root: str) -> str:
    """Return the path of an image that a row names. Raises ValueError for one outside of `root`."""
    folders = (os.path.dirname(parquet_path), root)
    found = [os.path.normpath(os.path.join(folder, path)) for folder in folders]
    inside = [each for each in found if os.path.relpath(each, root).split(os.sep)[0] != os.pardir]
    if os.path.isabs(path) or not inside:
        raise ValueError(
            f"{parquet_path} names the image {path[:99]!r}, which is not within {root}: store the images in the file, "
            "or copy them there and write paths relative to it."
        )
    return next((each for each in inside if os.path.lexists(each)), inside[0])


class GroupReader:
    """Reads the rows of a row group, and keeps them in memory if they take at most CACHED bytes."""

    def __init__(self, path: str, column: str, group: int) -> None:
        self.file, self.column, self.group = open_file(path), column, group
        rows = self.file.metadata.row_group(group).num_rows
        bytes_per_row = group_bytes(self.file, column, group) / max(1, rows)
        self.batch_rows = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, bytes_per_row))))
        self.restart()

    def restart(self) -> None:
        batches = self.file.iter_batches(
            self.batch_rows, row_groups=[self.group], columns=[self.column], use_threads=False
        )
        self.remaining = iter(batches)
        self.kept: list[Any] = []  # arrays of rows that follow each other
        self.starts = [0]  # row at which each begins, and at which the next one will
        self.size = 0  # bytes

    def read(self, row: int) -> Any:
        if row < self.starts[0]:
            self.restart()
        while row >= self.starts[-1]:
            batch = next(self.remaining)
            images = batch.column(batch.schema.get_field_index(self.column))
            if self.size + images.nbytes > CACHED:
                self.kept, self.starts, self.size = [], self.starts[-1:], 0
            self.kept.append(images)
            self.starts.append(self.starts[-1] + len(images))
            self.size += images.nbytes
        position = bisect.bisect_right(self.starts, row) - 1
        cell = self.kept[position].slice(row - self.starts[position], 1)
        if cell.nbytes > LARGEST_IMAGE:  # as_py would copy it
            raise ValueError(f"has {cell.nbytes / 1e9:,.1f} GB, more than an image file may have")
        return cell[0].as_py()


_readers: OrderedDict[tuple[str, str, int], GroupReader] = OrderedDict()  # the one used last is at the end


def read_cell(path: str, column: str, group: int, row: int) -> Any:
    """Return what a row of a row group holds: bytes, a dict, a list of these, or None."""
    key = (path, column, group)
    reader = _readers.pop(key, None) or GroupReader(*key)
    cell = reader.read(row)
    _readers[key] = reader  # not after an error: the reader would go on in the middle
    while len(_readers) > 1 and sum(each.size for each in _readers.values()) > CACHED:
        _readers.popitem(last=False)
    return cell


@lru_cache(maxsize=16)  # reading a file's table of groups takes milliseconds
def open_file(path: str) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path, buffer_size=BUFFER)


def group_bytes(file: Any, column: str, group: int) -> int:
    """Return the size of a column in a row group, uncompressed, in bytes."""
    return sum(int(chunk.total_uncompressed_size) for chunk in column_chunks(file, column, group))


def column_chunks(file: Any, column: str, group: int) -> list[Any]:
    """Return the metadata of a column's parts in a row group: a struct has several."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column or chunk.path_in_schema == column]


def check_footers(paths: list[str]) -> None:
    """Raise ValueError for a file whose footer would end this process. Another process reads all of them first."""
    if paths:
        names = b"\0".join(map(os.fsencode, paths))
        done = subprocess.run([sys.executable, "-c", READ_FOOTERS_SAFELY], input=names, capture_output=True)
        if len(done.stdout) < len(paths):
            raise ValueError(
                f"{paths[len(done.stdout)]} is not a whole parquet file (reading its footer ends pyarrow's process): "
                "download it again."
            )


def read_file(path: str, name: str) -> ParquetFile:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            features = hugging_face_features(file.schema_arrow)
            column = image_column(file.schema_arrow, path)
            label = label_column(file.schema_arrow, features, path)
            check_types(file)
            if not 0 <= sum(groups) <= os.path.getsize(path) or min(groups, default=0) < 0:
                raise pyarrow.ArrowInvalid(f"its header claims {sum(groups):,} rows")
            labels, texts = read_labels(file, label, path) if label else (np.full(sum(groups), UNLABELLED), None)
            if len(labels) != sum(groups):
                raise pyarrow.ArrowInvalid(f"{len(labels):,} labels for {sum(groups):,} rows")
            check_groups(file, column, path)
            image_paths = read_paths(file, column)
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
    return ParquetFile(path, name, column, groups, labels, texts, classes, image_paths)


def check_types(file: Any) -> None:
    """Raise ArrowInvalid if parts of a column have another type than the schema says: pyarrow would end the process."""
    import pyarrow

    wanted = [file.schema.column(i).physical_type for i in range(len(file.schema))]
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        found = [metadata.column(i).physical_type for i in range(metadata.num_columns)]
        if found != wanted:
            raise pyarrow.ArrowInvalid(f"row group {group} has columns of other types than the schema")


def check_groups(file: Any, column: str, path: str) -> None:
    """Raise ValueError if rows hold several images; print a note if groups are too large for a shuffled order."""
    for group in range(file.num_row_groups):
        for chunk in column_chunks(file, column, group):
            if chunk.num_values > file.metadata.row_group(group).num_rows:
                raise ValueError(f"{path} holds several images per row in its column {column}: store one in each row.")
    largest = max((group_bytes(file, column, group) for group in range(file.num_row_groups)), default=0)
    if largest > CACHED:
        print(
            f"Note: {path} has row groups of up to {largest / 1e6:,.0f} MB. In shuffled order each image costs reading "
            "half of one: --order source is much faster.",
            file=sys.stderr,
        )


def read_labels(file: Any, column: str, path: str) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels, int64 (rows,), and their names if they are text: a label is then the position of its name."""
    import pyarrow
    from pyarrow import compute, types

    stored = file.read(columns=[column]).column(column)
    if types.is_dictionary(stored.type):
        stored = stored.cast(stored.type.value_type)
    kind = stored.type
    if types.is_null(kind):
        return np.full(len(stored), UNLABELLED), None
    if types.is_boolean(kind) or types.is_integer(kind):
        labels = compute.fill_null(stored.cast(pyarrow.int64()), UNLABELLED).to_numpy()
        return labels, ["False", "True"] if types.is_boolean(kind) else None
    if types.is_floating(kind):
        numbers = stored.cast(pyarrow.float64()).to_numpy()  # null becomes NaN
        numbers = np.where(np.isnan(numbers), UNLABELLED, numbers)
        if not (np.isfinite(numbers) & (numbers == np.floor(numbers))).all():
            raise ValueError(f"{path} holds fractions in its column {column}: it must hold whole numbers.")
        return np.clip(numbers, -(2**53), 2**53).astype(np.int64), None
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        encoded = stored.cast(pyarrow.large_string()).combine_chunks().dictionary_encode()
        return compute.fill_null(encoded.indices.cast(pyarrow.int64()), UNLABELLED).to_numpy(), (
            encoded.dictionary.to_pylist()
        )
    raise ValueError(
        f"{path} holds {kind} in its column {column}: it must hold whole numbers, as a ClassLabel does, or text."
    )


def read_paths(file: Any, column: str) -> list[str | None] | None:
    """Return the paths of the images if that is all that the rows hold, as the file's statistics say."""
    from pyarrow import compute, types

    kind = file.schema_arrow.field(column).type
    if not types.is_struct(kind) or kind.get_field_index("path") < 0:
        return None
    for group in range(file.num_row_groups):
        for chunk in column_chunks(file, f"{column}.bytes", group):
            if chunk.statistics is None or chunk.statistics.null_count != file.metadata.row_group(group).num_rows:
                return None
    paths: list[str | None] = compute.struct_field(
        file.read(columns=[f"{column}.path"]).column(column), "path"
    ).to_pylist()
    return paths


def hugging_face_features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's metadata by column; empty if it did not write the file."""
    try:
        notes = json.loads((schema.metadata or {})[b"huggingface"])
        return {name: feature for name, feature in notes["info"]["features"].items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def image_column(schema: Any, path: str) -> str:
    """Return the column of images: of bytes or structs; without one, of lists or of bytes of one length."""
    from pyarrow import types

    def holds_images(kind: Any, lists: bool) -> bool:
        if types.is_dictionary(kind):
            return holds_images(kind.value_type, lists)
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return lists and holds_images(kind.value_type, lists)
        if types.is_fixed_size_binary(kind):  # most often a checksum
            return lists
        if types.is_struct(kind):
            fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            return "bytes" in fields and (types.is_null(fields["bytes"]) or holds_images(fields["bytes"], lists))
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    found = [field.name for field in schema if holds_images(field.type, False)]
    found = found or [field.name for field in schema if holds_images(field.type, True)]
    named = [name for name in found if name.lower() in IMAGES] or found
    if len(named) != 1:
        raise ValueError(
            f"{path} must have one column of images (bytes), named image if there are more; it has "
            f"{', '.join(found) or 'none'} among {', '.join(schema.names)}."
        )
    return named[0]


def label_column(schema: Any, features: dict[str, dict[str, Any]], path: str) -> str | None:
    named = [[name for name in schema.names if name.lower() == word] for word in LABELS]
    found = next((names for names in named if names), None)
    if found is None:
        found = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(found) > 1:
        raise ValueError(f"{path} has several columns of classes, {', '.join(found)}: name the one to use label.")
    return found[0] if found else None


def class_names(files: list[ParquetFile]) -> tuple[list[str], dict[str, int]]:
    """Return the names of the classes, and the number of each label that is text.

    They are the texts in the label columns, or those in Hugging Face's metadata, or the numbers up to the largest label
    of any split.
    """
    with_texts = [file for file in files if not all(map(is_no_label, file.texts or ()))]
    numbered = [file for file in files if file.texts is None and (file.labels != UNLABELLED).any()]
    if with_texts and numbered:
        raise ValueError(
            f"{with_texts[0].path} holds the labels as text, and {numbered[0].path} as numbers: give files of one data "
            "set."
        )
    if with_texts:
        return number_classes(text for file in with_texts for text in file.texts or ())
    largest = max((int(file.labels.max()) for file in files if len(file.labels)), default=-1)
    named = [file for file in files if file.classes]
    if not named:
        return [str(label) for label in range(largest + 1)], {}
    for file in named:
        if file.classes != named[0].classes:
            raise ValueError(f"{named[0].path} and {file.path} name different classes: give files of one data set.")
    if largest >= len(named[0].classes):
        raise ValueError(
            f"{named[0].path} names {len(named[0].classes)} classes, but there is a label {largest}: download it again."
        )
    return named[0].classes, {}


def numbered(file: ParquetFile, numbers: dict[str, int]) -> np.ndarray:
    """Return the numbers of the classes, int64 (rows,)."""
    if file.texts is None:
        return file.labels
    # The last entry is for UNLABELLED.
    return np.array([*(numbers.get(text, UNLABELLED) for text in file.texts), UNLABELLED])[file.labels]
