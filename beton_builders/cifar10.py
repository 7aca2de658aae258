"""CIFAR-10: 50,000 training and 10,000 test images of 32 px in ten classes.

SOURCE is one of
    cifar-10-python.tar.gz    the official archive, or the folder it lies in (163 MB, from
                              https://www.cs.toronto.edu/~kriz/cifar.html, md5
                              c58f30108f718f92721af3b95e74349a)
    cifar-10-batches-py/      that archive unpacked, or the folder it lies in
    {train,test}/CLASS/*      folders of image files, one a class

The official training images become train, the test images val. Order: that of the archive, or
by class and file name. Licence: the authors ask to be cited (Krizhevsky, Learning Multiple Layers
of Features from Tiny Images, 2009); the images come from the web, for research.
"""

import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastssl.beton import Sample

CANVAS = 32

CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
CLASS_FOLDERS = {"train": "train", "val": "test"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is None:
        raise ValueError(f"cifar10 needs --source, {ARCHIVE} or the folder it lies in.")
    if source.is_file():
        return from_archive(source)
    if (source / "data_batch_1").is_file():
        return from_folder(source)
    if (source / FOLDER).is_dir():
        return from_folder(source / FOLDER)
    if (source / ARCHIVE).is_file():
        return from_archive(source / ARCHIVE)
    if (source / "train").is_dir():
        return from_class_folders(source)
    raise FileNotFoundError(
        f"cifar10 found none of {ARCHIVE}, {FOLDER} and the folders train and test in {source}: "
        "get the archive from https://www.cs.toronto.edu/~kriz/cifar.html and name its folder."
    )


def from_class_folders(source: Path) -> dict[str, tuple[list[str], list[Sample]]]:
    found = {}
    for split, folder in CLASS_FOLDERS.items():
        samples = []
        for label, name in enumerate(CLASSES):
            if not (source / folder / name).is_dir():
                raise FileNotFoundError(
                    f"cifar10 expects the class folder {source / folder / name}, which is missing: "
                    "unpack the images again, or use imagefolder for classes of your own."
                )
            for path in sorted((source / folder / name).iterdir()):
                if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                    samples.append(Sample(path, label, str(path.relative_to(source))))
        found[split] = (CLASSES, samples)
    return found


def from_folder(folder: Path) -> dict[str, tuple[list[str], list[Sample]]]:
    def load(batch: str) -> dict:
        with open(folder / batch, "rb") as file:
            return read_batch(file, f"{folder}/{batch}")

    return from_batches(load)


def from_archive(path: Path) -> dict[str, tuple[list[str], list[Sample]]]:
    """Read the batches out of the archive; nothing is unpacked to the disk."""
    try:
        with tarfile.open(path) as archive:

            def load(batch: str) -> dict:
                return read_batch(archive.extractfile(f"{FOLDER}/{batch}"), f"{path}, {batch}")

            return from_batches(load)
    except (tarfile.TarError, EOFError, zlib.error, KeyError, OSError) as error:
        raise ValueError(
            f"{path} is not the whole {ARCHIVE} ({error}): download it again."
        ) from error


def from_batches(load: Callable[[str], dict]) -> dict[str, tuple[list[str], list[Sample]]]:
    found = {}
    for split, batches in BATCHES.items():
        samples = []
        for batch in batches:
            content = load(batch)
            pixels = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for number, (image, label) in enumerate(zip(pixels, content[b"labels"], strict=True)):
                samples.append(Sample(image, label, f"{batch}/{number}"))
        found[split] = (CLASSES, samples)
    return found


def read_batch(file: BinaryIO, name: str) -> dict:
    """One batch: b"data" uint8 (N, 3072), channel by channel, and b"labels", N integers."""
    try:
        content = PlainUnpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is not a batch of CIFAR-10 ({error}): download it again."
        ) from error
    data = content.get(b"data") if isinstance(content, dict) else None
    labels = content.get(b"labels") if isinstance(content, dict) else None
    whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)
    if not whole or not isinstance(labels, list) or len(labels) != len(data):
        raise ValueError(f"{name} does not hold CIFAR-10's data and labels: download it again.")
    return content


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a pickle from the web could otherwise run any program."""

    ALLOWED: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy's function that makes an empty array; the module it is found in has moved
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image data needs")
        return self.ALLOWED[module, name]
