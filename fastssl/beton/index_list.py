"""Lists of images, such as ImageNet's 1 % and 10 % subsets: a subset of a .beton without a copy.

A list has one image per line: its name, or its index. Blank lines and lines that begin with # are skipped. If all lines
are whole numbers they are indices. Otherwise a line names, in this order of preference, the image whose name in
X.beton.names.txt it is, the one whose name ends with it after a slash (n01440764_10074.JPEG names
train/n01440764/n01440764_10074.JPEG), or the one for which this holds without the suffixes (.JPEG, .jpg). A line that
names several images is an error.

Names are bytes here: a million take half of the memory that strings take, and they need not be UTF-8.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.format import names_path
from fastssl.beton.read import LONGEST_NAME, MOST_DIGITS, BetonInfo, all_names, has_names, read_header
from fastssl.beton.tables import Tables
from fastssl.common.errors import UserError, quote
from fastssl.common.files import UnsafeFile, open_regular

SUFFIX = re.compile(rb"\.[A-Za-z]{3,4}$")  # the .2 of n01440764.2 is not a suffix


class _List(NamedTuple):
    """The lines of a list that name an image."""

    path: Path
    lines: list[bytes]
    numbers: list[int]  # of the lines in the file, from 1

    def error(self, is_wrong_L: np.ndarray, problem: str, fix: str) -> UserError:
        """Return an error about the first wrong line, with the number of all; `is_wrong_L` bool (lines,)."""
        first = int(np.argmax(is_wrong_L))
        count = int(is_wrong_L.sum())
        others = f" ({count:,} such lines in all)" if count > 1 else ""
        line = _text(self.lines[first])
        return UserError(f"Line {self.numbers[first]} of {self.path}, {quote(line)}, {problem}{others}", hint=fix)


def read_index_list(beton_path: str | Path, list_path: str | Path) -> np.ndarray:
    """Return the `index` of each image that a list names, int64 (lines,), in the order of the list.

    Raises:
        UserError: a line does not name an image of the file, or two lines name the same one.
    """
    beton_path = Path(beton_path)
    info = read_header(beton_path)
    if info.fields.get("index") != "IntField":
        raise UserError(
            f"{beton_path} has no integer field 'index', so no list can name its images",
            hint="build it with fastssl build-beton",
        )
    listed = _read_list(Path(list_path))
    if all(line.isdigit() and len(line) <= MOST_DIGITS for line in listed.lines):
        index_L = np.array([int(line) for line in listed.lines], np.int64)
    else:
        index_L = _find_names(listed, beton_path)

    _, first_I, inverse_L = np.unique(index_L, return_index=True, return_inverse=True)
    first_L = first_I[inverse_L]  # the first line that names the same image
    is_repeated_L = first_L < np.arange(len(first_L))
    if is_repeated_L.any():
        number = listed.numbers[first_L[np.argmax(is_repeated_L)]]
        raise listed.error(is_repeated_L, f"names the image of line {number} again", "remove one of them")

    is_absent_L = np.ones(len(index_L), bool)
    largest = 0
    for index_n in _index_pieces(info):
        is_absent_L &= ~np.isin(index_L, index_n)
        largest = max(largest, int(index_n.max()))
    if is_absent_L.any():
        manifest = info.manifest or {}
        named = (index for index, _ in all_names(beton_path)) if has_names(beton_path) else ()
        # Shards have no names of the images that --limit left out, but their number.
        total = max(max(named, default=-1) + 1, largest + 1, manifest.get("listed", 0))
        is_outside_L = index_L >= total
        if is_outside_L.any():
            raise listed.error(is_outside_L, f"is no index of {beton_path}", f"write indices from 0 to {total - 1}")
        limit = manifest.get("limit")
        bad = "bad when the file was built (bad_images.jsonl in its folder has the reason)"
        reason = f"left out by --limit {limit}, or bad" if limit else bad
        raise listed.error(is_absent_L, f"names an image that is not in {beton_path}: it was {reason}", "remove it")
    return index_L


def _index_pieces(info: BetonInfo) -> Iterator[np.ndarray]:
    """Yield the indices of all samples; of a very large set, those of one file at a time."""
    if isinstance(info.tables, Tables):
        yield info.tables.metadata["index"]
    else:
        yield from info.tables.pieces_of("index")


def _read_list(path: Path) -> _List:
    listed = _List(path, [], [])
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_NAME), b""), 1):
                if len(line) == LONGEST_NAME:
                    raise UnsafeFile(path, f"a file with lines of {LONGEST_NAME:,} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf").strip()  # some editors begin a file with this mark
                if line and not line.startswith(b"#"):
                    listed.lines.append(line.removeprefix(b"./"))
                    listed.numbers.append(number)
    except FileNotFoundError:
        raise UserError(f"No file {path}", hint="name a list of images, one per line") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", hint="name a list of images") from error
    if not listed.lines:
        raise UserError(f"{path} names no images", hint="write the name of one on each line")
    return listed


def _find_names(listed: _List, beton_path: Path) -> np.ndarray:
    """Return the index of the image that each line names, int64 (lines,)."""
    if not has_names(beton_path):
        raise UserError(
            f"{names_path(beton_path)} is missing, so the images of {beton_path} have no names (stock FFCV or an older "
            "version built it)",
            hint="build it with fastssl build-beton, or list indices",
        )
    index_L, count_L = _match(listed.lines, all_names(beton_path))
    if not count_L.all():
        missing = np.flatnonzero(count_L == 0)
        keys = [SUFFIX.sub(b"", listed.lines[line]) for line in missing]
        index_L[missing], count_L[missing] = _match(
            keys, ((index, SUFFIX.sub(b"", name)) for index, name in all_names(beton_path))
        )
    if not count_L.all():
        _, example = next(all_names(beton_path), (0, b""))
        raise listed.error(count_L == 0, f"names no image of {beton_path}", f"write names like {quote(_text(example))}")
    if (count_L > 1).any():
        count = count_L[np.argmax(count_L > 1)]
        fix = "write more of the path before it, or its suffix"
        raise listed.error(count_L > 1, f"names {count} images of {beton_path}", fix)
    return index_L


def _match(keys: list[bytes], names: Iterable[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key the index of a matching name and the number of matching names, int64 (keys,) each.

    A key matches the name that it is; if there is none, it matches names that end with it after a slash. One pass over
    the names, however many keys there are; equal keys get equal results.
    """
    first_of: dict[bytes, int] = {}
    first_K = np.array([first_of.setdefault(key, position) for position, key in enumerate(keys)], np.int64)
    index_K, count_K, end_index_K, end_count_K = np.zeros((4, len(keys)), np.int64)
    for index, name in names:
        key = first_of.get(name)
        if key is not None:
            index_K[key] = index
            count_K[key] += 1
        slash = name.find(b"/")
        while slash >= 0:
            key = first_of.get(name[slash + 1 :])
            if key is not None:
                end_index_K[key] = index
                end_count_K[key] += 1
            slash = name.find(b"/", slash + 1)
    is_whole_K = count_K > 0
    index_K = np.where(is_whole_K, index_K, end_index_K)
    count_K = np.where(is_whole_K, count_K, end_count_K)
    return index_K[first_K], count_K[first_K]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
