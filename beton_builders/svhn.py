"""SVHN: 73,257 training and 26,032 test images of house numbers, 32 px, in ten classes.

    SOURCE/train_32x32.mat    182 MB, md5 e26dedcc434d2e4c54c9b2d4a06d8373
    SOURCE/test_32x32.mat      64 MB, md5 eb5a983be6a315427106f1b164d9cef3
    SOURCE/extra_32x32.mat    1.3 GB, md5 a93ce644f1a588dc4d68dda5feec44a7; may be missing

They are the "cropped digits" of http://ufldl.stanford.edu/housenumbers. Splits: train, test, and
extra (531,131 easier images, which take 1.6 GB of memory) where its file is there. A label is the
digit: the files' 10 becomes 0. Order: that of the files. Licence: for non-commercial use only; the
authors ask to be cited (Netzer et al., Reading Digits in Natural Images with Unsupervised Feature
Learning, 2011).
"""

import hashlib
from pathlib import Path

import numpy as np

from fastssl.beton import Sample

CANVAS = 32

CLASSES = [str(digit) for digit in range(10)]
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
}


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is None:
        raise ValueError("svhn needs --source, the folder that holds train_32x32.mat.")
    for split in ("train", "test"):
        if not (source / FILES[split]).is_file():
            raise FileNotFoundError(
                f"svhn found no {FILES[split]} in {source}: "
                "get it from http://ufldl.stanford.edu/housenumbers and name its folder."
            )
    return {
        split: (CLASSES, read_split(source / file))
        for split, file in FILES.items()
        if (source / file).is_file()
    }


def download(source: Path) -> None:
    """Leaves the three files in `source`."""
    import torchvision

    for split in FILES:
        torchvision.datasets.SVHN(root=source, split=split, download=True)


def read_split(path: Path) -> list[Sample]:
    """X (32, 32, 3, N) uint8: row, column, channel, image; y (N, 1): digits from 1 to 10."""
    pixels, digits = read_mat(path, MD5[path.name], "X", "y")
    images = np.moveaxis(pixels, 3, 0)
    return [
        Sample(image, int(digit) % 10, f"{path.name}/{number}")
        for number, (image, digit) in enumerate(zip(images, digits.reshape(-1)))
    ]


def read_mat(path: Path, md5: str, *names: str) -> list[np.ndarray]:
    """The variables `names` of a MATLAB file; other data sets have such files too.

    Only of the very file that the authors published: scipy crashes on damaged ones.
    """
    from scipy.io import loadmat  # here: it takes a while, which a list of the builders need not

    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is damaged or not the official file (its md5 is {found} instead of {md5}): "
            "download it again."
        )
    content = loadmat(path, variable_names=names, appendmat=False)
    return [content[name] for name in names]
