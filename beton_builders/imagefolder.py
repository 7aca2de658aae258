"""Your own images, in folders.

    SOURCE/{train,val,test}/CLASS/*.jpg    those splits
    SOURCE/CLASS/*.jpg                     one split, train
    SOURCE/*.jpg                           one split, train: images without labels (-1 is stored)

A folder in SOURCE is a split if its name, in upper or lower case, is train or training; val, valid, validation, dev or
development (the split val); test, testing, eval or evaluation (test). What could be meant in two ways is an error: a
folder of images next to splits, two folders for one split, a class folder that holds such a folder itself, only
names such as train2017 and val2017. With
`--splits none` every folder in SOURCE is a class, whatever its name.

The folder of a split may also hold images without class folders: they have no label. Classes are the folder names,
sorted; every split with classes must have the same ones; a class may be empty. Folders inside a class are searched, and
links to folders followed. Images are the files with a suffix of IMAGE_SUFFIXES in _files.py, such as .jpg .jpeg .jfif
.png .webp .avif .gif .bmp .tif .tiff .ppm .pgm .jp2 .tga, in upper or lower case; with `--channels` other than 3 .npy
too. Hidden files and folders, and what other programs leave behind (LITTER there: __MACOSX, @eaDir, Thumbs.db, ...),
are not read. Order: by class, then by path.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import (
    UNLABELLED,
    class_folders,
    has_image_suffix,
    holds_images,
    is_image,
    split_folders,
    split_word,
    walk,
)
from beton_builders._shards import splits_in
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder that holds your images"
SPLITS_BY_NAME = True
LISTS_ARRAYS = True


def splits(source: Path, by_name: bool = True, arrays: bool = False) -> Splits:
    if not source.is_dir():
        raise ValueError(f"imagefolder expects a folder of images, and {source} is a file.")
    folders = split_folders("imagefolder", source) if by_name else {}
    if not folders:
        classes = class_names(source, arrays)
        if by_name:
            refuse_split_words(source, classes)
        # Without split folders in SOURCE, one in a class at any depth means that SOURCE is a folder too high.
        return {"train": (classes, samples(source, "", classes, by_name, arrays, any_depth=True))}

    others = [
        name for name in class_folders(source) if split_word(name) is None and holds_images(f"{source}/{name}", arrays)
    ]
    if others:
        raise ValueError(
            f"{source} holds {' and '.join(f'{name}/' for name in folders.values())} next to other folders of images, "
            f"{', '.join(f'{name}/' for name in others[:3])}{', ...' if len(others) > 3 else ''}: if all are classes, "
            "use --splits none; if only the first are splits, move the others elsewhere."
        )
    classes_of = {split: class_names(source / folder, arrays) for split, folder in folders.items()}
    check_classes(source, folders, classes_of)
    return {
        split: (classes, samples(source, folders[split], classes, by_name, arrays))
        for split, classes in classes_of.items()
    }


def refuse_split_words(source: Path, classes: list[str]) -> None:
    """Raises ValueError if all class folders have names such as train2017 and val2017."""
    if classes and all(splits_in(name) for name in classes):
        raise ValueError(
            f"{source} holds only folders whose names have words for splits, {', '.join(classes[:3])}: rename them to "
            "train, val and test if they are splits, or use --splits none if they are classes."
        )


def check_classes(source: Path, folders: dict[str, str], classes_of: dict[str, list[str]]) -> None:
    """Raises ValueError if the splits that have classes have different ones, or ones that are splits themselves."""
    labelled = [split for split, classes in classes_of.items() if classes]
    for split in labelled:
        if all(split_word(name) for name in classes_of[split]):
            raise ValueError(
                f"{source / folders[split]} holds only folders that are named as splits, {classes_of[split][0]}/: use "
                f"--source {source / folders[split]}, or rename them."
            )
        different = sorted(set(classes_of[split]) ^ set(classes_of[labelled[0]]))
        if different:
            raise ValueError(
                f"{source / folders[labelled[0]]} and {source / folders[split]} must hold the same class folders, and "
                f"{different[0]!r} is only in one of them: add the empty folder, or remove the other one."
            )


def class_names(root: Path, arrays: bool) -> list[str]:
    """Return the class folders of `root`, sorted; none if the images lie directly in it."""
    folders = class_folders(root)
    images = [name for name in next(walk(str(root))).files if is_image(name, arrays)]
    filled = [name for name in folders if holds_images(f"{root}/{name}", arrays)] if images else folders
    if filled and images:
        raise ValueError(
            f"{root} holds both folders ({filled[0]}, ...) and images ({images[0]}, ...): move the images into class "
            "folders, or give a --source that holds only one of the two."
        )
    if not filled and not images:
        raise ValueError(f"{root} holds no images and no class folders: check --source.")
    return filled


def samples(
    source: Path, split_folder: str, classes: list[str], by_name: bool, arrays: bool, any_depth: bool = False
) -> Iterator[Sample]:
    """Yield the images of a split, those of class folder n with label n.

    With `by_name`, raises ValueError for images in a folder that is named as a split, directly in a class or, with
    `any_depth`, anywhere below it: test images must not become training images.
    """
    prefix = os.path.join(source, "")
    for label, name in enumerate(classes) if classes else [(UNLABELLED, "")]:
        top = os.path.join(prefix, split_folder, name).rstrip("/")
        # Images without classes lie directly in the folder.
        for folder in walk(top) if classes else itertools.islice(walk(top), 1):
            images = [file for file in folder.files if has_image_suffix(file, arrays)]
            if images and by_name:
                refuse_split_folder(source, top, folder.path, any_depth)
            for file in images:
                path = os.path.join(folder.path, file)
                yield Sample(path, label, path.removeprefix(prefix))


def refuse_split_folder(source: Path, top: str, path: str, any_depth: bool) -> None:
    parts = path.removeprefix(top).split("/")[1:]  # folders below the class folder `top`
    for depth, name in enumerate(parts if any_depth else parts[:1]):
        if split_word(name) is not None:
            parent = "/".join([top, *parts[:depth]])
            fix = f"use --source {parent} if it is a data set of its own"
            raise ValueError(
                f"{parent} is a class in {source}, and holds {name}/, which is named as a split: {fix}, or "
                + ("--splits none if all its images are of this class." if any_depth else f"rename {name}/.")
            )
