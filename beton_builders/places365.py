"""Places365: the 36,500 validation images in 365 classes of scenes, 100 a class.

SOURCE is the folder that holds, as torchvision's Places365 leaves them,
    val_256/*.jpg                 256 x 256 px: val_256.tar, 525,158,400 bytes, md5
                                  e27b17d8d44f4af9a78502beb927f808
    val_large/*.jpg               or, where val_256 is missing, the larger ones: val_large.tar,
                                  2.1 GB, md5 9b71c4993ad89d2d8bcbdc4aef38042f
    places365_val.txt             "Places365_val_00000001.jpg 165": the images and their labels
    categories_places365.txt      "/a/airfield 0": the classes; both are in
                                  filelist_places365-standard.tar, md5
                                  35a0585fee1fa656440f3ab298f8479c

All from http://data.csail.mit.edu/places/places365/; `download` fetches the small images and the
lists, and checks them. They become the split val. The 1.8 million training images lie in class
folders when they are unpacked: the builder imagefolder takes those. Order: that of
places365_val.txt. Terms: non-commercial research and education only (http://places2.csail.mit.edu).
"""

from collections.abc import Iterator
from pathlib import Path

from beton_builders.tinyimagenet import read_lines
from fastssl.beton import Sample

CANVAS = 256

FOLDERS = ("val_256", "val_large")
IMAGES, CATEGORIES = "places365_val.txt", "categories_places365.txt"


def download(source: Path) -> None:
    from torchvision.datasets import Places365

    Places365(source, split="val", small=True, download=True)


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("places365 needs --source, the folder that holds val_256.")
    folder = next((source / name for name in FOLDERS if (source / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"places365 found neither val_256 nor val_large in {source}: unpack val_256.tar there.")
    for name in (IMAGES, CATEGORIES):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"places365 found no {name} in {source}: unpack filelist_places365-standard.tar there."
            )
    categories = sorted((label, name) for name, label in numbered(source / CATEGORIES))
    if [label for label, _ in categories] != list(range(len(categories))):
        raise ValueError(f"{source / CATEGORIES} must number its classes from 0 without a gap: unpack it again.")
    # "/a/airfield": the first letter is a folder of the archive and not of the name
    classes = [name.removeprefix("/").partition("/")[2] for _, name in categories]
    return {"val": (classes, samples(source, folder, len(classes)))}


def samples(source: Path, folder: Path, classes: int) -> Iterator[Sample]:
    for name, label in numbered(source / IMAGES):
        if label >= classes:
            raise ValueError(
                f"{source / IMAGES} gives {name} the label {label}, and {CATEGORIES} names "
                f"{classes} classes: unpack both again."
            )
        name = name.removeprefix("/")
        yield Sample(f"{folder}/{name}", label, f"{folder.name}/{name}")


def numbered(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of a file, each a name and a number."""
    for position, line in enumerate(read_lines(path), 1):
        name, _, number = line.rpartition(" ")
        if line and not (name and number.isascii() and number.isdigit()):
            raise ValueError(
                f"Line {position} of {path} must be a name and a number, not {line[:60]!r}: unpack the archive again."
            )
        if line:
            yield name, int(number)
