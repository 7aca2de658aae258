"""ImageNet-1k: 1,281,167 training and 50,000 validation images in 1,000 classes.

SOURCE is a folder with any of these; train or val alone is enough:
    ILSVRC2012_img_train.tar          147,897,477,120 bytes, md5 1d675b47d978889d74fa0da5fadfb00e
    ILSVRC2012_img_val.tar            6,744,924,160 bytes, md5 29b22e2961454d5413ddabcf34fc5622
    train/WNID/*.JPEG                 the training images unpacked
    val/WNID/*.JPEG                   the validation images sorted into classes
    val/ILSVRC2012_val_*.JPEG         the same as they come out of their tar
    ILSVRC/Data/CLS-LOC/{train,val}/  Kaggle's form of the two
The folders may also be called training, validation or valid, in upper or lower case.

Validation images that are not in class folders need their labels in SOURCE too:
    ILSVRC2012_devkit_t12.tar.gz      2.5 MB, md5 fa75699e90414af021442c21a62c3abf; or unpacked
    LOC_val_solution.csv              Kaggle's file

From https://image-net.org/download (free, after registration) or
https://www.kaggle.com/c/imagenet-object-localization-challenge. The tars are read as they are: nothing is unpacked.
Classes are the WordNet ids (WNID) that are found, sorted: with all thousand the labels equal torchvision's. Order: by
class and file name, the same from every form. Terms: non-commercial research and education only, as agreed to at
registration.
"""

import csv
import gzip
import io
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import image_paths, is_image, read_mat, read_text, split_folders, unpack
from beton_builders._shards import tar_members
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder of ImageNet's tars or images"

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, SOLUTION = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
LABEL_FILES = (SOLUTION, f"{DEVKIT}.tar.gz", f"{DEVKIT}/{META}", f"{DEVKIT}/{TRUTH}")
LARGEST_DEVKIT = 1 << 28  # bytes unpacked; the official one has 12 million
KAGGLE = "ILSVRC/Data/CLS-LOC"

Images = list[tuple[str, str | tuple[str, int, int]]]  # file name, and its path or (tar, offset, size)
# Class -> a function that lists its images: one class at a time, since there are a million images.
ImagesByClass = dict[str, Callable[[], Images]]


def splits(source: Path) -> Splits:
    return find_splits("imagenet", source)


def find_splits(builder: str, source: Path, wanted: list[str] | None = None) -> Splits:
    """Return the splits in `source` with the `wanted` classes; None: with all that are found."""
    if source.is_file():
        raise ValueError(f"{builder} expects a folder: name the one that {source} lies in.")
    candidates = {"train": find_train(source), "val": find_val(source)}
    found = {split: classes for split, classes in candidates.items() if classes is not None}
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


def samples(split: str, names: list[str], classes: ImagesByClass) -> Iterator[Sample]:
    for label, wnid in enumerate(names):
        images = classes[wnid]() if wnid in classes else []
        for name, image in sorted(images):
            yield Sample(image, label, f"{split}/{wnid}/{name}")


def find_folder_of(split: str, source: Path) -> Path | None:
    """Return the folder of a split: train, validation, Val, ..."""
    for parent in (source, source / KAGGLE):
        if parent.is_dir():
            folders = split_folders("imagenet", parent)
            if split in folders:
                return parent / folders[split]
    return None


def find_train(source: Path) -> ImagesByClass | None:
    folder = find_folder_of("train", source)
    if folder is not None:
        return class_folders(folder)
    if not (source / TRAIN_TAR).is_file():
        return None
    path = str(source / TRAIN_TAR)  # a tar with one tar per class, all uncompressed
    members = ((os.path.basename(name), offset, size) for name, offset, size in tar_members(path))
    return {name.removesuffix(".tar"): partial(images_in_tar, path, *position) for name, *position in members}


def find_val(source: Path) -> ImagesByClass | None:
    folder = find_folder_of("val", source)
    if folder is not None:
        return class_folders(folder) or sort_into_classes(images_in_folder(folder), source)
    if (source / VAL_TAR).is_file():
        return sort_into_classes(images_in_tar(str(source / VAL_TAR)), source)
    return None


def class_folders(folder: Path) -> ImagesByClass:
    names = [name for name in os.listdir(folder) if re.fullmatch(r"n\d{8}", name)]
    return {name: partial(images_in_folder, folder / name) for name in names}


def images_in_folder(folder: Path) -> Images:
    return [(os.path.basename(path), path) for path in image_paths(str(folder))]


def images_in_tar(path: str, start: int = 0, size: int | None = None) -> Images:
    return [
        (os.path.basename(name), (path, offset, size))
        for name, offset, size in tar_members(path, start, size)
        if is_image(os.path.basename(name))
    ]


def sort_into_classes(images: Images, source: Path) -> ImagesByClass:
    """Sort validation images without class folders by the labels in `source`."""
    wnids = validation_wnids(source)
    found: dict[str, Images] = {}
    for name, image in images:
        wnid = wnids.get(os.path.splitext(name)[0])
        if wnid is None:
            raise ValueError(
                f"The labels in {source} lack the validation image {name}: download images and {DEVKIT}.tar.gz again."
            )
        found.setdefault(wnid, []).append((name, image))
    return {wnid: partial(list, of_class) for wnid, of_class in found.items()}


def validation_wnids(source: Path) -> dict[str, str]:
    """Return the class of each validation image, by its name without .JPEG."""
    archive = source / f"{DEVKIT}.tar.gz"
    if (source / SOLUTION).is_file():
        return read_solution(source / SOLUTION)
    if (source / DEVKIT).is_dir():
        return read_devkit(source / DEVKIT, source / DEVKIT)
    if not archive.is_file():
        raise FileNotFoundError(
            f"The validation images in {source} are in no class folders, so {archive.name} or Kaggle's {SOLUTION} must "
            "be there too: get it from where the images are from."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            with gzip.open(archive) as packed:
                content = packed.read(LARGEST_DEVKIT)
            if len(content) == LARGEST_DEVKIT:
                raise ValueError(f"it has {LARGEST_DEVKIT:,} bytes or more")
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as opened:
                unpack(opened, folder, [f"{DEVKIT}/{name}" for name in (META, TRUTH)])
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, KeyError, ValueError) as error:
            raise ValueError(f"{archive} is not whole ({error}): download it again.") from error
        return read_devkit(Path(folder) / DEVKIT, archive)


def read_devkit(folder: Path, path: Path) -> dict[str, str]:
    """path: what a message names, the folder itself or the archive that it comes from."""
    for name in (META, TRUTH):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: unpack {DEVKIT}.tar.gz again, or leave it packed.")
    try:
        synsets = read_mat(folder / META, ["synsets"])["synsets"].reshape(-1)
        wnids = {int(synset["ILSVRC2012_ID"].item()): str(synset["WNID"].item()) for synset in synsets}
        numbers = read_text(folder / TRUTH).split()
        return {f"ILSVRC2012_val_{position:08}": wnids[int(number)] for position, number in enumerate(numbers, 1)}
    except (ValueError, LookupError, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold ImageNet's {META} and {TRUTH} ({error}): download it again.") from error


def read_solution(path: Path) -> dict[str, str]:
    try:
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in lines}
    except (csv.Error, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold Kaggle's columns ImageId and PredictionString ({error}): download it again."
        ) from error
