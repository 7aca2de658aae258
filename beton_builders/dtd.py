"""Describable Textures (DTD): 5,640 photographs of textures in 47 classes.

    images/CLASS/*.jpg              120 images a class
    labels/{train,val,test}1.txt    the official partition 1 of ten; lines CLASS/NAME.jpg

in SOURCE, SOURCE/dtd or SOURCE/dtd/dtd. They are in dtd-r1.0.1.tar.gz (625 MB, from
https://www.robots.ox.ac.uk/~vgg/data/dtd/, md5 fff73e5086ae6bdbea199a49dfb8a4c1), which has to be
unpacked. Splits: train, val and test, 1,880 images each. Order: that of the lists. Licence: for
research; the authors ask to be cited (Cimpoi et al., Describing Textures in the Wild, 2014).
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fastssl.beton import Sample

CANVAS = 256

ARCHIVE = "dtd-r1.0.1.tar.gz"
SPLITS = ("train", "val", "test")


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("dtd needs --source, the folder that holds images and labels.")
    folder = find_folder(source)
    with os.scandir(folder / "images") as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) != 47:
        raise ValueError(
            f"{folder / 'images'} holds {len(classes)} class folders instead of 47: unpack {ARCHIVE} again."
        )
    return {split: (classes, samples(source, folder, read_list(folder / "labels", split, classes))) for split in SPLITS}


def download(source: Path) -> None:
    """Leaves the archive, and dtd unpacked from it, in SOURCE/dtd."""
    import torchvision

    torchvision.datasets.DTD(root=source, download=True)  # the archive holds every split


def find_folder(source: Path) -> Path:
    for folder in (source, source / "dtd", source / "dtd" / "dtd"):
        if (folder / "images").is_dir() and (folder / "labels").is_dir():
            return folder
    raise FileNotFoundError(
        f"dtd found no folders images and labels in {source}, its dtd or its dtd/dtd: get {ARCHIVE} "
        f"from https://www.robots.ox.ac.uk/~vgg/data/dtd/ and unpack it (tar -xzf {ARCHIVE})."
    )


def read_list(folder: Path, split: str, classes: list[str]) -> list[tuple[str, int]]:
    """The images of a split, each CLASS/NAME.jpg with its label."""
    path = folder / f"{split}1.txt"
    if not path.is_file():
        raise FileNotFoundError(f"dtd expects {path}, which is missing: unpack {ARCHIVE} again.")
    labels = {name: label for label, name in enumerate(classes)}
    images = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        name, slash, file = line.strip().partition("/")
        if name not in labels or "/" in file or not file.endswith(".jpg"):
            raise ValueError(
                f"Line {number} of {path} does not name an image of a class folder: unpack {ARCHIVE} again."
            )
        images.append((f"{name}/{file}", labels[name]))
    if not images:
        raise ValueError(f"{path} is empty: unpack {ARCHIVE} again.")
    return images


def samples(source: Path, folder: Path, images: list[tuple[str, int]]) -> Iterator[Sample]:
    below = os.path.relpath(folder / "images", source)
    for image, label in images:
        yield Sample(f"{source}/{below}/{image}", label, f"{below}/{image}")
