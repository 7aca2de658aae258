"""A data set in shards: several .beton files that every command reads as one.

OUT/train-00000-of-00064.beton and so on hold consecutive slices of one list of images, in one random order. The set is
named by the pattern OUT/train-*-of-00064.beton, or by the folder OUT. Its samples are those of the first shard, then
those of the second one, and so on: the samples of the file that a build without shards makes, in the same order.

Shards that are not in one folder are named by a list, NAME.shards: a text file with the path of one on each line,
relative to its folder. The order of the lines is that of the samples.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from fastssl.common.errors import UserError, quote
from fastssl.common.files import read_text
from fastssl.common.terminal import listed

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.beton")
SET = re.compile(r"(.+)-\*-of-(\d{5})\.beton")
MOST_SHARDS = 99_999  # five digits
LIST_SUFFIX = ".shards"


class Shard(NamedTuple):
    """Which slice of the images of a split a file holds."""

    number: int  # from 0
    shards: int  # of how many

    @property
    def suffix(self) -> str:
        return f"-{self.number:05}-of-{self.shards:05}"

    def bounds(self, samples: int) -> slice:
        """Return the positions of this shard's images among those of all shards."""
        return slice(samples * self.number // self.shards, samples * (self.number + 1) // self.shards)


def shard_path(out: Path, split: str, shard: Shard) -> Path:
    return out / f"{split}{shard.suffix}.beton"


def set_path(out: Path, split: str, count: int) -> Path:
    """Return the pattern that names all shards of a split."""
    return out / f"{split}-*-of-{count:05}.beton"


def set_of(shard: Path) -> Path:
    """Return the pattern of the set that a shard belongs to."""
    found = SHARD.fullmatch(shard.name)
    assert found is not None
    return set_path(shard.parent, found[1], int(found[3]))


def set_manifest_path(pattern: Path) -> Path:
    """OUT/train-of-00064.beton.json: what the manifests of all shards of a set hold together, see set_manifest.py."""
    return pattern.with_name(pattern.name.replace("-*-of-", "-of-") + ".json")


def check_shards(split: str, images: int, out: Path, shards: int | None) -> None:
    """Refuse shards without an image, and a second set: nobody would know which of them a folder stands for."""
    own = out / f"{split}.beton" if shards is None else set_path(out, split, shards)
    there = [path for path in (out / f"{split}.beton", *sets_in(out, split)) if exists(path) and path != own]
    if there:
        raise UserError(
            f"{there[0]} exists, and a folder holds the split {split!r} once, as one file or in shards",
            hint="use another --out, or delete it",
        )
    if shards is not None and shards > images:
        raise UserError(
            f"--shards {shards:,} are more than the {images:,} images of the split {split!r}",
            hint=f"use --shards {images} or less",
        )


def is_shard(path: Path) -> bool:
    return SHARD.fullmatch(path.name) is not None


def is_set(path: Path) -> bool:
    """Whether a path stands for several files: a list of them, or a pattern, which has a * and is not there itself."""
    return path.suffix == LIST_SUFFIX or ("*" in path.name and not os.path.lexists(path))


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, or a file that the pattern of a set matches."""
    return path.exists() or ("*" in path.name and any(path.parent.glob(path.name)))


def split_of(path: Path) -> str:
    """Return train for train.beton, for a shard of it and for the pattern of its shards."""
    for form in (SET, SHARD):
        if found := form.fullmatch(path.name):
            return found[1]
    return path.stem.replace("*", "")


def sets_in(folder: Path, split: str) -> list[Path]:
    """Return the patterns of the sets of shards of a split in a folder; more than one if builds were mixed."""
    found = (SHARD.fullmatch(file.name) for file in folder.glob(f"{split}-*-of-*.beton"))
    counts = {int(each[3]) for each in found if each and each[1] == split}  # not train-extra for train
    return [set_path(folder, split, count) for count in sorted(counts)]


def files_of(path: Path) -> list[Path]:
    """Return the files of a set in the order of their names or of its list, or `path` itself if it is one file.

    Raises UserError if the pattern matches no file, if it names all shards of a build and one of them is missing, or if
    the list cannot be read or names something else.
    """
    if not is_set(path):
        return [path]
    if path.suffix == LIST_SUFFIX:
        return _files_of_list(path)
    files = sorted(path.parent.glob(path.name))
    whole = SET.fullmatch(path.name)
    if whole:
        files = [file for file in files if split_of(file) == whole[1]]
    if not files:
        raise UserError(f"No file matches {path}", hint="build it with `fastssl build-beton ... --shards N`")
    if whole:
        count = int(whole[2])
        numbers = {int(found[2]) for file in files if (found := SHARD.fullmatch(file.name))}
        if missing := sorted(set(range(count)) - numbers):
            named = listed([str(shard) for shard in missing[:5]], len(missing))
            raise UserError(
                f"{len(missing):,} of the {count:,} shards of {path} are missing: {named}",
                hint=f"build each one with `fastssl build-beton ... --shards {count} --shard NUMBER`",
            )
    return files


def _files_of_list(path: Path) -> list[Path]:
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        raise UserError(f"No file {path}", hint="write the path of a shard on each line of it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(
            f"{path} cannot be read ({reason})", hint="write the path of a shard on each line of it"
        ) from error
    files = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if not name.endswith(".beton") or "\0" in name:
            raise UserError(
                f"Line {number} of {path}, {quote(name)}, is not the path of a .beton",
                hint="write the path of a shard on each line",
            )
        files.append(path.parent / os.path.expanduser(name))
    if not files:
        raise UserError(f"{path} names no files", hint="write the path of a shard on each line")
    return files
