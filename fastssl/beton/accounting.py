"""Account for every file of the source: a build ends with a sentence whose numbers add up.

The files are counted here, in a walk of their own, and not by the builders: what a builder passes over is seen too.
"""

import importlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastssl.beton.source import SourceSplit, as_utf8, file_of
from fastssl.common.terminal import count_of

MOST_NAMES = 4  # suffixes, folders or names that are listed for a number


def account_for_files(
    builder: str,
    source: Path | None,
    splits: list[SourceSplit],
    used: int,
    bad: int,
    use: str = "stored",
    arrays: bool = False,
    in_other_shards: int = 0,
    files: dict[str, int] | None = None,
) -> str:
    """Return what happened to each file below `source`, if it is a folder, and to each image that the builder listed.

    Args:
        used, bad: numbers of images of all splits. The listed images that are neither were left out by `limit`.
        use: what was done with the images that are good.
        arrays: whether .npy files are images.
        in_other_shards: images that a build of one shard leaves to the others.
        files: what `count_files` has returned; None: they are counted now; {}: nothing is said about files.
    """
    listed = sum(len(split.samples) for split in splits)
    images = {
        use: used,
        "bad": bad,
        "in other shards": in_other_shards,
        "left out by --limit": listed - used - bad - in_other_shards,
    }
    for split in splits:
        for reason, count in split.left_out.items():
            images[f"left out: {reason}"] = images.get(f"left out: {reason}", 0) + count
    noun = "images and other entries" if any(split.left_out for split in splits) else "images"
    parts = [f"Of {sum(images.values()):,} {noun}: " + _listed(images)]
    files = count_files(builder, source, splits, arrays) if files is None else files
    if files:
        parts.insert(0, f"Of {count_of(sum(files.values()), 'file')} in {source}: " + _listed(files))
    return as_utf8(" ".join(f"{part}." for part in parts))


def count_files(builder: str, source: Path | None, splits: list[SourceSplit], arrays: bool) -> dict[str, int] | None:
    """Count the files below `source` by what they are to the builder; None if it is no folder."""
    if source is None or not source.is_dir():
        return None
    rules = importlib.import_module("beton_builders._files")  # not at the start: it imports fastssl.beton
    hash_I = _hashes_of_files(splits)
    used = unused_images = special = 0
    litter: Counter[str] = Counter()
    others: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    for folder in rules.walk(str(source), litter=True):
        paths = [os.path.join(folder.path, name) for name in folder.files]
        is_used_F = _is_in(np.fromiter(map(hash, paths), np.int64, len(paths)), hash_I)
        used += int(is_used_F.sum())
        special += len(folder.special)
        for name, is_used in zip(folder.files, is_used_F.tolist()):
            if is_used:
                continue
            if folder.litter or rules.is_litter(name):
                litter[folder.litter or name] += 1
            elif rules.has_image_suffix(name, arrays):
                unused_images += 1
                folders[os.path.relpath(folder.path, source).split(os.sep)[0]] += 1
            else:
                others[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    unused = "image" if unused_images == 1 else "images"
    return {
        "read": used,
        f"litter of other programs{_examples(litter)}": litter.total(),
        f"not images by their suffix{_examples(others)}": others.total(),
        f"{unused} that {builder} does not read{_examples(folders, 'in ')}": unused_images,
        "pipes, sockets or devices": special,
    }


def _hashes_of_files(splits: list[SourceSplit]) -> np.ndarray:
    """Return the sorted hashes of the paths that samples are read from: 8 bytes for each, where a set takes 100."""

    def hashes() -> Iterable[int]:
        previous = None
        for split in splits:
            for image, _, _ in split.samples:
                path = file_of(image)
                if path is not None and path != previous:
                    yield hash(os.fspath(path))
                    previous = path

    return np.unique(np.fromiter(hashes(), np.int64))


def _is_in(hash_F: np.ndarray, hash_I: np.ndarray) -> np.ndarray:
    """Whether each of a few hashes is among many sorted ones; np.isin would sort the many again."""
    if not len(hash_I):
        return np.zeros(len(hash_F), bool)
    position_F = np.minimum(np.searchsorted(hash_I, hash_F), len(hash_I) - 1)
    is_in_F: np.ndarray = hash_I[position_F] == hash_F
    return is_in_F


def _examples(counts: Counter[str], prefix: str = "") -> str:
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = ", ".join(f"{prefix}{name} {count:,}" for name, count in largest[:MOST_NAMES])
    return f" ({names}{', ...' if len(counts) > MOST_NAMES else ''})" if counts else ""


def _listed(counts: dict[str, int]) -> str:
    """Return the numbers that are not 0, the first one in any case."""
    first = next(iter(counts))
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == first)
