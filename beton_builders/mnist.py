"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 px.

    train-images-idx3-ubyte.gz    9.9 MB, md5 f68b3c2dcbeaaa9fbdd348bbdeb94873
    train-labels-idx1-ubyte.gz     29 kB, md5 d53e105ee54ea40749a09fcbcd1e9432
    t10k-images-idx3-ubyte.gz     1.6 MB, md5 9fb629c4189551a2d022fa330f9573f3
    t10k-labels-idx1-ubyte.gz     4.5 kB, md5 ec29112dd5afa0611ce80d1b7f02629c

in SOURCE, SOURCE/raw or SOURCE/MNIST/raw, compressed or not; from https://ossci-datasets.s3.amazonaws.com/mnist/ (the
copy that torchvision uses; the original was at http://yann.lecun.com/exdb/mnist/). Splits: train and test; only one if
the files of the other are missing. Order: that of the files. License: CC BY-SA 3.0 (LeCun and Cortes).
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from beton_builders import Splits
from fastssl.beton import Sample

CANVAS = 32
SOURCE = "the folder with train-images-idx3-ubyte.gz"
DOWNLOAD = [{"dataset": "MNIST"}]

CLASSES = [str(digit) for digit in range(10)]
LARGEST = 1 << 28  # bytes uncompressed; the largest official file has 47 million
PREFIXES = {"train": "train", "test": "t10k"}


def splits(source: Path) -> Splits:
    return idx_splits(source, "mnist", "MNIST", CLASSES, "https://ossci-datasets.s3.amazonaws.com/mnist/")


def idx_splits(source: Path, builder: str, folder: str, classes: list[str], origin: str) -> Splits:
    """Return the splits of a data set with the file names of MNIST, from the first folder that has any."""
    for parent in (source, source / "raw", source / folder / "raw"):
        found: Splits = {}
        for split, prefix in PREFIXES.items():
            images, labels = find(parent, f"{prefix}-images-idx3-ubyte"), find(parent, f"{prefix}-labels-idx1-ubyte")
            if images and labels:
                found[split] = (classes, read_split(images, labels, len(classes)))
            elif present := images or labels:
                missing = f"{prefix}-labels-idx1-ubyte" if images else f"{prefix}-images-idx3-ubyte"
                raise FileNotFoundError(f"{builder} found {present} without {missing}: get that from {origin} too.")
        if found:
            return found
    raise FileNotFoundError(
        f"{builder} found no train-images-idx3-ubyte or t10k-images-idx3-ubyte, with or without .gz, in {source}, its "
        f"raw or its {folder}/raw: get the files from {origin}"
    )


def find(parent: Path, name: str) -> Path | None:
    return next((path for path in (parent / name, parent / f"{name}.gz") if path.is_file()), None)


def read_split(images_path: Path, labels_path: Path, classes: int) -> list[Sample]:
    images, labels = read_idx(images_path, (28, 28)), read_idx(labels_path, ())
    if len(images) != len(labels) or (labels >= classes).any():
        raise ValueError(
            f"{labels_path} does not hold a label below {classes} for each of the {len(images):,} images of "
            f"{images_path.name}: download both again."
        )
    name = images_path.name.removesuffix(".gz")
    return [Sample(image, label, f"{name}/{i}") for i, (image, label) in enumerate(zip(images, labels.tolist()))]


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return N items of `shape`, uint8.

    The format: two zeros, the code of the type (8: uint8), the number of dimensions; their sizes, 4 bytes each, most
    significant byte first; the values.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): download it again.") from error
    if len(content) == LARGEST:
        raise ValueError(f"{path} has {LARGEST:,} bytes uncompressed, or more: download it again.")
    dimensions = 1 + len(shape)
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if content[:4] != bytes([0, 0, 8, dimensions]) or tuple(sizes[1:]) != shape:
        what = "28 px images" if shape else "labels"
        raise ValueError(f"{path} is not an idx file of {what}: download it again.")
    expected = start + math.prod(sizes)
    if len(content) != expected:
        raise ValueError(
            f"{path} has {len(content):,} bytes uncompressed, and its header announces {expected:,}: download it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
