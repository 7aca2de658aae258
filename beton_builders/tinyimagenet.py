"""Tiny ImageNet: 100,000 training and 10,000 validation images of 64 px in 200 classes.

SOURCE is tiny-imagenet-200, the folder that tiny-imagenet-200.zip unpacks to, or the one that holds it (248,100,043
bytes, md5 90528d7ca1a48142e341f4ef8d21d0de, from http://cs231n.stanford.edu/tiny-imagenet-200.zip):
    wnids.txt                         the 200 classes as WordNet ids (WNID), one per line
    train/WNID/images/*.JPEG
    val/images/*.JPEG                 with val/val_annotations.txt: file name, tab, WNID, ...
    val/WNID/*.JPEG                   or so, if somebody has sorted them into class folders

The test images have no published labels and are left out. Class names are the WordNet ids, sorted. Order: by class and
file name. A part of ImageNet, made for Stanford's course CS231n; no license is given, and ImageNet's terms are
non-commercial research and education only.
"""

import os
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import find_folder, parse_lines, read_lines, samples_by_class
from fastssl.beton import Sample

CANVAS = 64
SOURCE = "the folder tiny-imagenet-200"
LABEL_FILES = ("wnids.txt", "val/val_annotations.txt", "*/wnids.txt", "*/val/val_annotations.txt")

FOLDER = "tiny-imagenet-200"


def splits(source: Path) -> Splits:
    root = source / FOLDER if (source / FOLDER).is_dir() else source
    for name in ("wnids.txt", "train", "val"):
        find_folder("tinyimagenet", root, [""], [name], f"unpack {FOLDER}.zip and name its folder")
    classes = sorted(line for line in read_lines(root / "wnids.txt") if line)
    missing = set(classes) - set(os.listdir(root / "train"))
    if missing:
        raise FileNotFoundError(
            f"tinyimagenet found no folder {min(missing)!r:.60} in {root / 'train'}, and wnids.txt names it: unpack "
            f"{FOLDER}.zip again."
        )
    found: Splits = {
        split: (classes, samples_by_class(root, [f"{split}/{name}" for name in classes])) for split in ("train", "val")
    }
    if not (root / "val" / "images").is_dir():
        return found
    path = root / "val" / "val_annotations.txt"
    pattern = r"(?P<name>[^\t]+)\t(?P<label>[^\t]+)(\t.*)?"
    expected = "a file name, a tab and a class of wnids.txt"
    labels = {name: label for label, name in enumerate(classes)}
    images = parse_lines(path, pattern, expected, f"unpack {FOLDER}.zip again", labels)
    listed = sorted((label, f"val/images/{name}") for name, label in images)
    found["val"] = (classes, [Sample(f"{root}/{name}", label, name) for label, name in listed])
    return found
