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

from pathlib import Path

import numpy as np

from beton_builders._matfile import read_mat, whole_numbers
from fastssl.beton import Sample

CANVAS = 32

CLASSES = [str(digit) for digit in range(10)]
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}
MOST_BYTES = 1 << 31  # of the pixels in a file, which are read into memory


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is None:
        raise ValueError("svhn needs --source, the folder that holds train_32x32.mat.")
    for split in ("train", "test"):
        if not (source / FILES[split]).is_file():
            raise FileNotFoundError(
                f"svhn found no {FILES[split]} in {source}: "
                "get it from http://ufldl.stanford.edu/housenumbers and name its folder."
            )
    return {split: (CLASSES, read_split(source / file)) for split, file in FILES.items() if (source / file).is_file()}


def download(source: Path) -> None:
    """Leaves the three files in `source`."""
    import torchvision

    for split in FILES:
        torchvision.datasets.SVHN(root=source, split=split, download=True)


def read_split(path: Path) -> list[Sample]:
    """X (32, 32, 3, N) uint8: row, column, channel, image; y (N, 1): digits from 1 to 10."""
    content = read_mat(path, ["X", "y"], most=MOST_BYTES)
    pixels, digits = content["X"], whole_numbers(path, "y", content["y"], 0, 10)
    shape = getattr(pixels, "shape", ())
    if shape[:3] != (CANVAS, CANVAS, 3) or len(shape) != 4 or pixels.dtype != np.uint8:
        raise ValueError(f"{path} does not hold images of 32 x 32 x 3 bytes as X: download it again.")
    if len(digits) != shape[3]:
        raise ValueError(f"{path} holds {shape[3]:,} images and {len(digits):,} labels: download it again.")
    return [
        Sample(image, digit % 10, f"{path.name}/{number}")
        for number, (image, digit) in enumerate(zip(np.moveaxis(pixels, 3, 0), digits.tolist()))
    ]
