"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 px.

    train-images-idx3-ubyte.gz    9.9 MB, md5 f68b3c2dcbeaaa9fbdd348bbdeb94873
    train-labels-idx1-ubyte.gz     29 kB, md5 d53e105ee54ea40749a09fcbcd1e9432
    t10k-images-idx3-ubyte.gz     1.6 MB, md5 9fb629c4189551a2d022fa330f9573f3
    t10k-labels-idx1-ubyte.gz     4.5 kB, md5 ec29112dd5afa0611ce80d1b7f02629c

in SOURCE, SOURCE/raw or SOURCE/MNIST/raw, unpacked or not; from
https://ossci-datasets.s3.amazonaws.com/mnist/ (the copy that torchvision uses; the original was at
http://yann.lecun.com/exdb/mnist/). Splits: train and test; one alone where the other's files are
not there. Order: that of the files. Licence: CC BY-SA 3.0 (LeCun and Cortes).
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fastssl.beton import Sample

CANVAS = 32

CLASSES = [str(digit) for digit in range(10)]
PREFIXES = {"train": "train", "test": "t10k"}
UINT8 = 8  # the idx format's number for it


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    return idx_splits(source, "mnist", "MNIST", CLASSES, "https://ossci-datasets.s3.amazonaws.com/mnist/")


def download(source: Path) -> None:
    """Leaves the four files, packed and unpacked, in SOURCE/MNIST/raw."""
    import torchvision

    torchvision.datasets.MNIST(root=source, download=True)


def idx_splits(
    source: Path | None, builder: str, folder: str, classes: list[str], origin: str
) -> dict[str, tuple[list[str], list[Sample]]]:
    """The splits of a data set with the file names of MNIST, in the first folder with any."""
    if source is None:
        raise ValueError(f"{builder} needs --source, the folder with train-images-idx3-ubyte.gz.")
    for parent in (source, source / "raw", source / folder / "raw"):
        found = {}
        for split, prefix in PREFIXES.items():
            images = find(parent, f"{prefix}-images-idx3-ubyte")
            labels = find(parent, f"{prefix}-labels-idx1-ubyte")
            if images and labels:
                found[split] = (classes, read_split(images, labels, len(classes)))
            elif images or labels:
                kind = "labels-idx1" if images else "images-idx3"
                raise FileNotFoundError(
                    f"{builder} found {(images or labels).name} without {prefix}-{kind}-ubyte in "
                    f"{parent}: get that from {origin} too."
                )
        if found:
            return found
    raise FileNotFoundError(
        f"{builder} found no train-images-idx3-ubyte or t10k-images-idx3-ubyte, with or without "
        f".gz, in {source}, its raw or its {folder}/raw: get the files from {origin}"
    )


def find(parent: Path, name: str) -> Path | None:
    for path in (parent / name, parent / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_split(images_path: Path, labels_path: Path, classes: int) -> list[Sample]:
    images = read_idx(images_path, (28, 28))
    labels = read_idx(labels_path, ())
    if len(images) != len(labels) or (labels >= classes).any():
        raise ValueError(
            f"{labels_path} does not hold a label below {classes} for each of the {len(images):,} "
            f"images of {images_path.name}: download both again."
        )
    name = images_path.name.removesuffix(".gz")
    return [
        Sample(image, label, f"{name}/{number}") for number, (image, label) in enumerate(zip(images, labels.tolist()))
    ]


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """N items of `shape`, uint8.

    The format: two zeros, the number of the type, how many dimensions; their sizes, 4 bytes each,
    the highest first; the values.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): download it again.") from error
    dimensions = 1 + len(shape)
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    head = content[:4] == bytes([0, 0, UINT8, dimensions]) and len(content) >= start
    if not head or tuple(sizes[1:]) != shape:
        what = "28 px images" if shape else "labels"
        raise ValueError(f"{path} is not an idx file of {what}: download it again.")
    if len(content) != start + math.prod(sizes):
        raise ValueError(
            f"{path} has {len(content):,} bytes unpacked, and its head announces "
            f"{start + math.prod(sizes):,}: download it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
