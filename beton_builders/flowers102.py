"""Oxford Flowers: 8,189 photographs of flowers in 102 classes.

    jpg/image_00001.jpg ...    102flowers.tgz unpacked (345 MB, md5 52808999861908f626f3c1f4e79d11fa)
    imagelabels.mat            a label from 1 to 102 for each image (md5
                               e0620be6f572b9609742df49c70aed4d)
    setid.mat                  the numbers of each split's images (md5
                               a5357ecc9cb78c4bef273ce3793fc85c)

in SOURCE or SOURCE/flowers-102; all from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/.
Splits: train and val, 1,020 images each, and test, 6,149. Order: that of setid.mat. The files name
no classes; the names here are those of torchvision, in the order of the labels. Licence: none is
given; the authors ask to be cited (Nilsback and Zisserman, Automated Flower Classification over a
Large Number of Classes, 2008); the images come from the web.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from beton_builders._matfile import read_mat, whole_numbers
from fastssl.beton import Sample

CANVAS = 256

NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger
lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king
protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily, balloon
flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped
cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil,
sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common
dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura,
geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed
susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree
mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove,
bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper,
blackberry lily
"""
CLASSES = " ".join(NAMES.split()).split(", ")
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}  # and their names in setid.mat
IMAGES = 8189


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("flowers102 needs --source, the folder with jpg and imagelabels.mat.")
    folder = find_folder(source)
    labels_path, numbers_path = folder / "imagelabels.mat", folder / "setid.mat"
    labels = read_mat(labels_path, ["labels"])["labels"]
    labels = whole_numbers(labels_path, "labels", labels, 1, len(CLASSES))
    last = min(IMAGES, len(labels))
    found = {}
    for name, numbers in read_mat(numbers_path, SPLITS.values()).items():
        found[name] = whole_numbers(numbers_path, name, numbers, 1, last)
    return {split: (CLASSES, samples(source, folder, found[name], labels)) for split, name in SPLITS.items()}


def download(source: Path) -> None:
    """Leaves the archive, the images unpacked from it and both lists in SOURCE/flowers-102."""
    import torchvision

    torchvision.datasets.Flowers102(root=source, download=True)  # fetches every split


def find_folder(source: Path) -> Path:
    for folder in (source, source / "flowers-102"):
        found = [name for name in ("imagelabels.mat", "setid.mat") if (folder / name).is_file()]
        if len(found) == 2 and (folder / "jpg").is_dir():
            return folder
    raise FileNotFoundError(
        f"flowers102 found no folder jpg beside imagelabels.mat and setid.mat in {source} or its "
        "flowers-102: get them from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ and unpack "
        "the images (tar -xzf 102flowers.tgz)."
    )


def samples(source: Path, folder: Path, numbers: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    below = os.path.relpath(folder / "jpg", source)
    for number in numbers.tolist():  # from 1, as the labels are
        within = f"{below}/image_{number:05d}.jpg"
        yield Sample(f"{source}/{within}", int(labels[number - 1]) - 1, within)
