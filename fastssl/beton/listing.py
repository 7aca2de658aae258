"""What a builder finds in its source: the images of each split, in the order of the file or of its shards."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.format import RGB
from fastssl.beton.options import BuildOptions
from fastssl.beton.source import ImageSource, SourceSplit, digest, file_of, list_splits
from fastssl.common.files import open_regular

SPOT_CHECKED = 256  # images of a split whose files tell a set from another one with the same names and labels
SPOT_BYTES = 1 << 16  # that are read of each


class ListedSplit(NamedTuple):
    """The images of a split, or those of one shard of it."""

    split: SourceSplit  # `order` and `samples` of the shard only, if one was asked for
    images: int  # of all shards
    sha256: str  # of the whole list, see `source.digest`
    spot_check: str | None = None  # see `spot_check`; None for a build without shards, whose list holds the paths


class Listing(NamedTuple):
    """What a builder found in its source."""

    splits: list[ListedSplit]
    files: dict[str, int] | None  # see `accounting.count_files`; None: not counted yet, {}: nobody has counted them


def splits_of(builder: str, source: Path | None, options: BuildOptions) -> list[SourceSplit]:
    """Return the splits of a source, as `list_splits` lists them with the options of a build."""
    return list_splits(
        builder, source, options.order, options.limit, options.splits, options.channels != RGB, options.hold_out
    )


def list_source(builder: str, source: Path | None, options: BuildOptions) -> Listing:
    """Let the builder list all images of its source."""
    splits = splits_of(builder, source, options)
    # Another machine may have the source of its shards elsewhere.
    paths = options.shards is None
    return Listing(
        [
            ListedSplit(
                split,
                len(split.order),
                digest(split.samples, paths),
                None if paths else spot_check(spot_checked(split)),
            )
            for split in splits
        ],
        None,
    )


def spot_checked(split: SourceSplit) -> list[ImageSource]:
    """Return the images of a split that are compared with those of another source: some, evenly from its order."""
    count = min(SPOT_CHECKED, len(split.order))
    positions = np.linspace(0, len(split.order) - 1, count).astype(np.int64)
    return [split.samples[index].image for index in split.order[positions].tolist()]


def spot_check(images: Iterable[ImageSource]) -> str:
    """Return a SHA-256 of the sizes and some of the bytes of the images' files, wherever these are.

    Of an image in a table it is the end of the table's file, where parquet has what it holds. Images in memory do not
    count: `source.digest` has their pixels.
    """
    result = hashlib.sha256()
    for image in images:
        path = file_of(image)
        if path is None:
            continue
        try:
            with open_regular(os.fspath(path)) as file:
                size = os.fstat(file.fileno()).st_size
                is_whole_file = isinstance(image, str | os.PathLike)
                start = 0 if is_whole_file else image[1] if isinstance(image, tuple) else max(0, size - SPOT_BYTES)
                file.seek(start)
                found = f"{size} {zlib.crc32(file.read(SPOT_BYTES))}\n"
        except OSError:  # a bad image, which the build names
            found = "none\n"
        result.update(found.encode())
    return result.hexdigest()
