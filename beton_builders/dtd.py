"""Describable Textures (DTD): 5,640 photographs of textures in 47 classes.

    images/CLASS/*.jpg              120 images per class
    labels/{train,val,test}1.txt    the official partition 1 of ten; lines CLASS/NAME.jpg

in SOURCE, SOURCE/dtd or SOURCE/dtd/dtd. They are in dtd-r1.0.1.tar.gz (625 MB, from
https://www.robots.ox.ac.uk/~vgg/data/dtd/, md5 fff73e5086ae6bdbea199a49dfb8a4c1), which has to be unpacked. Splits:
train, val and test, 1,880 images each. Order: that of the lists. License: for research; the authors ask to be cited
(Cimpoi et al., Describing Textures in the Wild, 2014).
"""

from pathlib import Path

from beton_builders import Splits
from beton_builders._files import class_folders, find_folder, parse_lines
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder that holds images and labels"
LABEL_FILES = ("labels/*.txt", "dtd/labels/*.txt", "dtd/dtd/labels/*.txt")
DOWNLOAD = [{"dataset": "DTD"}]

ARCHIVE = "dtd-r1.0.1.tar.gz"
HOW_TO_GET = f"get {ARCHIVE} from https://www.robots.ox.ac.uk/~vgg/data/dtd/ and unpack it (tar -xzf {ARCHIVE})"


def splits(source: Path) -> Splits:
    folder = find_folder("dtd", source, ["", "dtd", "dtd/dtd"], ["images", "labels"], HOW_TO_GET)
    classes = class_folders(folder / "images")
    if len(classes) != 47:
        raise ValueError(f"{folder / 'images'} has {len(classes)} class folders instead of 47: unpack {ARCHIVE} again.")
    below = (folder / "images").relative_to(source)
    labels = {name: label for label, name in enumerate(classes)}
    pattern = r"(?P<name>(?P<label>[^/]+)/[^/]+\.jpg)"
    expected = "an image of a class folder, CLASS/NAME.jpg"
    found: Splits = {}
    for split in ("train", "val", "test"):
        path = folder / "labels" / f"{split}1.txt"
        images = parse_lines(path, pattern, expected, f"unpack {ARCHIVE} again", labels)
        samples = [Sample(f"{source}/{below}/{name}", label, f"{below}/{name}") for name, label in images]
        if not samples:
            raise ValueError(f"{path} is empty: unpack {ARCHIVE} again.")
        found[split] = (classes, samples)
    return found
