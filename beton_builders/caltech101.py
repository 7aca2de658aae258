"""Caltech-101: 8,677 photographs of objects in 101 classes.

    101_ObjectCategories/CLASS/image_0001.jpg ...

in SOURCE, SOURCE/caltech101 or SOURCE/caltech-101. It is in 101_ObjectCategories.tar.gz, which is
in caltech-101.zip (137 MB, from https://data.caltech.edu/records/mzrjq-6wc02, md5
3138e1922a9193bfa496528edbbc45d0); both have to be unpacked. One split, train: the data set has no
official one. BACKGROUND_Google, pictures of no class, is left out. Order: by class and file name,
capitals first. Licence: CC BY 4.0; the authors ask to be cited (Fei-Fei, Fergus and Perona,
Learning Generative Visual Models from Few Training Examples, 2004).
"""

import os
from collections.abc import Iterator
from pathlib import Path

from beton_builders.cifar10 import class_samples
from fastssl.beton import Sample

CANVAS = 256

FOLDER, NO_CLASS = "101_ObjectCategories", "BACKGROUND_Google"


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError(f"caltech101 needs --source, the folder that holds {FOLDER}.")
    for below in (FOLDER, f"caltech101/{FOLDER}", f"caltech-101/{FOLDER}"):
        if (source / below).is_dir():
            classes = class_names(source / below)
            return {"train": (classes, class_samples(source, below, classes))}
    raise FileNotFoundError(
        f"caltech101 found no {FOLDER} in {source}, its caltech101 or its caltech-101: get "
        "caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02, unpack it, and unpack "
        f"what is in it (unzip caltech-101.zip; cd caltech-101; tar -xzf {FOLDER}.tar.gz)."
    )


def download(source: Path) -> None:
    """Fetches Caltech's own zip and leaves SOURCE/caltech101/101_ObjectCategories of it."""
    import torchvision

    torchvision.datasets.Caltech101(root=source, download=True)


def class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        folders = {entry.name for entry in entries if entry.is_dir()}
    names = sorted(name for name in folders - {NO_CLASS} if not name.startswith("."))
    if len(names) != 101:
        raise ValueError(
            f"{folder} holds {len(names)} class folders besides {NO_CLASS} instead of 101: "
            f"unpack {FOLDER}.tar.gz again."
        )
    return names
