"""SUN397: 108,754 images in 397 classes of scenes, or 19,850 + 19,850 of its partition 01.

SOURCE is the folder SUN397 that SUN397.tar.gz unpacks to (37 GB, md5
8ca2778205c41d23104230ba66911c7a, from http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz),
or the one it lies in:
    SUN397/ClassName.txt              the classes: /a/abbey, /a/airplane_cabin, ...
    SUN397/a/abbey/sun_*.jpg          the images
    Training_01.txt, Testing_01.txt   optional, in SOURCE, SUN397/ or Partitions/: partition 01 of
                                      Partitions.zip, from the same page's download/; a line an
                                      image: /a/abbey/sun_aaalbzqrimafwbiv.jpg

With the two lists the splits are train and test, 50 images a class in each, as published for
partition 01. Without them there is one split, train, of all images. `download` fetches and checks
the images; the lists it cannot. Order: by class, then by file name; of the lists, theirs. Terms:
"for research purposes only" (https://vision.princeton.edu/projects/2010/SUN/).
"""

import os
from collections.abc import Iterator
from pathlib import Path

from beton_builders.imagefolder import labelled
from beton_builders.tinyimagenet import read_lines
from fastssl.beton import Sample

CANVAS = 256

LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}


def download(source: Path) -> None:
    from torchvision.datasets import SUN397

    SUN397(source, download=True)


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("sun397 needs --source, the folder SUN397.")
    root = source / "SUN397" if (source / "SUN397").is_dir() else source
    if not (root / "ClassName.txt").is_file():
        raise FileNotFoundError(f"sun397 found no ClassName.txt in {root}: unpack SUN397.tar.gz and name its folder.")
    folders = [line.strip("/") for line in read_lines(root / "ClassName.txt") if line]
    for folder in folders:
        if ".." in folder or not (root / folder).is_dir():
            raise FileNotFoundError(
                f"sun397 found no class folder {folder!r:.60} in {root}: unpack SUN397.tar.gz again."
            )
    classes = [folder.partition("/")[2] for folder in folders]  # without the first letter's folder
    lists = find_lists(source, root)
    if not lists:
        return {"train": (classes, all_images(root, folders))}
    return {split: (classes, listed(root, path, folders)) for split, path in lists.items()}


def find_lists(source: Path, root: Path) -> dict[str, Path]:
    """Where each split's list is; none where both are missing."""
    places = (source, root, source / "Partitions", root / "Partitions")
    found = {
        split: place / name for split, name in LISTS.items() for place in reversed(places) if (place / name).is_file()
    }
    if len(found) == 1:
        raise FileNotFoundError(
            f"sun397 found only {next(iter(found.values()))}: put Training_01.txt and "
            "Testing_01.txt of Partitions.zip beside each other, or take it away."
        )
    return found


def all_images(root: Path, folders: list[str]) -> Iterator[Sample]:
    for label, folder in enumerate(folders):
        yield from labelled(root, folder, label)


def listed(root: Path, path: Path, folders: list[str]) -> Iterator[Sample]:
    labels = {folder: label for label, folder in enumerate(folders)}
    for number, line in enumerate(read_lines(path), 1):
        name = line.strip("/")
        folder = os.path.dirname(name)
        if line and folder not in labels:
            raise ValueError(
                f"Line {number} of {path} is in no class of ClassName.txt: {line[:60]!r}; unpack Partitions.zip again."
            )
        if line:
            yield Sample(f"{root}/{name}", labels[folder], name)
