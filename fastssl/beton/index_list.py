"""Lists of images, such as ImageNet's 1 % and 10 % subsets: a subset of a .beton without a copy.

A list has one image a line: its name, or its index. Blank lines and lines that begin with # are
passed over. A line names the image of X.beton.names.txt whose name it is, or else whose name ends
with it behind a slash (n01440764_10074.JPEG is train/n01440764/n01440764_10074.JPEG), or else does
so where both are without their suffix (.JPEG, .jpg). It must be clear which one is meant. Lines
that are whole numbers, all of them, are indices.

Names are bytes here: a million take half of what strings take, and need not be UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.partial_build import names_path
from fastssl.beton.read import read_header, read_metadata
from fastssl.common.errors import UserError

SUFFIX = re.compile(rb"\.[A-Za-z]{3,4}$")  # .2 in n01440764.2 is none
MOST_DIGITS = 18  # of an index that int64 holds


class _List(NamedTuple):
    """The lines that name an image, and where each stands in the file, counted from 1."""

    path: Path
    lines: list[bytes]
    numbers: np.ndarray


def read_index_list(beton_path: str | Path, list_path: str | Path) -> np.ndarray:
    """The `index` of each image that a list names, int64 (lines,), in the order of the list.

    All are in the file, and each is named once; everything else is a UserError.
    """
    beton_path = Path(beton_path)
    info = read_header(beton_path)
    if info.fields.get("index") != "IntField":
        raise UserError(
            f"{beton_path} has no integer field 'index', so no list can name its images; "
            "build it with fastssl build-beton."
        )
    in_file = np.array(read_metadata(beton_path)["index"])  # a copy, as the rest is large
    listed = _read_list(Path(list_path))
    _refuse_repeated_lines(listed)
    if all(line.isdigit() and len(line) <= MOST_DIGITS for line in listed.lines):
        index = np.array([int(line) for line in listed.lines], np.int64)
    else:
        index = _index_of_names(listed, beton_path)
    _refuse_repeated_images(listed, index)
    _refuse_what_is_not_there(listed, index, in_file, beton_path, info.manifest or {})
    return index


def _read_list(path: Path) -> _List:
    lines, numbers = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()  # some editors put that mark first
                if line and not line.startswith(b"#"):
                    lines.append(line.removeprefix(b"./"))
                    numbers.append(number)
    except FileNotFoundError:
        raise UserError(f"No file {path}: name a list of images, one a line.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a list of images.") from error
    if not lines:
        raise UserError(f"{path} names no images: it must hold the name of one in each line.")
    return _List(path, lines, np.array(numbers))


# --- from names to indices ----------------------------------------------------------------------


def _index_of_names(listed: _List, beton_path: Path) -> np.ndarray:
    """The index of the image that each line names, int64 (lines,)."""
    names = names_path(beton_path)
    if not names.exists():
        raise UserError(
            f"{names} is missing, so {beton_path} does not know its images by name: it comes from "
            "stock FFCV or an older version; build it with fastssl build-beton, or list indices."
        )
    index, count = _find(listed.lines, _names(names))
    if not count.all():
        missing = np.flatnonzero(count == 0)
        keys = [SUFFIX.sub(b"", listed.lines[line]) for line in missing]
        without_suffix = (SUFFIX.sub(b"", name) for name in _names(names))
        index[missing], count[missing] = _find(keys, without_suffix)
    if not count.all():
        looks = _text(next(_names(names), b""))
        raise _refusal(listed, count == 0, f"names no image of {beton_path}", f"its names look like {looks!r}")
    if (count > 1).any():
        raise _refusal(
            listed,
            count > 1,
            f"names {count[np.argmax(count > 1)]} images of {beton_path}",
            "write more of the path before it, or its suffix",
        )
    return index


def _names(path: Path) -> Iterator[bytes]:
    """The names in the order of their index. (Only b"\\n" ends one; str.splitlines knows more.)"""
    with open(path, "rb") as file:
        for line in file:
            yield line.removesuffix(b"\n")


def _find(keys: list[bytes], names: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """For each key the position of the name that it is, and how many it is; int64 (keys,) each.

    Where a key is no whole name, names that end with it behind a slash count. One pass over the
    names, however many they are; of equal keys each gets the same answer.
    """
    wanted: dict[bytes, int] = {}
    same = np.array([wanted.setdefault(key, place) for place, key in enumerate(keys)], np.int64)
    index, count = np.zeros((2, len(keys)), np.int64)
    end_index, end_count = np.zeros((2, len(keys)), np.int64)
    for position, name in enumerate(names):
        place = wanted.get(name)
        if place is not None:
            index[place] = position
            count[place] += 1
        slash = name.find(b"/")
        while slash >= 0:
            place = wanted.get(name[slash + 1 :])
            if place is not None:
                end_index[place] = position
                end_count[place] += 1
            slash = name.find(b"/", slash + 1)
    is_whole = count > 0
    index, count = np.where(is_whole, index, end_index), np.where(is_whole, count, end_count)
    return index[same], count[same]


# --- what is wrong with a list ------------------------------------------------------------------


def _refuse_repeated_lines(listed: _List) -> None:
    if len(set(listed.lines)) < len(listed.lines):
        first: dict[bytes, int] = {}
        places = np.array([first.setdefault(line, place) for place, line in enumerate(listed.lines)])
        _refuse_repeated(listed, places)


def _refuse_repeated_images(listed: _List, index: np.ndarray) -> None:
    """Two lines that differ may name one image: by its whole name and by the end of it."""
    first, inverse = np.unique(index, return_index=True, return_inverse=True)[1:]
    _refuse_repeated(listed, first[inverse])


def _refuse_repeated(listed: _List, first: np.ndarray) -> None:
    """`first` (lines,) is the place of the first line that names the same image."""
    repeated = first < np.arange(len(first))
    if repeated.any():
        before = listed.numbers[first[np.argmax(repeated)]]
        raise _refusal(
            listed,
            repeated,
            f"names the image of line {before} again",
            "keep one of them",
        )


def _refuse_what_is_not_there(
    listed: _List, index: np.ndarray, in_file: np.ndarray, beton_path: Path, manifest: dict
) -> None:
    """Not every index is in the file: images are left out if they are bad, or by --limit."""
    absent = ~np.isin(index, in_file)
    if not absent.any():
        return
    names = names_path(beton_path)
    total = sum(1 for _ in _names(names)) if names.exists() else in_file.max() + 1
    outside = index >= total
    if outside.any():
        raise _refusal(listed, outside, f"is no index of {beton_path}", f"the last one is {total - 1}")
    if manifest.get("limit"):
        why = f"left out by --limit {manifest['limit']}, or bad"
    else:
        why = "bad when the file was built (bad_images.jsonl beside it says why)"
    raise _refusal(listed, absent, f"names an image that is not in {beton_path}: it was {why}", "take it out")


def _refusal(listed: _List, is_wrong: np.ndarray, what: str, mend: str) -> UserError:
    """One sentence about the first wrong line and the number of all; `is_wrong` bool (lines,)."""
    place, count = int(np.argmax(is_wrong)), int(is_wrong.sum())
    others = f" ({count:,} such lines in all)" if count > 1 else ""
    return UserError(
        f"Line {listed.numbers[place]} of {listed.path}, {_text(listed.lines[place])!r}, {what}{others}; {mend}."
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
