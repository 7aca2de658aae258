"""WebDataset shards: .tar files of images and labels, as img2dataset and others write them.

    SOURCE/**/*.tar       shards, or SOURCE is one shard; a word of its name, train, val, validation
                          or test, says the split: imagenet-train-0017.tar. Without one it is train.
    SOURCE/classes.txt    optional: the class names, one a line

In a shard the files of one sample stand together under one key, the name up to its first dot:
    0001.jpg              the image (.jpg .jpeg .png .webp .bmp .ppm .pgm .gif .tif .tiff)
    0001.cls              its label, counted from 0, as text; or
    0001.json             an object with the label as "label" or "cls"
Without classes.txt the class names are the numbers; images without labels are of one class.

The images are read where they lie in the tar, so the shards must be uncompressed; nothing is
unpacked. Order: by shard name, then as in the shard. Licence: that of the data in the shards.
"""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastssl.beton import Sample

CANVAS = 256

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
UNLABELLED = -1
LARGEST_LABEL = 10**6  # a larger one is no class but, say, the number of the image
LARGEST_FILE = {"cls": 64, "json": 1 << 24}  # bytes, of which a label is read


class Shard(NamedTuple):
    """The images of one shard, without an object for each."""

    path: str
    name: str  # its path within SOURCE
    members: str  # the images' names, with NUL between them
    places: array  # offset and size of each image
    labels: array


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("webdataset needs --source, a folder of .tar shards or one shard.")
    shards: dict[str, list[Shard]] = {}
    for path, name in files_ending(source, (".tar", *COMPRESSED)):
        if name.lower().endswith(COMPRESSED):
            raise ValueError(
                f"{path} is compressed, and webdataset reads images where they lie in the shard: "
                "uncompress it to a .tar."
            )
        shards.setdefault(split_of(name), []).append(read_shard(path, name))
    if not shards:
        raise FileNotFoundError(f"webdataset found no .tar shards in {source}: name their folder.")

    classes = class_names(source, list(shards.values()))
    return {
        split: (classes if is_labelled(found) else ["unlabelled"], samples(found))
        for split, found in sorted(shards.items())
    }


def files_ending(source: Path, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(path, path within SOURCE) of the files that end so, sorted; or SOURCE itself, a file."""
    if source.is_file():
        return [(str(source), source.name)] if source.name.lower().endswith(suffixes) else []
    start = os.path.join(source, "")
    paths = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(start)
        for name in names
        if name.lower().endswith(suffixes) and not name.startswith(".")
    ]
    return sorted((path, path.removeprefix(start)) for path in paths)


def split_of(name: str) -> str:
    """The split that a word of the file's name, or else of a folder's, says; without one, train."""
    for part in reversed(name.lower().split("/")):
        for word in re.split("[^a-z]+", part):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def read_shard(path: str, name: str) -> Shard:
    members, places, labels = [], array("q"), array("q")
    with open(path, "rb") as file:
        for files in samples_in(path):
            label = read_label(path, file, files)
            image = next((files[suffix] for suffix in files if suffix in IMAGES), None)
            if image:
                members.append(image[0])
                places.extend(image[1:])
                labels.append(label)
            elif label != UNLABELLED:
                raise ValueError(
                    f"{path} holds the label {next(iter(files.values()))[0]} with no image beside "
                    "it: the files of one sample must follow each other, as tar --sort=name packs."
                )
    return Shard(path, name, "\0".join(members), places, labels)


def samples_in(path: str) -> Iterator[dict[str, tuple[str, int, int]]]:
    """For each sample of a shard its files: {suffix: (name, offset, size)}."""
    current, files = None, {}
    for name, offset, size in tar_files(path):
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            continue
        if (folder, stem) != current:
            if files:
                yield files
            current, files = (folder, stem), {}
        files.setdefault(suffix.lower(), (name, offset, size))
    if files:
        yield files


def tar_files(path: str, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in an uncompressed tar, which may be a part of `path`."""
    end = os.path.getsize(path) if size is None else start + size
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                position = start
                while (member := archive.next()) is not None:
                    archive.members.clear()  # it would keep every one
                    if not position < archive.offset <= end:
                        raise tarfile.ReadError(f"{member.name} goes on beyond its end")
                    position = archive.offset
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
                # Where a header is damaged, tarfile stops as if the tar ended there.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole, uncompressed tar ({error}): download or copy it again.") from error


def read_label(path: str, file: BinaryIO, files: dict[str, tuple[str, int, int]]) -> int:
    """What the .cls or the .json of a sample says; UNLABELLED where neither gives a label."""
    suffix = next((suffix for suffix in LARGEST_FILE if suffix in files), None)
    if suffix is None:
        return UNLABELLED
    name, offset, size = files[suffix]
    file.seek(offset)
    content = file.read(min(size, LARGEST_FILE[suffix]))
    try:
        if suffix == "cls":
            label = int(content)
        else:
            found = json.loads(content)
            label = found.get("label", found.get("cls", UNLABELLED))
        if type(label) is not int or not UNLABELLED <= label <= LARGEST_LABEL:
            raise ValueError(f"it is {label!r:.60}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} in {path} must give a label as a whole number, counted from 0 ({error}).") from error
    return label


def is_labelled(shards: list[Shard]) -> bool:
    """Whether the images of these shards have labels; all or none must."""
    without = [shard.path for shard in shards if UNLABELLED in shard.labels]
    labelled = any(label != UNLABELLED for shard in shards for label in shard.labels)
    if without and labelled:
        raise ValueError(f"{without[0]} holds images without a label, and others have one: add a .cls or .json.")
    return labelled


def class_names(source: Path, shards: list[list[Shard]]) -> list[str]:
    """The lines of classes.txt, or the numbers that are labels in any split."""
    path = (source if source.is_dir() else source.parent) / "classes.txt"
    largest = max(max(shard.labels, default=-1) for found in shards for shard in found)
    if not path.is_file():
        return [str(label) for label in range(largest + 1)]
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as such.") from error
    names = [name.strip() for name in names if name.strip()]
    if largest >= len(names):
        raise ValueError(
            f"{path} names {len(names)} classes, but the shards hold the label {largest}: add a line for each class."
        )
    return names


def samples(shards: list[Shard]) -> Iterator[Sample]:
    for shard in shards:
        places = iter(shard.places)
        for member, label in zip(shard.members.split("\0"), shard.labels):
            place = (shard.path, next(places), next(places))
            yield Sample(place, max(label, 0), f"{shard.name}/{member}")
