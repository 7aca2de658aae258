"""STL-10: 5,000 training, 8,000 test and 100,000 unlabelled images of 96 px in ten classes.

    SOURCE/stl10_binary/{train,test}_X.bin    the images, uint8: one channel after the other, each
                                              column by column (138 and 221 MB)
    SOURCE/stl10_binary/{train,test}_y.bin    their labels, uint8, counted from 1
    SOURCE/stl10_binary/unlabeled_X.bin       the unlabelled images (2.8 GB); may be missing
    SOURCE/stl10_binary/class_names.txt       ten lines

SOURCE may also be the folder stl10_binary itself. It is in stl10_binary.tar.gz (2.6 GB, from
https://cs.stanford.edu/~acoates/stl10/, md5 91f7769df0f17e558f3565bffb0c7dfb), which has to be
unpacked. Splits: train, test, and unlabelled, of one class of that name. Order: that of the files.
Licence: none is given; the authors ask to be cited (Coates, Lee and Ng, An Analysis of Single
Layer Networks in Unsupervised Feature Learning, 2011); the images come from ImageNet.
"""

from pathlib import Path

import numpy as np

from fastssl.beton import Sample

CANVAS = 96

ARCHIVE, FOLDER = "stl10_binary.tar.gz", "stl10_binary"
IMAGE_BYTES = 3 * 96 * 96


def splits(source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    if source is None:
        raise ValueError(f"stl10 needs --source, the folder {FOLDER} or the one it lies in.")
    folder = find_folder(source)
    classes = class_names(folder / "class_names.txt")
    found = {}
    for split in ("train", "test"):
        images = open_images(folder / f"{split}_X.bin")
        labels = read_labels(folder / f"{split}_y.bin")
        if len(images) != len(labels):
            raise ValueError(
                f"{folder} holds {len(images):,} images in {split}_X.bin and {len(labels):,} "
                f"labels in {split}_y.bin: unpack the archive again."
            )
        found[split] = (classes, samples(images, labels, f"{split}_X.bin"))
    if (folder / "unlabeled_X.bin").is_file():
        images = open_images(folder / "unlabeled_X.bin")
        found["unlabelled"] = (
            ["unlabelled"],
            samples(images, [0] * len(images), "unlabeled_X.bin"),
        )
    return found


def download(source: Path) -> None:
    """Leaves the archive, and stl10_binary unpacked from it, in `source` (5.8 GB in all)."""
    import torchvision

    # The one archive holds every split; this is the smallest to load.
    torchvision.datasets.STL10(root=source, split="train", download=True)


def find_folder(source: Path) -> Path:
    for folder in (source, source / FOLDER):
        if (folder / "train_X.bin").is_file():
            return folder
    archive = source if source.name == ARCHIVE else source / ARCHIVE
    if archive.is_file():
        raise ValueError(
            f"stl10 reads the files of {archive.name} where they lie, so unpack it first: "
            f"tar -xzf '{archive}' -C '{archive.parent}'"
        )
    raise FileNotFoundError(
        f"stl10 found no {FOLDER} with train_X.bin in {source}: get {ARCHIVE} from "
        f"https://cs.stanford.edu/~acoates/stl10/ and unpack it there (tar -xzf {ARCHIVE})."
    )


def class_names(path: Path) -> list[str]:
    expect(path)
    names = path.read_text(errors="replace").splitlines()
    if len(names) != 10:
        raise ValueError(f"{path} holds {len(names)} lines instead of 10: unpack the archive again.")
    return names


def open_images(path: Path) -> np.ndarray:
    """(N, 96, 96, 3) of uint8, which stays on the disk until an image is asked for."""
    expect(path)
    size = path.stat().st_size
    if size == 0 or size % IMAGE_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, which is no whole number of images of {IMAGE_BYTES:,} "
            "bytes: unpack the archive again."
        )
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    return content.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)


def read_labels(path: Path) -> list[int]:
    """Counted from 0."""
    expect(path)
    labels = np.fromfile(path, np.uint8)
    if not ((labels >= 1) & (labels <= 10)).all():
        raise ValueError(f"{path} does not hold labels from 1 to 10: unpack the archive again.")
    return (labels - 1).tolist()


def expect(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"stl10 expects {path}, which is missing: unpack {ARCHIVE} again.")


def samples(images: np.ndarray, labels: list[int], file: str) -> list[Sample]:
    return [Sample(image, label, f"{file}/{number}") for number, (image, label) in enumerate(zip(images, labels))]
