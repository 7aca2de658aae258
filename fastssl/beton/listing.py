"""What a builder finds in its source: the images of each split, in the order of the file or of its shards."""

from pathlib import Path
from typing import NamedTuple

from fastssl.beton.format import RGB
from fastssl.beton.options import BuildOptions
from fastssl.beton.source import SourceSplit, digest, list_splits


class ListedSplit(NamedTuple):
    """The images of a split, or those of one shard of it."""

    split: SourceSplit  # `order` and `samples` of the shard only, if one was asked for
    images: int  # of all shards
    sha256: str  # of the whole list, see `source.digest`


class Listing(NamedTuple):
    """What a builder found in its source."""

    splits: list[ListedSplit]
    files: dict[str, int] | None  # see `accounting.count_files`; None: they have not been counted


def list_source(builder: str, source: Path | None, options: BuildOptions) -> Listing:
    """Let the builder list all images of its source."""
    splits = list_splits(builder, source, options.order, options.limit, options.splits, options.channels != RGB)
    # Another machine may have the source of its shards elsewhere.
    paths = options.shards is None
    return Listing([ListedSplit(split, len(split.order), digest(split.samples, paths)) for split in splits], None)
