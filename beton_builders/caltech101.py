"""Caltech-101: 8,677 photographs of objects in 101 classes.

    101_ObjectCategories/CLASS/image_0001.jpg ...

in SOURCE, SOURCE/caltech101 or SOURCE/caltech-101. It is in 101_ObjectCategories.tar.gz, which is in caltech-101.zip
(137 MB, from https://data.caltech.edu/records/mzrjq-6wc02, md5 3138e1922a9193bfa496528edbbc45d0); both have to be
unpacked. One split, train: the data set has no official one. BACKGROUND_Google, images without a class, is left out.
Order: by class and file name, upper case first. License: CC BY 4.0; the authors ask to be cited (Fei-Fei, Fergus and
Perona, Learning Generative Visual Models from Few Training Examples, 2004).
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders._files import class_folders, find_folder, samples_by_class

CANVAS = 256
SOURCE = "the folder that holds 101_ObjectCategories"
DOWNLOAD = [{"dataset": "Caltech101"}]

FOLDER, NO_CLASS = "101_ObjectCategories", "BACKGROUND_Google"
HOW_TO_GET = (
    "get caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02, unpack it, and unpack what is in it (unzip "
    f"caltech-101.zip; cd caltech-101; tar -xzf {FOLDER}.tar.gz)"
)


def splits(source: Path) -> Splits:
    folder = find_folder("caltech101", source, ["", "caltech101", "caltech-101"], [FOLDER], HOW_TO_GET) / FOLDER
    classes = [name for name in class_folders(folder) if name != NO_CLASS]
    if len(classes) != 101:
        raise ValueError(
            f"{folder} holds {len(classes)} class folders besides {NO_CLASS} instead of 101: unpack {FOLDER}.tar.gz "
            "again."
        )
    below = folder.relative_to(source)
    return {"train": (classes, samples_by_class(source, [f"{below}/{name}" for name in classes]))}
