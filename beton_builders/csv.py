"""Your own images, listed in a CSV file.

SOURCE is the file. Its first line names the columns, in any order and in upper or lower case:
    path      of the image, absolute or relative to the folder of the file; without a column of this name file_name,
              filename, filepath or image
    label     optional: the name of its class
    split     optional: train, val, test (or Hugging Face's other words for them, such as validation) or another word;
              without the column all is train

Other columns are ignored. Columns are separated by commas, semicolons or tabs, the text is UTF-8, or UTF-16 with a mark
at its begin; values may be in double quotes. Spaces around a value do not count, unless the file of a path exists only
with them. A path with backslashes is taken with slashes if only that file exists.

An image has no label (-1 is stored) if there is no column label or its value is empty, -1, none, nan, null, na, n/a or
<na>, in upper or lower case. Classes are the labels of all splits, sorted. If all are numbers they are sorted as
numbers, and 2.0 is the same class as 2. Order: that of the file.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from beton_builders import Splits
from beton_builders._files import is_no_label, number_classes, split_word
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "a CSV file with the columns path and label"

PATHS = ("file_name", "filename", "filepath", "image")  # other names of the column path
LABELS = ("labels", "class", "class_name", "classname", "category", "target")  # not read, but probably meant
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
NO_LABEL = ""
LONGEST_LINE = 1 << 20  # characters
SPLIT_NAME = re.compile(r"\w[\w-]*")


class Dialect(NamedTuple):
    """How a file writes its table."""

    encoding: str
    separator: str
    skips_spaces: bool  # a value in quotes may follow a space
    columns: list[str]  # their names in lower case, with the one of the paths called path


def splits(source: Path) -> Splits:
    if source.is_dir():
        raise ValueError(f"csv needs --source, {SOURCE}, and {source} is a folder.")
    if not source.is_file():  # a pipe could be read only once
        raise ValueError(f"csv needs --source, {SOURCE}, and {source} is no regular file: write the list to a file.")
    dialect = find_dialect(source)
    labels: dict[str, set[str]] = {}  # of each split, in the order of the file
    for _, label, split in rows(source, dialect):
        labels.setdefault(split, set()).add(label)
    if not labels:
        raise ValueError(f"{source} lists no images: write one line per image after the first line.")
    classes, numbers = number_classes(set().union(*labels.values()))
    return {
        split: (classes if found != {NO_LABEL} else [], samples(source, dialect, numbers, split))
        for split, found in labels.items()
    }


def samples(source: Path, dialect: Dialect, numbers: dict[str, int], wanted: str) -> Iterator[Sample]:
    for path, label, split in rows(source, dialect):
        if split == wanted:
            path = existing_path(source.parent, path)
            yield Sample(os.path.join(source.parent, path), numbers[label], path)


def existing_path(folder: Path, path: str) -> str:
    """Return the path as written if there is such a file, else without spaces around it, else with slashes."""
    stripped = path.strip()
    if path != stripped and os.path.lexists(os.path.join(folder, path)):
        return path
    if "\\" in stripped and not os.path.lexists(os.path.join(folder, stripped)):
        with_slashes = stripped.replace("\\", "/")
        if os.path.lexists(os.path.join(folder, with_slashes)):
            return with_slashes
    return stripped


def rows(source: Path, dialect: Dialect) -> Iterator[tuple[str, str, str]]:
    """Yield path, label and split of each line, checked; a million lines are never in memory.

    The path may have spaces around it. The label is NO_LABEL for an image without one.
    """
    with open(source, "rb") as file:
        lines = decoded(file, source, dialect.encoding)
        reader = csv.reader(lines, delimiter=dialect.separator, skipinitialspace=dialect.skips_spaces, strict=True)
        try:
            next(reader)
            width = len(dialect.columns)
            # A missing column is found after the ones of the file: its default is appended to each row.
            cells = itemgetter(*map([*dialect.columns, "label", "split"].index, ("path", "label", "split")))
            for row in reader:
                if not row:  # an empty line
                    continue
                where = f"Line {reader.line_num} of {source}"
                if len(row) != width:
                    raise ValueError(
                        f"{where} has {len(row)} values, and line 1 names {width} columns: put values with a "
                        f"{SEPARATORS[dialect.separator]} in double quotes."
                    )
                path, label, split = cells([*row, "", "train"])
                label, split = label.strip(), split.strip()
                if not (path.strip() and split):
                    raise ValueError(f"{where} gives no path or split: write one, or remove the line.")
                if not SPLIT_NAME.fullmatch(split):
                    raise ValueError(f"{where} has the split {split[:60]!r}: use letters, digits and _ to name a file.")
                yield path, NO_LABEL if is_no_label(label) else label, split_word(split) or split
        except csv.Error as error:
            where = f"Line {reader.line_num} of {source}"
            raise ValueError(f"{where} is not comma-separated text ({error}): write the file again.") from error


def find_dialect(source: Path) -> Dialect:
    """Raises ValueError unless line 1 names the columns, with exactly one separator."""
    encoding = find_encoding(source)
    with open(source, "rb") as file:
        first_line = next(decoded(file, source, encoding), "")
    found: list[tuple[str, list[str]]] = []
    for separator in SEPARATORS:
        try:
            header = next(csv.reader([first_line], delimiter=separator, skipinitialspace=True, strict=True), [])
        except csv.Error:
            continue
        columns = [name.strip().lower() for name in header]
        if not {"path", *PATHS}.isdisjoint(columns) and columns not in [columns for _, columns in found]:
            found.append((separator, columns))
    if not found:
        raise ValueError(
            f"{source} must name its columns in line 1, and that line is {first_line.strip()[:60]!r}: write "
            "path,label or path,label,split there."
        )
    if len(found) > 1:
        names = " or ".join(f"{SEPARATORS[separator]}s" for separator, _ in found)
        raise ValueError(f"{source} could be separated by {names}: remove the others from line 1.")
    separator, columns = found[0]
    with open(source, "rb") as file:
        skips_spaces = any(re.search(f'{separator} +"', line) for line in decoded(file, source, encoding))
    return Dialect(encoding, separator, skips_spaces, check_columns(columns, source))


def check_columns(columns: list[str], source: Path) -> list[str]:
    """Return the columns, with the one of the paths called path. Raises ValueError for what is ambiguous."""
    named = [name for name in columns if name == "path"] or [name for name in columns if name in PATHS]
    for found in (named, *([name for name in columns if name == each] for each in ("label", "split"))):
        if len(found) > 1:
            raise ValueError(f"{source} has the columns {' and '.join(found)}: call the one to use {found[0]!r}.")
    meant = [name for name in columns if name in LABELS]
    if meant and "label" not in columns:
        raise ValueError(
            f"{source} has no column label, but a column {meant[0]}: call it label, or, if it is not the class of the "
            "image, something else."
        )
    return ["path" if name == named[0] else name for name in columns]


def find_encoding(source: Path) -> str:
    with open(source, "rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise ValueError(f"{source} is UTF-32 text: save the file as CSV UTF-8.")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start:
        raise ValueError(f"{source} is not UTF-8 text: save the file as CSV UTF-8.")
    return "utf-8-sig"


def decoded(file: io.BufferedReader, source: Path, encoding: str) -> Iterator[str]:
    # The file is decoded by the block. What is not UTF-8 becomes surrogates, so that the line is known that has it.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    text = io.TextIOWrapper(file, encoding, errors, newline="")
    try:
        for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"Line {number} of {source} has {LONGEST_LINE:,} characters or more: save it as CSV.")
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"Line {number} of {source} is not UTF-8 text: save the file as CSV UTF-8.") from error
            yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not whole UTF-16 text ({error.reason}): save the file as CSV UTF-8.") from error
