"""STL-10: 5,000 training, 8,000 test and 100,000 unlabelled images of 96 px in ten classes.

    SOURCE/stl10_binary/{train,test}_X.bin    the images, uint8: channel after channel, each column by column (138 and
                                              221 MB)
    SOURCE/stl10_binary/{train,test}_y.bin    their labels, uint8, counted from 1
    SOURCE/stl10_binary/unlabeled_X.bin       the unlabelled images (2.8 GB); may be missing
    SOURCE/stl10_binary/class_names.txt       ten lines

SOURCE may also be the folder stl10_binary itself. It is in stl10_binary.tar.gz (2.6 GB, from
https://cs.stanford.edu/~acoates/stl10/, md5 91f7769df0f17e558f3565bffb0c7dfb), which has to be unpacked. Splits: train,
test, and unlabelled, whose images have no label (-1) and no classes. Order: that of the files. License: none is given;
the authors ask to be cited (Coates, Lee and Ng, An Analysis of Single Layer Networks in Unsupervised Feature Learning,
2011); the images come from ImageNet.
"""

from pathlib import Path

import numpy as np

from beton_builders import Splits
from beton_builders._files import UNLABELLED, find_folder, read_lines
from fastssl.beton import Sample

CANVAS = 96
SOURCE = "the folder stl10_binary or the one that holds it"
DOWNLOAD = [{"dataset": "STL10", "split": "train"}]  # the archive holds every split; train is the smallest to load

ARCHIVE = "stl10_binary.tar.gz"
IMAGE_BYTES = 3 * 96 * 96
MOST_LABELS = 1_000_000  # that are read; the official files have 5,000 and 8,000
HOW_TO_GET = f"get {ARCHIVE} from https://cs.stanford.edu/~acoates/stl10/ and unpack it there (tar -xzf {ARCHIVE})"


def splits(source: Path) -> Splits:
    archive = source if source.name == ARCHIVE else source / ARCHIVE
    unpack = f"unpack it first: tar -xzf '{archive}' -C '{archive.parent}'"
    fix = unpack if archive.is_file() else HOW_TO_GET
    folder = find_folder("stl10", source, ["", "stl10_binary"], ["train_X.bin"], fix)
    classes = read_lines(require(folder / "class_names.txt"))
    if len(classes) != 10:
        raise ValueError(f"{folder}/class_names.txt has {len(classes)} lines instead of 10: unpack {ARCHIVE} again.")
    found: Splits = {}
    for split in ("train", "test"):
        images, labels = open_images(folder / f"{split}_X.bin"), read_labels(folder / f"{split}_y.bin")
        if len(images) != len(labels):
            raise ValueError(
                f"{folder} holds {len(images):,} images in {split}_X.bin and {len(labels):,} labels in {split}_y.bin: "
                f"unpack {ARCHIVE} again."
            )
        found[split] = (classes, samples(images, labels, f"{split}_X.bin"))
    if (folder / "unlabeled_X.bin").is_file():
        images = open_images(folder / "unlabeled_X.bin")
        found["unlabelled"] = ([], samples(images, [UNLABELLED] * len(images), "unlabeled_X.bin"))
    return found


def require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"stl10 expects {path}, which is missing: unpack {ARCHIVE} again.")
    return path


def open_images(path: Path) -> np.ndarray:
    """Return uint8 (N, 96, 96, 3), mapped: an image is read from the disk when it is used."""
    size = require(path).stat().st_size
    if size == 0 or size % IMAGE_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, no multiple of an image's {IMAGE_BYTES:,}: unpack {ARCHIVE} again."
        )
    return np.asarray(np.memmap(path, np.uint8, "r")).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)


def read_labels(path: Path) -> list[int]:
    """Return the labels, counted from 0."""
    labels = np.fromfile(require(path), np.uint8, MOST_LABELS)
    if not ((labels >= 1) & (labels <= 10)).all():
        raise ValueError(f"{path} does not hold labels from 1 to 10: unpack {ARCHIVE} again.")
    return (labels - 1).tolist()


def samples(images: np.ndarray, labels: list[int], file: str) -> list[Sample]:
    return [Sample(image, label, f"{file}/{number}") for number, (image, label) in enumerate(zip(images, labels))]
