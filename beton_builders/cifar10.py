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

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterable[Sample]]]:
    if source is None:
        raise ValueError(f"cifar10 needs --source, {ARCHIVE} or the folder it lies in.")
    batches = read_official(source, ARCHIVE, FOLDER, [*BATCHES["train"], *BATCHES["val"]])
    if batches is not None:
        found = {}
        for split, names in BATCHES.items():
            samples = []
            for name in names:
                samples += batch_samples(batches[name], b"labels", CLASSES, name, source)
            found[split] = (CLASSES, samples)
        return found
    if (source / "train").is_dir():
        return from_class_folders(source)
    raise FileNotFoundError(
        f"cifar10 found none of {ARCHIVE}, {FOLDER} and the folders train and test in {source}: "
        "get the archive from https://www.cs.toronto.edu/~kriz/cifar.html and name its folder."
    )


def download(source: Path) -> None:
    """Leaves cifar-10-python.tar.gz, and cifar-10-batches-py unpacked from it, in `source`."""
    import torchvision

    torchvision.datasets.CIFAR10(root=source, download=True)


def from_class_folders(source: Path) -> dict[str, tuple[list[str], Iterable[Sample]]]:
    for folder in CLASS_FOLDERS.values():
        for name in CLASSES:
            if not (source / folder / name).is_dir():
                raise FileNotFoundError(
                    f"cifar10 expects the class folder {source / folder / name}, which is missing: "
                    "unpack the images again, or use imagefolder for classes of your own."
                )
    return {split: (CLASSES, class_samples(source, folder, CLASSES)) for split, folder in CLASS_FOLDERS.items()}


# What follows reads the layouts of other data sets too.


def class_samples(source: Path, folder: str, classes: list[str]) -> Iterator[Sample]:
    """The images of SOURCE/`folder`/CLASS, by class and file name."""
    for label, name in enumerate(classes):
        for file in sorted(os.listdir(source / folder / name)):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                within = f"{folder}/{name}/{file}"
                yield Sample(f"{source}/{within}", label, within)


def read_official(source: Path, archive: str, folder: str, names: list[str]) -> dict | None:
    """The content of the files `names`, from the archive or its folder; None without either.

    `source` is the archive or the folder, or what it lies in.
    """
    for parent in (source, source / folder):
        if any((parent / name).is_file() for name in names):
            return {name: read_file(parent / name) for name in names}
    for path in (source, source / archive):
        if path.is_file():
            return read_archive(path, archive, folder, names)
    return None


def read_file(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: unpack the archive again.")
    return unpickled(path.read_bytes(), str(path))


def read_archive(path: Path, official: str, folder: str, names: list[str]) -> dict:
    """Read the files out of the archive in one pass; nothing is unpacked to the disk."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix(f"{folder}/")
                if name in names and member.isfile():
                    content = archive.extractfile(member).read()
                    files[name] = unpickled(content, f"{path}, {name}")
            archive.fileobj.read()  # to the end, where gzip compares its checksum
        if missing := [name for name in names if name not in files]:
            raise tarfile.TarError(f"it has no {folder}/{missing[0]}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = str(error).partition(":\n")[0]  # tarfile lists all that it tried
        raise ValueError(f"{path} is not the whole {official} ({reason}): download it again.") from error
    return files


def unpickled(content: bytes, name: str) -> dict:
    """One file of CIFAR, a dictionary whose keys are bytes."""
    try:
        values = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())  # some have two lines
        raise ValueError(f"{name} is damaged ({reason}): download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a file of CIFAR: download it again.")
    return values


def batch_samples(batch: dict, labels_key: bytes, classes: list[str], name: str, source: Path) -> list[Sample]:
    """The images of one batch: b"data" uint8 (N, 3072), channel by channel, and N labels."""
    data, labels = pixels_of(batch.get(b"data")), batch.get(labels_key)
    whole = data is not None and isinstance(labels, list) and len(labels) == len(data)
    if not whole or not all(type(label) is int and 0 <= label < len(classes) for label in labels):
        raise ValueError(f"{name} in {source} does not hold CIFAR's images and labels: download it again.")
    pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return [Sample(image, label, f"{name}/{number}") for number, (image, label) in enumerate(zip(pixels, labels))]


def pixels_of(value: Any) -> np.ndarray | None:
    """(N, 3072) of uint8 from what was pickled as such an array; None from anything else."""
    match value:
        case Pickled(state=(*_, (int() as rows, 3072), Pickled() as dtype, fortran, bytes() as data)):
            if dtype.arguments[:1] in (("u1",), (b"u1",)) and len(data) == rows * 3072:
                order = "F" if fortran else "C"
                return np.frombuffer(data, np.uint8).reshape(rows, 3072, order=order)
    return None


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a pickle from the web could otherwise run any program.

    numpy does not make the arrays: it trusts what a pickle says of their memory.
    """

    OF_ARRAYS = [
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),  # where it is since numpy 2
    ]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.OF_ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image data needs")
        return Pickled


class Pickled:
    """What a pickle says of an array or of its dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
