"""CIFAR-100: 50,000 training and 10,000 test images of 32 px in a hundred classes.

SOURCE is one of
    cifar-100-python.tar.gz    the official archive, or the folder it lies in (161 MB, from
                               https://www.cs.toronto.edu/~kriz/cifar.html, md5
                               eb9058c3a382ffc7106e4002c42a8d85)
    cifar-100-python/          that archive unpacked (meta, train, test), or the folder it lies in

The official training images become train, the test images val. Labels are the fine ones, a hundred
classes; their names are read from `meta`. Order: that of the archive. Licence: the authors ask to
be cited (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009); the images come
from the web, for research.
"""

from pathlib import Path

from beton_builders.cifar10 import batch_samples, read_official
from fastssl.beton import Sample

CANVAS = 32

ARCHIVE, FOLDER = "cifar-100-python.tar.gz", "cifar-100-python"


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is None:
        raise ValueError(f"cifar100 needs --source, {ARCHIVE} or the folder it lies in.")
    files = read_official(source, ARCHIVE, FOLDER, ["meta", "train", "test"])
    if files is None:
        raise FileNotFoundError(
            f"cifar100 found neither {ARCHIVE} nor {FOLDER} in {source}: "
            "get the archive from https://www.cs.toronto.edu/~kriz/cifar.html and name its folder."
        )
    names = files["meta"].get(b"fine_label_names")
    if not isinstance(names, list) or [type(name) for name in names] != [bytes] * 100:
        raise ValueError(f"meta in {source} does not hold the names of a hundred classes: download it again.")
    classes = [name.decode(errors="replace") for name in names]
    return {
        split: (classes, batch_samples(files[name], b"fine_labels", classes, name, source))
        for split, name in (("train", "train"), ("val", "test"))
    }


def download(source: Path) -> None:
    """Leaves cifar-100-python.tar.gz, and cifar-100-python unpacked from it, in `source`."""
    import torchvision

    torchvision.datasets.CIFAR100(root=source, download=True)
