"""SUN397: 108,754 images in 397 classes of scenes, or 19,850 + 19,850 of its partition 01.

SOURCE is the folder SUN397 that SUN397.tar.gz unpacks to (37 GB, md5 8ca2778205c41d23104230ba66911c7a, from
http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz), or the one that holds it:
    SUN397/ClassName.txt              the classes: /a/abbey, /a/airplane_cabin, ...
    SUN397/a/abbey/sun_*.jpg          the images
    Training_01.txt, Testing_01.txt   optional, in SOURCE, SUN397/ or Partitions/: partition 01 of Partitions.zip, from
                                      download/ of the same page; one image per line: /a/abbey/sun_aaalbzqrimafwbiv.jpg

With the two lists the splits are train and test, 50 images per class in each, as published for partition 01. Without
them there is one split, train, with all images. --download fetches the images, not the lists. Order: by class, then by
file name; with the lists, theirs. Terms: "for research purposes only" (https://vision.princeton.edu/projects/2010/SUN/).
"""

from collections.abc import Iterator
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import find_folder, parse_lines, read_lines, samples_by_class
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder SUN397"
LABEL_FILES = ("*.txt", "Partitions/*.txt", "SUN397/*.txt", "SUN397/Partitions/*.txt")
DOWNLOAD = [{"dataset": "SUN397"}]

LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}


def splits(source: Path) -> Splits:
    fix = "unpack SUN397.tar.gz and name its folder"
    root = find_folder("sun397", source, ["SUN397", ""], ["ClassName.txt"], fix)
    folders = [line.strip("/") for line in read_lines(root / "ClassName.txt") if line]
    for folder in folders:
        if ".." in folder or not (root / folder).is_dir():
            raise FileNotFoundError(f"sun397 found no class folder {folder!r:.60} in {root}: unpack the archive again.")
    classes = [folder.partition("/")[2] for folder in folders]  # without the first letter's folder
    lists = find_lists(source, root)
    if not lists:
        return {"train": (classes, samples_by_class(root, folders))}
    return {split: (classes, listed_samples(root, path, folders)) for split, path in lists.items()}


def find_lists(source: Path, root: Path) -> dict[str, Path]:
    """Return the path of each split's list; none if both are missing."""
    # The first of these folders is the last here, so that its lists replace those of the others.
    parents = (source, root, source / "Partitions", root / "Partitions")
    paths = [(split, parent / name) for split, name in LISTS.items() for parent in parents]
    found = {split: path for split, path in paths if path.is_file()}
    if len(found) == 1:
        raise FileNotFoundError(
            f"sun397 found only {next(iter(found.values()))}: put Training_01.txt and Testing_01.txt of Partitions.zip "
            "into one folder, or remove it."
        )
    return found


def listed_samples(root: Path, path: Path, folders: list[str]) -> Iterator[Sample]:
    pattern = r"/?(?P<name>(?P<label>.+)/[^/]+)"
    labels = {folder: label for label, folder in enumerate(folders)}
    expected = "an image in a class of ClassName.txt"
    for name, label in parse_lines(path, pattern, expected, "unpack Partitions.zip again", labels):
        yield Sample(f"{root}/{name}", label, name)
