"""Places365, iNaturalist and SUN397, on their official layouts with a handful of made-up images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torchvision
from test_builders_large import assert_images_read_back, listed, names, write

from beton_builders import imagenet, inaturalist, places365, sun397

# --- places365 ----------------------------------------------------------------------------------


def places(root: Path, folder: str = "val_256") -> Path:
    write(root, *(f"{folder}/Places365_val_0000000{number}.jpg" for number in (1, 2, 3)))
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/apartment_building/outdoor 1\n/z/zen_garden 2\n")
    (root / "places365_val.txt").write_text(
        "".join(f"Places365_val_0000000{i}.jpg {label}\n" for i, label in ((1, 2), (2, 0), (3, 1)))
    )
    return root


@pytest.mark.parametrize("folder", ["val_256", "val_large"])
def test_places365(tmp_path, folder):
    found = listed(places365, places(tmp_path, folder))
    assert list(found) == ["val"]
    classes, samples = found["val"]
    assert classes == ["airfield", "apartment_building/outdoor", "zen_garden"]
    assert names(samples) == [
        (f"{folder}/Places365_val_00000001.jpg", 2),
        (f"{folder}/Places365_val_00000002.jpg", 0),
        (f"{folder}/Places365_val_00000003.jpg", 1),
    ]
    assert_images_read_back(found)


def test_places365_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither val_256 nor val_large .*: unpack"):
        places365.splits(tmp_path)
    categories = places(tmp_path) / "categories_places365.txt"
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 3\n")
    with pytest.raises(ValueError, match="the label 3, and categories_places365.txt names 3"):
        listed(places365, tmp_path)
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg\n")
    with pytest.raises(ValueError, match="Line 1 of .*places365_val.txt must be a name and a num"):
        listed(places365, tmp_path)
    categories.write_text("/a/airfield 0\n/z/zen_garden 2\n")
    with pytest.raises(ValueError, match="must number its classes from 0 without a gap"):
        places365.splits(tmp_path)
    categories.unlink()
    with pytest.raises(FileNotFoundError, match="no categories_places365.txt .*: unpack filelist"):
        places365.splits(tmp_path)


# --- inaturalist --------------------------------------------------------------------------------

SPECIES = ["00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_g"]


def species_folders(root: Path, *folders: str) -> Path:
    for folder in folders:
        write(root, *(f"{folder}/{name}/{i}.jpg" for name in SPECIES for i in ("b", "a")))
    return root


@pytest.mark.parametrize(
    "folders",
    [
        {"train": "train", "train_mini": "train_mini", "val": "val"},
        {"train": "2021_train", "train_mini": "2021_train_mini", "val": "2021_valid"},
        {"train_mini": "train_mini", "val": "2021_valid"},
    ],
)
def test_inaturalist_2021(tmp_path, folders):
    found = listed(inaturalist, species_folders(tmp_path, *folders.values()))
    assert list(found) == list(folders)
    for split, (classes, samples) in found.items():
        assert classes == SPECIES
        assert names(samples) == [
            (f"{folders[split]}/{name}/{i}.jpg", label) for label, name in enumerate(SPECIES) for i in ("a", "b")
        ]
    assert_images_read_back(found)


def test_inaturalist_2021_equals_torchvisions(tmp_path):
    found = listed(inaturalist, species_folders(tmp_path, "2021_valid"))
    reference = torchvision.datasets.INaturalist(tmp_path, version="2021_valid")
    assert found["val"][0] == reference.all_categories
    expected = [(reference.all_categories[label], file, label) for label, file in reference.index]
    assert sorted(names(found["val"][1])) == sorted(
        (f"2021_valid/{folder}/{file}", label) for folder, file, label in expected
    )


def species_list(names: list[str]) -> dict:
    return {
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [  # in another order, as nothing promises the images'
            {"id": i, "image_id": 10 + i, "category_id": int(Path(name).parent.name)}
            for i, name in reversed(list(enumerate(names)))
        ],
        "categories": [
            {"id": 7, "name": "Rosa canina", "supercategory": "Plantae"},
            {"id": 0, "name": "Apis mellifera", "supercategory": "Insecta"},
        ],
    }


def species_2018(root: Path) -> Path:
    images = {
        "train2018.json": ["train_val2018/Plantae/7/b.jpg", "train_val2018/Insecta/0/a.jpg"],
        "val2018.json": ["train_val2018/Plantae/7/c.jpg"],
    }
    for name, files in images.items():
        write(root, *files)
        (root / name).write_text(json.dumps(species_list(files)))
    return root


def test_inaturalist_2018(tmp_path):
    found = listed(inaturalist, species_2018(tmp_path))
    assert [classes for classes, _ in found.values()] == [["Apis mellifera", "Rosa canina"]] * 2
    assert names(found["train"][1]) == [
        ("train_val2018/Plantae/7/b.jpg", 1),
        ("train_val2018/Insecta/0/a.jpg", 0),
    ]
    assert names(found["val"][1]) == [("train_val2018/Plantae/7/c.jpg", 1)]
    assert_images_read_back(found)


def test_inaturalist_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="found neither train2018.json .*: unpack"):
        inaturalist.splits(tmp_path)
    gap = species_folders(tmp_path / "gap", "val")
    (gap / "val" / SPECIES[0]).rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="holds 00001_.* where the folder of class 00000 should"):
        inaturalist.splits(gap)
    unequal = species_folders(tmp_path / "unequal", "train", "val")
    (unequal / "val" / SPECIES[1]).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="holds 2 class folders, .*val others or 1: unpack"):
        inaturalist.splits(unequal)
    with pytest.raises(ValueError, match="holds iNaturalist 2018 and 2021"):
        inaturalist.splits(species_folders(species_2018(tmp_path / "both"), "val"))
    nowhere = species_2018(tmp_path / "nowhere")
    (nowhere / "train_val2018").rename(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="no train_val2018 in .*: unpack"):
        inaturalist.splits(nowhere)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1, 2]",
        b"{}",
        json.dumps({**species_list(["train_val2018/x/7/b.jpg"]), "annotations": []}).encode(),
        json.dumps({**species_list(["train_val2018/x/7/b.jpg"]), "categories": 3}).encode(),
        json.dumps(species_list(["train_val2018/x/8/b.jpg"])).encode(),
    ],
)
def test_inaturalist_refuses_a_damaged_list(tmp_path, content):
    (species_2018(tmp_path) / "val2018.json").write_bytes(content)
    with pytest.raises(ValueError, match="val2018.json is not a list of iNaturalist 2018 .*again"):
        inaturalist.splits(tmp_path)


def test_inaturalist_refuses_lists_with_other_categories(tmp_path):
    other = species_list(["train_val2018/Plantae/7/c.jpg"])
    other["categories"][0]["name"] = "Rosa gallica"
    (species_2018(tmp_path) / "val2018.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="val2018.json names other categories than .*train2018"):
        inaturalist.splits(tmp_path)


# --- sun397 -------------------------------------------------------------------------------------


def scenes(root: Path) -> Path:
    write(root / "SUN397", "a/abbey/sun_b.jpg", "a/abbey/sun_a.jpg", "b/bar/outdoor/sun_c.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/b/bar/outdoor\n")
    return root


def test_sun397_without_lists_is_all_train(tmp_path):
    scenes(tmp_path)
    for source in (tmp_path, tmp_path / "SUN397"):
        found = listed(sun397, source)
        assert list(found) == ["train"]
        assert found["train"][0] == ["abbey", "bar/outdoor"]
        assert names(found["train"][1]) == [
            ("a/abbey/sun_a.jpg", 0),
            ("a/abbey/sun_b.jpg", 0),
            ("b/bar/outdoor/sun_c.jpg", 1),
        ]
        assert_images_read_back(found)
    reference = torchvision.datasets.SUN397(tmp_path)
    assert found["train"][0] == reference.classes
    theirs = sorted(zip(map(str, reference._image_files), reference._labels))
    assert [(sample.image, sample.label) for sample in found["train"][1]] == theirs


@pytest.mark.parametrize("place", [".", "SUN397", "Partitions", "SUN397/Partitions"])
def test_sun397_with_the_lists_of_partition_01(tmp_path, place):
    (scenes(tmp_path) / place).mkdir(exist_ok=True)
    (tmp_path / place / "Training_01.txt").write_text("/b/bar/outdoor/sun_c.jpg\n/a/abbey/sun_a.jpg")
    (tmp_path / place / "Testing_01.txt").write_text("/a/abbey/sun_b.jpg\r\n")
    found = listed(sun397, tmp_path)
    assert list(found) == ["train", "test"]
    assert names(found["train"][1]) == [("b/bar/outdoor/sun_c.jpg", 1), ("a/abbey/sun_a.jpg", 0)]
    assert names(found["test"][1]) == [("a/abbey/sun_b.jpg", 0)]
    assert_images_read_back(found)


def test_sun397_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ClassName.txt in .*: unpack SUN397.tar.gz"):
        sun397.splits(tmp_path)
    (scenes(tmp_path) / "Training_01.txt").write_text("/a/abbey/sun_a.jpg\n/c/church/sun_a.jpg\n")
    with pytest.raises(FileNotFoundError, match="found only .*Training_01.txt: put"):
        sun397.splits(tmp_path)
    (tmp_path / "Testing_01.txt").write_text("")
    with pytest.raises(ValueError, match="Line 2 of .*Training_01.txt must be an image in a class"):
        listed(sun397, tmp_path)
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/c/church\n")
    with pytest.raises(FileNotFoundError, match="no class folder 'c/church' in .*SUN397: unpack"):
        sun397.splits(tmp_path)


# --- checksums ----------------------------------------------------------------------------------


def test_the_checksums_are_those_that_torchvision_holds():
    from torchvision.datasets import imagenet as imagenets
    from torchvision.datasets import inaturalist as species

    published = {
        imagenet: [md5 for _, md5 in imagenets.ARCHIVE_META.values()],
        inaturalist: [md5 for year, md5 in species.DATASET_MD5.items() if year >= "2018"],
        sun397: [torchvision.datasets.SUN397._DATASET_MD5],
        places365: [
            torchvision.datasets.Places365._IMAGES_META["val", True][1],
            torchvision.datasets.Places365._IMAGES_META["val", False][1],
            torchvision.datasets.Places365._DEVKIT_META["standard"][1],
        ],
    }
    published[inaturalist].remove(species.DATASET_MD5["2019"])
    for builder, checksums in published.items():
        assert all(checksum in builder.__doc__ for checksum in checksums)
