"""Tiny ImageNet: 100,000 training and 10,000 validation images of 64 px in 200 classes.

SOURCE is tiny-imagenet-200, the folder that tiny-imagenet-200.zip unpacks to, or the one it lies
in (248,100,043 bytes, md5 90528d7ca1a48142e341f4ef8d21d0de, from
http://cs231n.stanford.edu/tiny-imagenet-200.zip):
    wnids.txt                         the 200 classes as WordNet ids (WNID), one a line
    train/WNID/images/*.JPEG
    val/images/*.JPEG                 with val/val_annotations.txt: file name, tab, WNID, ...
    val/WNID/*.JPEG                   or so, where somebody has sorted them into class folders

The test images have no published labels and are left out. Class names are the WordNet ids,
sorted. Order: by class and file name. A part of ImageNet, made for Stanford's course CS231n; no
licence is given, and ImageNet's terms are non-commercial research and education only.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from beton_builders.imagefolder import labelled
from fastssl.beton import Sample

CANVAS = 64

FOLDER = "tiny-imagenet-200"


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError(f"tinyimagenet needs --source, the folder {FOLDER}.")
    root = source / FOLDER if (source / FOLDER).is_dir() else source
    for name in ("wnids.txt", "train", "val"):
        if not (root / name).exists():
            raise FileNotFoundError(f"tinyimagenet found no {name} in {root}: unpack {FOLDER}.zip and name its folder.")
    classes = sorted(line for line in read_lines(root / "wnids.txt") if line)
    missing = set(classes) - set(os.listdir(root / "train"))
    if missing:
        raise FileNotFoundError(
            f"tinyimagenet found no folder {min(missing)!r:.60} in {root / 'train'}, and wnids.txt "
            f"names it: unpack {FOLDER}.zip again."
        )
    val = root / "val" / "val_annotations.txt"
    in_folders = not (root / "val" / "images").is_dir()
    return {
        "train": (classes, from_folders(root, "train", classes)),
        "val": (
            classes,
            from_folders(root, "val", classes) if in_folders else from_list(root, val, classes),
        ),
    }


def from_folders(root: Path, split: str, classes: list[str]) -> Iterator[Sample]:
    for label, name in enumerate(classes):
        yield from labelled(root, os.path.join(split, name), label)


def from_list(root: Path, path: Path, classes: list[str]) -> Iterator[Sample]:
    """The images in val/images, of the classes in val_annotations.txt."""
    labels = {name: label for label, name in enumerate(classes)}
    found = []
    for number, line in enumerate(read_lines(path), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if line and wnid not in labels:
            raise ValueError(
                f"Line {number} of {path} must be a file name, a tab and a class of wnids.txt, "
                f"not {line[:60]!r}: unpack {FOLDER}.zip again."
            )
        if line:
            found.append((labels[wnid], name))
    for label, name in sorted(found):
        yield Sample(f"{root}/val/images/{name}", label, f"val/images/{name}")


def read_lines(path: Path) -> list[str]:
    """The lines of a small text file, without the spaces at their ends."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: unpack the archive again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}): unpack the archive again.") from error
