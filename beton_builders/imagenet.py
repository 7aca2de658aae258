"""ImageNet-1k: 1,281,167 training and 50,000 validation images in 1,000 classes.

SOURCE is a folder with any of these; only train or only val will do:
    ILSVRC2012_img_train.tar          147,897,477,120 bytes, md5 1d675b47d978889d74fa0da5fadfb00e
    ILSVRC2012_img_val.tar            6,744,924,160 bytes, md5 29b22e2961454d5413ddabcf34fc5622
    train/WNID/*.JPEG                 the training images unpacked
    val/WNID/*.JPEG                   the validation images sorted into classes
    val/ILSVRC2012_val_*.JPEG         the same as they come out of their tar
    ILSVRC/Data/CLS-LOC/{train,val}/  Kaggle's form of the two

Validation images that are not in class folders need their labels beside them in SOURCE:
    ILSVRC2012_devkit_t12.tar.gz      2.5 MB, md5 fa75699e90414af021442c21a62c3abf; or unpacked
    LOC_val_solution.csv              Kaggle's file

From https://image-net.org/download (free, after registration) or
https://www.kaggle.com/c/imagenet-object-localization-challenge. The tars are read as they are:
nothing is unpacked. Classes are the WordNet ids (WNID) that are there, sorted: with all thousand
the labels equal torchvision's.
Order: by class and file name, the same from every form. Terms: non-commercial research and
education only, as agreed to at registration.
"""

import csv
import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from beton_builders._matfile import read_variables
from beton_builders.imagefolder import image_paths, is_image
from beton_builders.webdataset import tar_files
from fastssl.beton import Sample

CANVAS = 256

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, SOLUTION = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
KAGGLE = "ILSVRC/Data/CLS-LOC"

# An image's file name, and where it is: a path, or the part of a tar.
Found = list[tuple[str, str | tuple[str, int, int]]]
# For each class in a split what lists its images; a class at a time, as there are a million.
Classes = dict[str, Callable[[], Found]]


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    return find_splits("imagenet", source)


def find_splits(
    builder: str, source: Path | None, wanted: list[str] | None = None
) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    """The splits in `source`, of the `wanted` classes or, where None, of all that are there."""
    if source is None:
        raise ValueError(f"{builder} needs --source, the folder of ImageNet's tars or images.")
    if source.is_file():
        raise ValueError(f"{builder} expects a folder: name the one that {source} lies in.")
    found = {"train": find_train(source), "val": find_val(source)}
    found = {split: classes for split, classes in found.items() if classes is not None}
    if not found:
        raise FileNotFoundError(
            f"{builder} found none of {TRAIN_TAR}, {VAL_TAR}, train, val and {KAGGLE} in {source}: "
            "name the folder that holds them."
        )
    names = sorted(wanted or set().union(*found.values()))
    for split, classes in found.items():
        if not classes.keys() & set(names):
            raise ValueError(
                f"The {split} images in {source} hold none of the {len(names)} classes of {builder}: "
                "unpack or download them whole."
            )
    return {split: (names, samples(split, names, classes)) for split, classes in found.items()}


def samples(split: str, names: list[str], classes: Classes) -> Iterator[Sample]:
    for label, wnid in enumerate(names):
        images = classes[wnid]() if wnid in classes else []
        for name, image in sorted(images):
            yield Sample(image, label, f"{split}/{wnid}/{name}")


def find_train(source: Path) -> Classes | None:
    for folder in (source / "train", source / KAGGLE / "train"):
        if folder.is_dir():
            return class_folders(folder)
    if not (source / TRAIN_TAR).is_file():
        return None
    path = str(source / TRAIN_TAR)  # a tar of one tar a class, all uncompressed
    return {
        os.path.basename(name).removesuffix(".tar"): partial(images_in_tar, path, offset, size)
        for name, offset, size in tar_files(path)
    }


def find_val(source: Path) -> Classes | None:
    for folder in (source / "val", source / KAGGLE / "val"):
        if folder.is_dir():
            classes = class_folders(folder)
            if classes:
                return classes
            return sorted_into_classes(images_in_folder(folder), source)
    if (source / VAL_TAR).is_file():
        return sorted_into_classes(images_in_tar(str(source / VAL_TAR)), source)
    return None


def class_folders(folder: Path) -> Classes:
    return {
        name: partial(images_in_folder, folder / name) for name in os.listdir(folder) if re.fullmatch(r"n\d{8}", name)
    }


def images_in_folder(folder: Path) -> Found:
    return [(os.path.basename(path), path) for path in image_paths(folder)]


def images_in_tar(path: str, start: int = 0, size: int | None = None) -> Found:
    return [
        (os.path.basename(name), (path, offset, size))
        for name, offset, size in tar_files(path, start, size)
        if is_image(os.path.basename(name))
    ]


def sorted_into_classes(images: Found, source: Path) -> Classes:
    """The validation images as they come out of their tar, by the labels in `source`."""
    wnids = validation_wnids(source)
    found: dict[str, Found] = {}
    for name, image in images:
        wnid = wnids.get(os.path.splitext(name)[0])
        if wnid is None:
            raise ValueError(
                f"The labels in {source} know no validation image {name}: download the images and "
                f"{DEVKIT}.tar.gz again."
            )
        found.setdefault(wnid, []).append((name, image))
    return {wnid: partial(list, of_class) for wnid, of_class in found.items()}


def validation_wnids(source: Path) -> dict[str, str]:
    """The class of each validation image, by its name without .JPEG."""
    archive = source / f"{DEVKIT}.tar.gz"
    if (source / SOLUTION).is_file():
        return read_solution(source / SOLUTION)
    if (source / DEVKIT).is_dir():
        try:
            meta, truth = ((source / DEVKIT / name).read_bytes() for name in (META, TRUTH))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is missing: unpack {archive.name} again, or leave it packed."
            ) from error
        return read_devkit(meta, truth, source / DEVKIT)
    if not archive.is_file():
        raise FileNotFoundError(
            f"The validation images in {source} are in no class folders, so {archive.name} or "
            f"Kaggle's {SOLUTION} must lie there too: get it from where the images are from."
        )
    try:
        with tarfile.open(archive, "r:gz") as opened:
            files = (opened.extractfile(f"{DEVKIT}/{name}") for name in (META, TRUTH))
            meta, truth = (file.read() for file in files)
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        KeyError,
        ValueError,
        AttributeError,
    ) as error:
        raise ValueError(f"{archive} is not whole ({error}): download it again.") from error
    return read_devkit(meta, truth, archive)


def read_devkit(meta: bytes, truth: bytes, path: Path) -> dict[str, str]:
    try:
        synsets = read_variables(io.BytesIO(meta), ["synsets"])["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"].item()): str(synset["WNID"].item()) for synset in synsets}
        return {f"ILSVRC2012_val_{position:08}": wnids[int(number)] for position, number in enumerate(truth.split(), 1)}
    except (ValueError, LookupError, OverflowError, AttributeError, TypeError, zlib.error) as error:
        raise ValueError(f"{path} does not hold ImageNet's {META} and {TRUTH} ({error}): download it again.") from error


def read_solution(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (csv.Error, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold Kaggle's columns ImageId and PredictionString ({error}): download it again."
        ) from error
