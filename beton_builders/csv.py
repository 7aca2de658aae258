"""Your own images, listed in a CSV file.

SOURCE is the file. Its first line names the columns, in any order:
    path      of the image, absolute or relative to the folder of the file
    label     optional: the name of its class
    split     optional: train, val, test or another word; without the column all is train

Other columns are ignored. Comma-separated, UTF-8; values may be in double quotes. Classes are the labels of all splits,
sorted; as numbers if all are whole numbers. Without a column label there is one class, unlabelled. Order: that of the
file.
"""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from beton_builders import Splits
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "a CSV file with the columns path and label"

SPLIT_NAME = re.compile(r"\w[\w-]*")


def splits(source: Path) -> Splits:
    if source.is_dir():
        raise ValueError(f"csv needs --source, {SOURCE}, and {source} is a folder.")
    labels: set[str] = set()
    names: dict[str, None] = {}  # an ordered set
    for _, label, split in rows(source):
        labels.add(label)
        names[split] = None
    if not names:
        raise ValueError(f"{source} lists no images: write one line per image after the first line.")
    numeric = all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels)
    classes = sorted(labels, key=lambda label: (int(label), label)) if numeric else sorted(labels)
    return {name: (classes, samples(source, classes, name)) for name in names}


def samples(source: Path, classes: list[str], wanted: str) -> Iterator[Sample]:
    numbers = {label: number for number, label in enumerate(classes)}
    for path, label, split in rows(source):
        if split == wanted:
            yield Sample(os.path.join(source.parent, path), numbers[label], path)


def rows(source: Path) -> Iterator[tuple[str, str, str]]:
    """Yield path, label and split of each line, checked; a million lines are never in memory."""
    with open(source, "rb") as file:
        reader = csv.reader(decoded(file, source), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if "path" not in header:
                raise ValueError(
                    f"{source} must name its columns in line 1, path among them, and that line is "
                    f"{','.join(header)[:60]!r}."
                )
            # A missing column is found after the ones of the file: its default is appended to each row.
            columns = [*header, "label", "split"]
            cells = itemgetter(*map(columns.index, ("path", "label", "split")))
            for row in reader:
                if not row:  # an empty line
                    continue
                where = f"Line {reader.line_num} of {source}"
                if len(row) != len(header):
                    raise ValueError(
                        f"{where} has {len(row)} values, and line 1 names {len(header)} columns: put values with a "
                        "comma in double quotes."
                    )
                path, label, split = cells([*row, "unlabelled", "train"])
                if not (path and label and split):
                    raise ValueError(f"{where} gives no path, label or split: write one, or remove the line.")
                if not SPLIT_NAME.fullmatch(split):
                    raise ValueError(f"{where} has the split {split[:60]!r}: use letters, digits and _ to name a file.")
                yield path, label, split
        except csv.Error as error:
            where = f"Line {reader.line_num} of {source}"
            raise ValueError(f"{where} is not comma-separated text ({error}): write the file again.") from error


def decoded(file: Iterable[bytes], source: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"Line {number} of {source} is not UTF-8 text: save the file as CSV UTF-8.") from error
