"""iNaturalist 2021 (2,686,843 training images, 10,000 species) or 2018 (437,513, 8,142).

SOURCE holds one of the two years, unpacked:
    2018    train_val2018/*/*/*.jpg    train_val2018.tar.gz, 120 GB, md5
                                       b1c6952ce38f31868cc50ea72d066cc3
            train2018.json             from train2018.json.tar.gz, 26 MB, md5
                                       bfa29d89d629cbf04d826a720c0a68b0
            val2018.json               from val2018.json.tar.gz, 26 MB, md5
                                       f2ed8bfe3e9901cdefceb4e53cd3775d
    2021    train/CLASS/*.jpg          train.tar.gz, 224 GB, md5 e0526d53c7f7b2e3167b2b43bb2690ed
            train_mini/CLASS/*.jpg     train_mini.tar.gz, 42 GB, 50 images a species, md5
                                       db6ed8330e634445efc8fec83ae81442
            val/CLASS/*.jpg            val.tar.gz, 8.4 GB, 100,000 images, md5
                                       f6f6e0e242e3d4c9569ba56400938afc
        or under torchvision's names: 2021_train, 2021_train_mini, 2021_valid

All are linked from https://github.com/visipedia/inat_comp. `download` fetches and checks 2021's
train_mini and val, 50 GB packed and as much again unpacked; the whole of train has to be asked for
elsewhere. Splits: train, train_mini and val, those that are there. Classes: of 2018 the names in
train2018.json in the order of their ids; of 2021 the folders, 00000_Animalia_Annelida_... Order: of
2018 that of the json files, of 2021 by class and file name. Terms: non-commercial research and
education only; the images may not be passed on.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from beton_builders.imagefolder import labelled
from fastssl.beton import Sample

CANVAS = 256

LISTS = {"train": "train2018.json", "val": "val2018.json"}
FOLDERS = {
    "train": ("train", "2021_train"),
    "train_mini": ("train_mini", "2021_train_mini"),
    "val": ("val", "2021_valid"),
}


def download(source: Path) -> None:
    from torchvision.datasets import INaturalist

    for version in ("2021_train_mini", "2021_valid"):
        INaturalist(source, version=version, download=True)


def splits(source: Path | None) -> dict[str, tuple[list[str], Iterator[Sample]]]:
    if source is None:
        raise ValueError("inaturalist needs --source, the folder that the archives are unpacked in.")
    lists = {split: source / name for split, name in LISTS.items() if (source / name).is_file()}
    folders = {split: name for split, names in FOLDERS.items() for name in reversed(names) if (source / name).is_dir()}
    if lists and folders:
        raise ValueError(f"{source} holds iNaturalist 2018 and 2021: give a folder with one year.")
    if lists:
        return from_lists(source, lists)
    if folders:
        return from_folders(source, folders)
    raise FileNotFoundError(
        f"inaturalist found neither train2018.json or val2018.json nor the folders train, "
        f"train_mini or val of 2021 in {source}: unpack the archives there."
    )


def from_folders(source: Path, folders: dict[str, str]) -> dict:
    """2021: a folder a class, which begins with the class's number."""
    first, classes = "", []
    for folder in folders.values():
        names = sorted(name for name in os.listdir(source / folder) if not name.startswith("."))
        for number, name in enumerate(names):
            if not name.startswith(f"{number:05}_"):
                raise ValueError(
                    f"{source / folder} holds {name} where the folder of class {number:05} should "
                    "be: unpack the archive again, or use imagefolder for a choice of classes."
                )
        if first and names != classes:
            raise ValueError(
                f"{source / first} holds {len(classes):,} class folders and {source / folder} "
                f"others or {len(names):,}: unpack both archives whole."
            )
        first, classes = folder, names
    return {split: (classes, folder_images(source, folder, classes)) for split, folder in folders.items()}


def folder_images(source: Path, folder: str, classes: list[str]) -> Iterator[Sample]:
    for label, name in enumerate(classes):
        yield from labelled(source, os.path.join(folder, name), label)


def from_lists(source: Path, lists: dict[str, Path]) -> dict:
    """2018: a json file a split, in the form of COCO."""
    if not (source / "train_val2018").is_dir():
        raise FileNotFoundError(f"inaturalist found no train_val2018 in {source}: unpack train_val2018.tar.gz there.")
    found = {split: read_list(path) for split, path in lists.items()}
    categories, _ = next(iter(found.values()))
    for split, (others, _) in found.items():
        if others != categories:
            raise ValueError(
                f"{lists[split]} names other categories than {next(iter(lists.values()))}: unpack "
                "both json files of 2018 again."
            )
    labels = {number: label for label, number in enumerate(sorted(categories))}
    classes = [categories[number] for number in sorted(categories)]
    return {split: (classes, list_images(source, images, labels)) for split, (_, images) in found.items()}


def list_images(source: Path, images: list[tuple[str, int]], labels: dict[int, int]) -> Iterator[Sample]:
    for name, category in images:
        yield Sample(f"{source}/{name}", labels[category], name)


def read_list(path: Path) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Each category's name by its id, and each image's file name with its category."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
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
