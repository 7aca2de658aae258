"""CIFAR-100: 50,000 training and 10,000 test images of 32 px in a hundred classes.

SOURCE is one of
    cifar-100-python.tar.gz    the official archive, or its folder (161 MB, from
                               https://www.cs.toronto.edu/~kriz/cifar.html, md5 eb9058c3a382ffc7106e4002c42a8d85)
    cifar-100-python/          that archive unpacked (meta, train, test), or the folder that holds it

The official training images become train, the test images val. Labels are the fine ones, a hundred classes. Order: that
of the archive. License: the authors ask to be cited (Krizhevsky, Learning Multiple Layers of Features from Tiny Images,
2009); the images come from the web, for research.
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders.cifar10 import read_official, samples

CANVAS = 32
SOURCE = "cifar-100-python.tar.gz or its folder"
DOWNLOAD = [{"dataset": "CIFAR100"}]


def splits(source: Path) -> Splits:
    train, test = read_official("cifar100", source, "CIFAR100")
    return {
        "train": (train.classes, samples(train, lambda i: f"train/{i}")),
        "val": (test.classes, samples(test, lambda i: f"test/{i}")),
    }
