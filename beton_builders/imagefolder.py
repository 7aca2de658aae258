"""Your own images, in folders.

    SOURCE/{train,val,test}/CLASS/*.jpg    those splits
    SOURCE/CLASS/*.jpg                     one split, train
    SOURCE/*.jpg                           one split, train, with one class: images without labels

The folder of a split may also hold images without class folders. Classes are the folder names, sorted; every split
must have the same ones. Folders inside a class are searched. Images are files with the suffixes .jpg .jpeg .png .bmp
.gif .tif .tiff .webp in upper or lower case; hidden files and all others are ignored. Order: by class, then by path.
"""

import os
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import class_folders, is_image, samples_by_class

CANVAS = 256
SOURCE = "the folder that holds your images"
SPLITS = ("train", "val", "test")
SPLITS_BY_NAME = True


def splits(source: Path, by_name: bool = True) -> Splits:
    if not source.is_dir():
        raise ValueError(f"imagefolder expects a folder of images, and {source} is a file.")
    folders = {name: name for name in SPLITS if by_name and (source / name).is_dir()} or {"train": ""}
    classes = {name: class_names(source / folder) for name, folder in folders.items()}
    first = next(iter(folders))
    for name in folders:
        different = sorted(set(classes[name]) ^ set(classes[first]))
        if different:
            raise ValueError(
                f"{source / first} and {source / name} must hold the same class folders, and {different[0]!r} is only "
                "in one of them: add the empty folder, or remove the other one."
            )
    found: Splits = {}
    for name, folder in folders.items():
        paths = [os.path.join(folder, label) for label in classes[name] or [""]]
        found[name] = (classes[name] or ["unlabelled"], samples_by_class(source, paths))
    return found


def class_names(root: Path) -> list[str]:
    """Return the class folders of `root`, sorted; none if the images lie directly in it."""
    folders = class_folders(root)
    images = sorted(entry.name for entry in os.scandir(root) if entry.is_file() and is_image(entry.name))
    if folders and images:
        raise ValueError(
            f"{root} holds both folders ({folders[0]}, ...) and images ({images[0]}, ...): move the images into class "
            "folders, or give a --source that holds only one of the two."
        )
    if not folders and not images:
        raise ValueError(f"{root} holds no images and no class folders: check --source.")
    return folders
