"""iNaturalist 2021 (2,686,843 training images, 10,000 species) or 2018 (437,513, 8,142).

SOURCE holds one of the two years, unpacked:
    2018    train_val2018/*/*/*.jpg    train_val2018.tar.gz, 120 GB, md5 b1c6952ce38f31868cc50ea72d066cc3
            train2018.json             from train2018.json.tar.gz, 26 MB, md5 bfa29d89d629cbf04d826a720c0a68b0
            val2018.json               from val2018.json.tar.gz, 26 MB, md5 f2ed8bfe3e9901cdefceb4e53cd3775d
    2021    train/CLASS/*.jpg          train.tar.gz, 224 GB, md5 e0526d53c7f7b2e3167b2b43bb2690ed
            train_mini/CLASS/*.jpg     train_mini.tar.gz, 42 GB, 50 images per species, md5
                                       db6ed8330e634445efc8fec83ae81442
            val/CLASS/*.jpg            val.tar.gz, 8.4 GB, 100,000 images, md5 f6f6e0e242e3d4c9569ba56400938afc
        or under torchvision's names: 2021_train, 2021_train_mini, 2021_valid

All are linked from https://github.com/visipedia/inat_comp. --download fetches train_mini and val of 2021, 50 GB
compressed and as much again unpacked, not the whole of train. Splits: train, train_mini and val, those that exist.
Classes: of 2018 the names in train2018.json in the order of their ids; of 2021 the folders,
00000_Animalia_Annelida_... Order: of 2018 that of the json files, of 2021 by class and file name. Terms: non-commercial
research and education only; the images may not be passed on.
"""

import json
from pathlib import Path

from beton_builders import Splits
from beton_builders._files import class_folders, read_text, samples_by_class
from fastssl.beton import Sample

CANVAS = 256
SOURCE = "the folder that the archives are unpacked in"
LABEL_FILES = ("*.json",)
DOWNLOAD = [{"dataset": "INaturalist", "version": version} for version in ("2021_train_mini", "2021_valid")]

LISTS = {"train": "train2018.json", "val": "val2018.json"}
FOLDERS = {
    "2021_train": "train",
    "2021_train_mini": "train_mini",
    "2021_valid": "val",
}  # torchvision's folder -> the archive's, the split


def splits(source: Path) -> Splits:
    lists = {split: source / name for split, name in LISTS.items() if (source / name).is_file()}
    names = [(split, name) for torchvision_name, split in FOLDERS.items() for name in (torchvision_name, split)]
    folders = {split: name for split, name in names if (source / name).is_dir()}
    if lists and folders:
        raise ValueError(f"{source} holds iNaturalist 2018 and 2021: give a folder with one year.")
    if lists:
        return from_lists(source, lists)
    if folders:
        return from_folders(source, folders)
    raise FileNotFoundError(
        "inaturalist found neither train2018.json or val2018.json nor the folders train, train_mini or val of 2021 in "
        f"{source}: unpack the archives there."
    )


def from_folders(source: Path, folders: dict[str, str]) -> Splits:
    """2021: one folder per class, whose name begins with the number of the class."""
    first = next(iter(folders.values()))
    classes = class_folders(source / first)
    for folder in folders.values():
        names = class_folders(source / folder)
        for number, name in enumerate(names):
            if not name.startswith(f"{number:05}_"):
                raise ValueError(
                    f"{source / folder} holds {name} where the folder of class {number:05} should be: unpack the "
                    "archive again, or use imagefolder for a selection of classes."
                )
        if names != classes:
            raise ValueError(
                f"{source / first} holds {len(classes):,} class folders, {source / folder} others or {len(names):,}: "
                "unpack both completely."
            )
    return {
        split: (classes, samples_by_class(source, [f"{folder}/{name}" for name in classes]))
        for split, folder in folders.items()
    }


def from_lists(source: Path, lists: dict[str, Path]) -> Splits:
    """2018: one json file per split, in the format of COCO."""
    if not (source / "train_val2018").is_dir():
        raise FileNotFoundError(f"inaturalist found no train_val2018 in {source}: unpack train_val2018.tar.gz there.")
    found = {split: read_list(path) for split, path in lists.items()}
    categories, _ = next(iter(found.values()))
    for split, (others, _) in found.items():
        if others != categories:
            first = next(iter(lists.values()))
            raise ValueError(f"{lists[split]} names other categories than {first}: unpack both json files again.")
    labels = {number: label for label, number in enumerate(sorted(categories))}
    classes = [categories[number] for number in sorted(categories)]
    return {
        split: (classes, (Sample(f"{source}/{name}", labels[category], name) for name, category in images))
        for split, (_, images) in found.items()
    }


def read_list(path: Path) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Return the name of each category by its id, and the file name of each image with its category."""
    try:
        content = json.loads(read_text(path))
        categories = {int(each["id"]): str(each["name"]) for each in content["categories"]}
        category = {each["image_id"]: int(each["category_id"]) for each in content["annotations"]}
        images = [(str(each["file_name"]), category[each["id"]]) for each in content["images"]]
        unknown = set(category.values()) - set(categories)
        if unknown:
            raise ValueError(f"category {min(unknown)} is not among its categories")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a list of iNaturalist 2018 ({reason}): unpack it again.") from error
    return categories, images
