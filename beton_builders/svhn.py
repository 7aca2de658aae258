"""SVHN: 73,257 training and 26,032 test images of house numbers, 32 px, in ten classes.

    SOURCE/train_32x32.mat    182 MB, md5 e26dedcc434d2e4c54c9b2d4a06d8373
    SOURCE/test_32x32.mat      64 MB, md5 eb5a983be6a315427106f1b164d9cef3
    SOURCE/extra_32x32.mat    1.3 GB, md5 a93ce644f1a588dc4d68dda5feec44a7; may be missing

They are the "cropped digits" of http://ufldl.stanford.edu/housenumbers. Splits: train, test, and extra (531,131 easier
images, which take 1.6 GB of memory) if its file exists. A label is the digit: 10 in the files becomes 0. Order: that of
the files. License: non-commercial use only; the authors ask to be cited (Netzer et al., Reading Digits in Natural
Images with Unsupervised Feature Learning, 2011).
"""

from pathlib import Path

import numpy as np

from beton_builders import Splits
from beton_builders._files import find_folder, read_mat, whole_numbers
from fastssl.beton import Sample

CANVAS = 32
SOURCE = "the folder that holds train_32x32.mat"
DOWNLOAD = [{"dataset": "SVHN", "split": split} for split in ("train", "test", "extra")]

CLASSES = [str(digit) for digit in range(10)]
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}


def splits(source: Path) -> Splits:
    for split in ("train", "test"):
        how = f"get {FILES[split]} from http://ufldl.stanford.edu/housenumbers and name its folder"
        find_folder("svhn", source, [""], [FILES[split]], how)
    return {split: (CLASSES, read_split(source / file)) for split, file in FILES.items() if (source / file).is_file()}


def read_split(path: Path) -> list[Sample]:
    """X: uint8 (32, 32, 3, N), that is row, column, channel, image. y: digits from 1 to 10, (N, 1)."""
    content = read_mat(path, ["X", "y"])
    pixels, digits = content["X"], whole_numbers(path, "y", content["y"], 0, 10)
    if pixels.shape[:3] != (CANVAS, CANVAS, 3) or pixels.ndim != 4 or pixels.dtype != np.uint8:
        raise ValueError(f"{path} does not hold images of 32 x 32 x 3 bytes as X: download it again.")
    if len(digits) != pixels.shape[3]:
        raise ValueError(f"{path} holds {pixels.shape[3]:,} images and {len(digits):,} labels: download it again.")
    return [
        Sample(image, digit % 10, f"{path.name}/{number}")
        for number, (image, digit) in enumerate(zip(np.moveaxis(pixels, 3, 0), digits.tolist()))
    ]
