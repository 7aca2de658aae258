"""WebDataset shards: .tar files of images and labels, as img2dataset and others write them.

    SOURCE/**/*.tar       shards, or SOURCE is one shard; a word of its name, train, val, validation or test, gives the
                          split: imagenet-train-0017.tar. Without one it is train.
    SOURCE/classes.txt    optional: the class names, one per line

In a shard the files of one sample follow each other under one key, the name up to its first dot:
    0001.jpg              the image (.jpg .jpeg .png .webp .bmp .ppm .pgm .gif .tif .tiff)
    0001.cls              its label, counted from 0, as text; or
    0001.json             an object with the label as "label" or "cls"
Without classes.txt the class names are the numbers; images without labels form one class.

The images are read directly from the tar, so the shards must be uncompressed; nothing is unpacked. Order: by shard
name, then as in the shard. License: that of the data in the shards.
"""

import itertools
import json
import re
from array import array
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from beton_builders import Splits
from beton_builders._files import MAX_LABEL, UNLABELLED, files_with_suffix, has_labels, split_of, tar_members
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "a folder of .tar shards or one shard"

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff")
FILE_OF_SAMPLE = re.compile(r"(?P<key>(.*/)?[^/.]+)\.(?P<suffix>[^/]*)", re.DOTALL)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LABEL_BYTES = {"cls": 64, "json": 1 << 24}  # of a file that holds a label, by suffix

Member = tuple[str, int, int]  # name, offset and size in the shard


class Shard(NamedTuple):
    """The images of one shard, without an object per image."""

    path: str
    name: str  # its path within SOURCE
    members: str  # the names of the images, separated by NUL
    offsets: "array[int]"  # offset and size of each image in turn, in bytes
    labels: "array[int]"


def splits(source: Path) -> Splits:
    shards: dict[str, list[Shard]] = {}
    for path, name in files_with_suffix(source, (".tar", *COMPRESSED)):
        if name.lower().endswith(COMPRESSED):
            raise ValueError(f"{path} is compressed, and webdataset reads images from the .tar itself: uncompress it.")
        shards.setdefault(split_of(name), []).append(read_shard(path, name))
    if not shards:
        raise FileNotFoundError(f"webdataset found no .tar shards in {source}: name their folder.")

    classes = class_names(source, [shard for found in shards.values() for shard in found])
    found_splits: Splits = {}
    for split, found in sorted(shards.items()):
        labelled = has_labels([(shard.path, shard.labels) for shard in found], "add a .cls or .json")
        found_splits[split] = (classes if labelled else ["unlabelled"], samples(found))
    return found_splits


def samples(shards: list[Shard]) -> Iterator[Sample]:
    for shard in shards:
        offsets = iter(shard.offsets)
        for member, label in zip(shard.members.split("\0"), shard.labels):
            image = (shard.path, next(offsets), next(offsets))
            yield Sample(image, max(label, 0), f"{shard.name}/{member}")


def read_shard(path: str, name: str) -> Shard:
    members: list[str] = []
    offsets, labels = array("q"), array("q")
    with open(path, "rb") as file:
        for files in samples_in(path):
            label = read_label(path, file, files)
            image = next((files[suffix] for suffix in files if suffix in IMAGES), None)
            if image:
                members.append(image[0])
                offsets.extend(image[1:])
                labels.append(label)
            elif label != UNLABELLED:
                raise ValueError(
                    f"{path} holds the label {next(iter(files.values()))[0]} without an image next to it: the files of "
                    "one sample must follow each other, as tar --sort=name packs them."
                )
    return Shard(path, name, "\0".join(members), offsets, labels)


def samples_in(path: str) -> Iterator[dict[str, Member]]:
    """Yield the files of each sample of a shard, by suffix."""
    matches = ((FILE_OF_SAMPLE.fullmatch(member[0]), member) for member in tar_members(path))
    named = ((match["key"], match["suffix"].lower(), member) for match, member in matches if match)
    for _, sample in itertools.groupby(named, key=itemgetter(0)):
        files: dict[str, Member] = {}
        for _, suffix, member in sample:
            files.setdefault(suffix, member)
        yield files


def read_label(path: str, file: BinaryIO, files: dict[str, Member]) -> int:
    """Return the label in the .cls or the .json of a sample; UNLABELLED if neither has one."""
    suffix = next((suffix for suffix in MAX_LABEL_BYTES if suffix in files), None)
    if suffix is None:
        return UNLABELLED
    name, offset, size = files[suffix]
    file.seek(offset)
    content = file.read(min(size, MAX_LABEL_BYTES[suffix]))
    try:
        if suffix == "cls":
            label = int(content)
        else:
            found = json.loads(content)
            label = found.get("label", found.get("cls", UNLABELLED))
        if type(label) is not int or not UNLABELLED <= label <= MAX_LABEL:
            raise ValueError(f"it is {label!r:.60}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} in {path} must give a label as a whole number, counted from 0 ({error}).") from error
    return label


def class_names(source: Path, shards: list[Shard]) -> list[str]:
    """Return the lines of classes.txt, or the numbers up to the largest label of any split."""
    path = (source if source.is_dir() else source.parent) / "classes.txt"
    largest = max(max(shard.labels, default=-1) for shard in shards)
    if not path.is_file():
        return [str(label) for label in range(largest + 1)]
    try:
        names = [name.strip() for name in path.read_text(encoding="utf-8").split("\n") if name.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as such.") from error
    if largest >= len(names):
        raise ValueError(
            f"{path} names {len(names)} classes, but the shards hold the label {largest}: add a line for each class."
        )
    return names
