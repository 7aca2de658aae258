"""Places365: the 36,500 validation images in 365 classes of scenes, 100 per class.

SOURCE is the folder that holds, as torchvision's Places365 leaves them,
    val_256/*.jpg                 256 x 256 px: val_256.tar, 525,158,400 bytes, md5 e27b17d8d44f4af9a78502beb927f808
    val_large/*.jpg               or, if val_256 is missing, the larger ones: val_large.tar, 2.1 GB, md5
                                  9b71c4993ad89d2d8bcbdc4aef38042f
    places365_val.txt             "Places365_val_00000001.jpg 165": the images and their labels
    categories_places365.txt      "/a/airfield 0": the classes; both are in filelist_places365-standard.tar, md5
                                  35a0585fee1fa656440f3ab298f8479c

All from http://data.csail.mit.edu/places/places365/; --download fetches the small images and the lists. They become the
split val. The 1.8 million training images are unpacked into class folders: the builder imagefolder reads those. Order:
that of places365_val.txt. Terms: non-commercial research and education only (http://places2.csail.mit.edu).
"""

from functools import partial
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import find_folder, parse_lines
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder that holds val_256"
LABEL_FILES = ("*.txt",)
DOWNLOAD = [{"dataset": "Places365", "split": "val", "small": True}]

IMAGES, CATEGORIES = "places365_val.txt", "categories_places365.txt"


def splits(source: Path) -> Splits:
    folder = next((source / name for name in ("val_256", "val_large") if (source / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"places365 found neither val_256 nor val_large in {source}: unpack val_256.tar there.")
    for name in (IMAGES, CATEGORIES):
        find_folder("places365", source, [""], [name], "unpack filelist_places365-standard.tar there")
    names_and_labels = partial(
        parse_lines, pattern="/?(?P<name>.+) (?P<label>[0-9]+)", expected="a name and a number", fix="unpack it again"
    )
    categories = sorted((label, name) for name, label in names_and_labels(source / CATEGORIES))
    if [label for label, _ in categories] != list(range(len(categories))):
        raise ValueError(f"{source / CATEGORIES} must number its classes from 0 without a gap: unpack it again.")
    # "/a/airfield": the first letter is a folder of the archive, not a part of the name.
    classes = [name.partition("/")[2] for _, name in categories]
    samples = []
    for name, label in names_and_labels(source / IMAGES):
        if label >= len(classes):
            raise ValueError(
                f"{source / IMAGES} gives {name} the label {label}, and {CATEGORIES} names {len(classes)} classes: "
                "unpack both again."
            )
        samples.append(Sample(f"{folder}/{name}", label, f"{folder.name}/{name}"))
    return {"val": (classes, samples)}
