"""CIFAR-10: 50,000 training and 10,000 test images of 32 px in ten classes.

SOURCE is one of
    cifar-10-python.tar.gz    the official archive, or its folder (163 MB, from
                              https://www.cs.toronto.edu/~kriz/cifar.html, md5 c58f30108f718f92721af3b95e74349a)
    cifar-10-batches-py/      that archive unpacked, or the folder that holds it
    {train,test}/CLASS/*      folders of image files, one per class

The official training images become train, the test images val. Order: that of the archive, or by class and file name.
License: the authors ask to be cited (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009); the
images come from the web, for research.
"""

import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beton_builders import Splits
from beton_builders._files import samples_by_class, unpack
from fastssl.beton import Sample

CANVAS = 32
SOURCE = "cifar-10-python.tar.gz or its folder"
DOWNLOAD = [{"dataset": "CIFAR10"}]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDERS = {"train": "train", "val": "test"}  # of image files, by split
LARGEST = 1 << 30  # bytes of a file that is compared with its checksum; the archives have 0.2 GB
IMAGES_PER_BATCH = 10_000


def splits(source: Path) -> Splits:
    if (source / "train").is_dir():
        return from_class_folders(source)
    train, test = read_official("cifar10", source, "CIFAR10")
    return {
        "train": (CLASSES, samples(train, lambda i: f"data_batch_{i // IMAGES_PER_BATCH + 1}/{i % IMAGES_PER_BATCH}")),
        "val": (CLASSES, samples(test, lambda i: f"test_batch/{i}")),
    }


def from_class_folders(source: Path) -> Splits:
    found: Splits = {}
    for split, folder in FOLDERS.items():
        folders = [f"{folder}/{name}" for name in CLASSES]
        missing = [str(source / name) for name in folders if not (source / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"cifar10 expects the class folder {missing[0]}, which is missing: unpack the images again, or use "
                "imagefolder for classes of your own."
            )
        found[split] = (CLASSES, samples_by_class(source, folders))
    return found


def samples(dataset: Any, name_of: Callable[[int], str]) -> list[Sample]:
    """The samples of a torchvision.datasets.CIFAR10 or CIFAR100."""
    return [Sample(image, label, name_of(i)) for i, (image, label) in enumerate(zip(dataset.data, dataset.targets))]


def read_official(builder: str, source: Path, name: str) -> tuple[Any, Any]:
    """Return the training and test set of torchvision.datasets.NAME, from the archive or its unpacked folder.

    They are pickles, which could run any program, and an archive may unpack to any size. So every file is compared with
    its published checksum first.
    """
    from torchvision import datasets

    kind = getattr(datasets, name)
    root = source.parent if source.name == kind.base_folder else source
    if (root / kind.base_folder).is_dir():
        return read_folder(root, kind)
    archive = source if source.is_file() else source / kind.filename
    if not archive.is_file():
        raise FileNotFoundError(
            f"{builder} found neither {kind.filename} nor {kind.base_folder} in {source}: get the archive from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and name its folder."
        )
    if not is_official(archive, kind.tgz_md5):
        raise ValueError(
            f"{archive} is not the whole {kind.filename} (its MD5 is not {kind.tgz_md5}): download it again."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(archive) as opened:
                unpack(opened, folder)
            return read_folder(Path(folder), kind)
        except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].replace(f"{folder}/", "")
            raise ValueError(f"{archive} is not the whole {kind.filename} ({reason}): download it again.") from error


def is_official(path: Path, md5: str) -> bool:
    from torchvision.datasets.utils import check_integrity

    return path.is_file() and path.stat().st_size <= LARGEST and bool(check_integrity(str(path), md5))


def read_folder(root: Path, kind: Any) -> tuple[Any, Any]:
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        path = root / kind.base_folder / name
        if not is_official(path, md5):
            raise ValueError(f"{path} is missing or not the official file: unpack {kind.filename} again.")
    return kind(root, train=True), kind(root, train=False)
