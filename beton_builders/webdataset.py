"""WebDataset shards: .tar files of images and labels, as img2dataset and others write them.

    SOURCE/**/*.tar       shards, or SOURCE is one shard. A folder named train, val or test (or by another of Hugging
                          Face's words for them, such as validation) gives the split, or else a word of the name:
                          imagenet-train-0017.tar. If no name has one, or with --splits none, all are train.
    SOURCE/classes.txt    optional: the class names, one per line

In a shard the files of one sample follow each other under one key, the name up to its first dot:
    0001.jpg              the image, with any suffix that imagefolder reads, .ppm or .pgm
    0001.cls              its label, counted from 0, as text; or
    0001.json             an object with the label as "label" or "cls"
Of several images under one key one is taken, .jpg before .jpeg before .png and so on; the others are left out and
counted. If all names have further dots (0001.left.jpg, 0001.right.jpg), each is a sample, with the label in
0001.left.cls, or else in 0001.cls. If a name comes again, a new sample begins. Hard and symbolic links stand for the
file in the shard to which they lead.

Without classes.txt the class names are the numbers. Without a label, or with -1, null, none or nan, an image has none:
-1 is stored.

The images are read directly from the tar, so the shards must be uncompressed; nothing is unpacked. Order: by shard
name, then as in the shard. License: that of the data in the shards.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from beton_builders import Splits
from beton_builders._files import IMAGE_SUFFIXES, MAX_LABEL, UNLABELLED, is_no_label, read_text
from beton_builders._shards import TarMember, files_by_split, tar_contents
from fastssl.beton import LeftOut, Sample

CANVAS = 256
SOURCE = "a folder of .tar shards or one shard"
LABEL_FILES = ("classes.txt",)
SPLITS_BY_NAME = True

FILE_OF_SAMPLE = re.compile(r"(?P<key>(.*/)?[^/.]+)\.(?P<suffix>[^/]*)", re.DOTALL)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LABEL_BYTES = {"cls": 64, "json": 1 << 24}  # of a file that holds a label, by suffix
WHOLE_NUMBER = re.compile(r"(-?[0-9]{1,9})(\.0+)?", re.ASCII)

NOT_USED = "files in shards that are neither the image nor the label of a sample"
FURTHER = "images in shards next to another one of the same sample"

Files = dict[str, TarMember]  # of a sample, by suffix: all after the first dot, in lower case


class Shard(NamedTuple):
    """The images of one shard, without an object per image."""

    path: str
    name: str  # its path within SOURCE
    members: str  # the names of the images, separated by NUL
    offsets: "array[int]"  # offset and size of each image in turn, in bytes
    labels: "array[int]"
    left_out: Counter[str]  # the files that are in no sample, by reason


def splits(source: Path, by_name: bool = True) -> Splits:
    shards: dict[str, list[Shard]] = {}
    for split, files in files_by_split(source, (".tar", *COMPRESSED), by_name).items():
        for path, name in files:
            if name.lower().endswith(COMPRESSED):
                raise ValueError(
                    f"{path} is compressed, and webdataset reads images from the .tar itself: uncompress it."
                )
            shards.setdefault(split, []).append(read_shard(path, name))
    if not shards:
        raise FileNotFoundError(f"webdataset found no .tar shards in {source}: name their folder.")

    classes = class_names(source, [shard for found in shards.values() for shard in found])
    return {
        split: (classes if any(max(shard.labels, default=-1) >= 0 for shard in found) else [], samples(found))
        for split, found in shards.items()
    }


def samples(shards: list[Shard]) -> Iterator[Sample | LeftOut]:
    for shard in shards:
        offsets = iter(shard.offsets)
        for member, label in zip(shard.members.split("\0"), shard.labels):
            yield Sample((shard.path, next(offsets), next(offsets)), label, f"{shard.name}/{member}")
        for reason, count in shard.left_out.items():
            yield LeftOut(reason, count)


def read_shard(path: str, name: str) -> Shard:
    members: list[str] = []
    offsets, labels = array("q"), array("q")
    left_out: Counter[str] = Counter()
    with open(path, "rb") as file:
        for files in samples_in(path, left_out):
            used: set[str] = set()
            for suffix in chosen_images(files):
                image = files[suffix]
                label_files = [each for each in label_suffixes(suffix) if each in files]
                members.append(image.name.replace("\0", "?"))
                offsets.extend((image.offset, image.size))
                labels.append(read_label(path, file, [files[each] for each in label_files]))
                used.update((suffix, *label_files))
            if not any(map(is_image_suffix, files)):
                refuse_label(path, file, files)
            for suffix in files.keys() - used:
                if not is_image_suffix(suffix):
                    left_out[NOT_USED] += 1
                else:
                    left_out[f"images in shards: {files[suffix].problem}" if files[suffix].problem else FURTHER] += 1
    return Shard(path, name, "\0".join(members), offsets, labels, left_out)


def samples_in(path: str, left_out: Counter[str]) -> Iterator[Files]:
    """Yield the files of each sample of a shard; a name without a key is counted in `left_out`."""
    key, files = "", Files()
    for member in tar_contents(path):
        match = FILE_OF_SAMPLE.fullmatch(member.name)
        if match is None:
            left_out[NOT_USED] += 1
            continue
        suffix = match["suffix"].lower()
        if files and (match["key"] != key or suffix in files):
            yield files
            files = Files()
        key = match["key"]
        files[suffix] = member
    if files:
        yield files


def chosen_images(files: Files) -> list[str]:
    """Return the suffixes of the images that become samples: one of those without a further dot, or all others."""
    found = [suffix for suffix in files if is_image_suffix(suffix) and not files[suffix].problem]
    found.sort(key=lambda suffix: IMAGE_SUFFIXES.index("." + suffix.rpartition(".")[2]))
    plain = [suffix for suffix in found if "." not in suffix]
    if plain:
        return plain[:1]
    best: dict[str, str] = {}
    for suffix in found:
        best.setdefault(suffix.rpartition(".")[0], suffix)
    return [suffix for suffix in files if suffix in best.values()]


def is_image_suffix(suffix: str) -> bool:
    return "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def label_suffixes(image: str) -> list[str]:
    """Return the suffixes that the label of an image can have, by the suffix of the image."""
    stem = image.rpartition(".")[0]
    return [f"{stem}.{kind}" for kind in MAX_LABEL_BYTES if stem] + list(MAX_LABEL_BYTES)


def refuse_label(path: str, file: BinaryIO, files: Files) -> None:
    """Raise ValueError if a sample without an image has a label."""
    for suffix, member in files.items():
        if suffix.rpartition(".")[2] in MAX_LABEL_BYTES and read_label(path, file, [member]) != UNLABELLED:
            raise ValueError(
                f"{path} holds the label {member.name} without an image next to it: the files of one sample must "
                "follow each other, as tar --sort=name packs them."
            )


def read_label(path: str, file: BinaryIO, members: list[TarMember]) -> int:
    """Return the first label in these .cls and .json files; UNLABELLED if none has one."""
    for name, offset, size, problem in members:
        if problem:
            raise ValueError(f"{name} in {path}, which should give a label, is {problem}: pack the file itself.")
        kind = name.rpartition(".")[2].lower()
        file.seek(offset)
        content = file.read(min(size, MAX_LABEL_BYTES[kind]))
        try:
            if kind == "cls":
                text = content.decode()
            else:
                found = json.loads(content)
                text = str(found.get("cls") if found.get("label") is None else found["label"])
            if is_no_label(text):
                continue
            match = WHOLE_NUMBER.fullmatch(text.strip())
            if match is None or not UNLABELLED <= int(match[1]) <= MAX_LABEL:
                raise ValueError(f"it is {text.strip()!r:.60}")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{name} in {path} must give a label as a whole number, counted from 0 ({error})."
            ) from error
        return int(match[1])
    return UNLABELLED


def class_names(source: Path, shards: list[Shard]) -> list[str]:
    """Return the lines of classes.txt, or the numbers up to the largest label of any split."""
    path = (source if source.is_dir() else source.parent) / "classes.txt"
    largest = max(max(shard.labels, default=-1) for shard in shards)
    if not path.exists():
        return [str(label) for label in range(largest + 1)]
    try:
        names = [name.strip() for name in read_text(path).split("\n") if name.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as such.") from error
    if largest >= len(names):
        raise ValueError(
            f"{path} names {len(names)} classes, but the shards hold the label {largest}: add a line for each class."
        )
    return names
