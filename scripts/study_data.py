"""Build the .beton files that the study in records/study trains on and is evaluated on, from folders of images.

python scripts/study_data.py IMAGES data

IMAGES holds cifar10/{train,test}/CLASS/*.jpg, tinyimagenet_val/CLASS/*.JPEG, dtd/CLASS/*.jpg, mnist/*-ubyte.gz (the
10,000 test images with labels) and fashion-sprite.png (tiles of 28 px, 30 in a row, 3 rows a class).
"""

import argparse
import gzip
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 28  # px, of MNIST and Fashion-MNIST
CANVAS = ("--canvas", "32")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("images", type=Path)
    arguments.add_argument("out", type=Path, help="a folder for each data set is made in it")
    options = arguments.parse_args()
    images, out = options.images, options.out
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch)
        write_pngs(folders / "mnist", mnist_images(images / "mnist"))
        write_pngs(folders / "fashion", fashion_images(images / "fashion-sprite.png"))
        split(folders / "mnist", folders / "mnist_split", train=500, val=500)
        split(images / "dtd", folders / "dtd_split", train=80, val=40)
        split(images / "tinyimagenet_val", folders / "tiny_split", train=40, val=10)
        link(images / "tinyimagenet_val", folders / "tinyimagenet" / "all")
        link(images / "cifar10" / "train", folders / "cifar10" / "train")
        link(images / "cifar10" / "test", folders / "cifar10" / "val")

        build(folders / "cifar10", out / "cifar10", *CANVAS)
        # For OOD detection: every image of a set, in one file.
        build(folders / "tinyimagenet", out / "tinyimagenet", *CANVAS, "--splits", "none")
        build(images / "dtd", out / "dtd", *CANVAS, "--splits", "none")
        build(folders / "mnist", out / "mnist", *CANVAS)
        build(folders / "fashion", out / "fashion", *CANVAS)
        # For transfer.
        build(folders / "mnist_split", out / "mnist_split", *CANVAS)
        build(folders / "dtd_split", out / "dtd_split", *CANVAS)
        # For recipes/sweeps/crops_tinyimagenet.yaml.
        build(folders / "tiny_split", out / "tiny_canvas36", "--canvas", "36")
        build(folders / "tiny_split", out / "tiny_full", "--max-side", "64")


def mnist_images(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The label and pixels (28, 28) of each MNIST test image."""
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    yield from zip(labels.tolist(), pixels.reshape(-1, TILE, TILE), strict=True)


def fashion_images(sprite: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The label and pixels (28, 28) of each tile of the sprite."""
    pixels = np.asarray(Image.open(sprite).convert("L"))
    for row in range(pixels.shape[0] // TILE):
        for column in range(pixels.shape[1] // TILE):
            yield row // 3, pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]


def write_pngs(folder: Path, images: Iterator[tuple[int, np.ndarray]]) -> None:
    """Write each image as folder/LABEL/NUMBER.png."""
    for number, (label, pixels) in enumerate(images):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{number:05d}.png")


def split(source: Path, target: Path, train: int, val: int) -> None:
    """Link the first `train` images of each class into target/train, and the next `val` ones into target/val."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(folder.iterdir())
        for part, chosen in (("train", files[:train]), ("val", files[train : train + val])):
            for file in chosen:
                link(file, target / part / folder.name / file.name)


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def build(source: Path, out: Path, *options: str) -> None:
    subprocess.run(
        ["fastssl", "build-beton", "imagefolder", "--source", str(source), "--out", str(out), *options], check=True
    )


if __name__ == "__main__":
    main()
