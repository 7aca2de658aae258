"""ImageNet and its subsets, on their official layouts with a handful of made-up images."""

from __future__ import annotations

import csv
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from beton_builders import imagenet, imagenet100, tinyimagenet
from beton_builders._shards import tar_members
from fastssl.beton import Sample, build_beton, read_metadata
from fastssl.beton.reading import read_image_bytes
from fastssl.common.errors import UserError


def jpeg(name: str) -> bytes:
    """A small picture of one colour, another for each name."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour(name)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def colour(name: str) -> tuple[int, int, int]:
    number = zlib.crc32(Path(name).name.encode())
    return number & 255, number >> 8 & 255, number >> 16 & 255


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(name))
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, "w:gz" if path.name.endswith("gz") else "w"))
    return path


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def listed(builder, source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    found = {}
    for split, (classes, samples) in builder.splits(source).items():
        if builder in (imagenet, imagenet100):
            assert iter(samples) is samples, "a million samples must not be in memory"
        found[split] = (classes, list(samples))
    return found


def names(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.name, sample.label) for sample in samples]


def assert_images_read_back(found: dict[str, tuple[list[str], list[Sample]]]) -> None:
    for _, samples in found.values():
        for sample in samples:
            assert read_image_bytes(sample.image) == jpeg(sample.name)


# --- imagenet -----------------------------------------------------------------------------------

WNIDS = ["n01440764", "n02869837", "n03000000"]
TRAIN = {wnid: [f"{wnid}_{number}.JPEG" for number in (7, 10026, 18)] for wnid in WNIDS}
VAL_LABELS = [3, 1, 2, 2]  # the ids of the devkit, which are not in the order of the WordNet ids
IDS = {1: "n03000000", 2: "n01440764", 3: "n02869837", 4: "n00001740"}  # 4: not a leaf
VAL = [f"ILSVRC2012_val_{number:08}.JPEG" for number in (1, 2, 3, 4)]

EXPECTED_TRAIN = [(f"train/{wnid}/{name}", label) for label, wnid in enumerate(WNIDS) for name in sorted(TRAIN[wnid])]
EXPECTED_VAL = [
    ("val/n01440764/ILSVRC2012_val_00000003.JPEG", 0),
    ("val/n01440764/ILSVRC2012_val_00000004.JPEG", 0),
    ("val/n02869837/ILSVRC2012_val_00000001.JPEG", 1),
    ("val/n03000000/ILSVRC2012_val_00000002.JPEG", 2),
]


def devkit(compressed: bool = True) -> dict[str, bytes]:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    synsets = np.empty((len(IDS), 1), [(field, object) for field in fields])
    for row, (number, wnid) in enumerate(IDS.items()):
        synsets[row, 0] = (number, wnid, "a word", "a gloss", 3 * (number == 4), [])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=compressed)
    truth = "".join(f"{label}\n" for label in VAL_LABELS)
    folder = "ILSVRC2012_devkit_t12/data"
    return {
        f"{folder}/meta.mat": buffer.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def write_devkit(root: Path) -> None:
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit())


def official_tars(root: Path) -> Path:
    of_classes = {  # neither the classes nor their images in order
        f"{wnid}.tar": tar_bytes({name: jpeg(name) for name in TRAIN[wnid]}) for wnid in reversed(WNIDS)
    }
    write_tar(root / "ILSVRC2012_img_train.tar", of_classes)
    write_tar(root / "ILSVRC2012_img_val.tar", {name: jpeg(name) for name in reversed(VAL)})
    write_devkit(root)
    return root


def train_folders(root: Path, below: str = "train") -> Path:
    return write(root, *(f"{below}/{wnid}/{name}" for wnid in WNIDS for name in TRAIN[wnid]))


def solution(root: Path) -> None:
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for name, label in zip(VAL, VAL_LABELS):
            rows.writerow([name.removesuffix(".JPEG"), f"{IDS[label]} 1 2 3 4 {IDS[label]} 5 6 7 8"])


def in_tars(root: Path) -> Path:
    return official_tars(root)


def in_folders(root: Path) -> Path:
    return write(train_folders(root), *(name for name, _ in EXPECTED_VAL))


def with_flat_val(root: Path) -> Path:
    write_devkit(root)
    return write(train_folders(root), *(f"val/{name}" for name in VAL))


def with_unpacked_devkit(root: Path) -> Path:
    for name, content in devkit(compressed=False).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return write(train_folders(root), *(f"val/{name}" for name in VAL))


def as_kaggle(root: Path) -> Path:
    below = "ILSVRC/Data/CLS-LOC"
    write(train_folders(root, f"{below}/train"), *(f"{below}/val/{name}" for name in VAL))
    solution(root)
    return root


@pytest.mark.parametrize("layout", [in_tars, in_folders, with_flat_val, with_unpacked_devkit, as_kaggle])
def test_imagenet_is_the_same_from_every_layout(tmp_path, layout):
    found = listed(imagenet, layout(tmp_path))
    assert list(found) == ["train", "val"]
    assert found["train"][0] == found["val"][0] == WNIDS
    assert names(found["train"][1]) == EXPECTED_TRAIN
    assert names(found["val"][1]) == EXPECTED_VAL
    assert_images_read_back(found)


def test_imagenet_labels_equal_torchvisions(tmp_path):
    found = listed(imagenet, in_folders(tmp_path))
    for split in ("train", "val"):
        reference = torchvision.datasets.ImageFolder(tmp_path / split)
        assert found[split][0] == reference.classes
        assert [(sample.image, sample.label) for sample in found[split][1]] == reference.samples


def test_imagenet_may_be_train_or_val_alone(tmp_path):
    official_tars(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").rename(tmp_path / "kept")
    assert list(listed(imagenet, tmp_path)) == ["train"]
    (tmp_path / "kept").rename(tmp_path / "ILSVRC2012_img_val.tar")
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    assert names(listed(imagenet, tmp_path)["val"][1]) == EXPECTED_VAL


def test_imagenet_is_built_from_its_tars(tmp_path):
    reports = build_beton(
        "imagenet", official_tars(tmp_path), tmp_path.with_name(tmp_path.name + "-out"), canvas=8, workers=1
    ).splits
    assert [(report.split, report.samples) for report in reports] == [("train", 9), ("val", 4)]
    for report, expected in zip(reports, (EXPECTED_TRAIN, EXPECTED_VAL)):
        content = report.path.read_bytes()
        for row in read_metadata(report.path):
            name, label = expected[row["index"]]
            assert row["label"] == label
            pixels = np.frombuffer(content, np.uint8, 192, row["image"]["data_ptr"])
            assert np.abs(pixels.reshape(-1, 3) - np.array(colour(name), int)).max() <= 4


def test_imagenet_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none of ILSVRC2012_img_train.tar, .*: name"):
        imagenet.splits(tmp_path)
    with pytest.raises(ValueError, match="a.JPEG lies in"):
        imagenet.splits(write(tmp_path, "a.JPEG") / "a.JPEG")
    official_tars(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_devkit_t12.tar.gz or Kaggle's"):
        imagenet.splits(tmp_path)
    write_tar(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", {"readme": b""})
    with pytest.raises(ValueError, match="t12.tar.gz is not whole .*: download it again"):
        imagenet.splits(tmp_path)
    cut = (tmp_path / "kept").read_bytes()[:200]
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(cut)
    with pytest.raises(ValueError, match="t12.tar.gz is not whole .*: download it again"):
        imagenet.splits(tmp_path)
    broken = {name: content[:150] for name, content in devkit().items()}
    write_tar(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", broken)
    with pytest.raises(ValueError, match="does not hold ImageNet's data/meta.mat"):
        imagenet.splits(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12").mkdir()
    with pytest.raises(FileNotFoundError, match="meta.mat is missing: unpack"):
        imagenet.splits(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text("Image,Prediction\n1,2\n")
    with pytest.raises(ValueError, match="does not hold Kaggle's columns"):
        imagenet.splits(tmp_path)
    solution(tmp_path)
    assert names(listed(imagenet, tmp_path)["val"][1]) == EXPECTED_VAL
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000005.JPEG": b""})
    with pytest.raises(ValueError, match="lack the validation image ILSVRC2012_val_00000005.JPEG"):
        imagenet.splits(tmp_path)


def test_imagenet_labels_agree_where_a_split_lacks_a_class(tmp_path):
    in_folders(tmp_path)
    (tmp_path / "val" / WNIDS[1]).rename(tmp_path / "kept")
    found = listed(imagenet, tmp_path)
    assert found["train"][0] == found["val"][0] == WNIDS
    assert {label for _, label in names(found["val"][1])} == {0, 2}


@pytest.mark.parametrize("damage", ["cut", "cut at a header", "header", "inner", "compressed"])
def test_imagenet_refuses_a_damaged_tar(tmp_path, damage):
    path = official_tars(tmp_path) / "ILSVRC2012_img_train.tar"
    content = bytearray(path.read_bytes())
    start = max(offset for _, offset, _ in tar_members(str(path)))  # of the last class tar
    if damage == "cut":
        content = content[: start + 2000]
    elif damage == "cut at a header":
        content = content[: start - 512]
    elif damage == "header":
        content[start - 500] ^= 255
    elif damage == "inner":
        content[start + 10] ^= 255
    else:
        content = zlib.compress(content)
    path.write_bytes(content)
    with pytest.raises(UserError, match="img_train.tar is not a whole, uncompressed tar .*again"):
        build_beton("imagenet", tmp_path, tmp_path.with_name(tmp_path.name + "-out"), canvas=8, workers=1)


def test_a_tar_that_leads_back_to_itself_is_refused(tmp_path):
    """A member of negative size would be read again and again."""
    content = bytearray(tar_bytes({"a.jpg": b"", "b.jpg": b""}))
    content[512 + 124 : 512 + 136] = (-512).to_bytes(12, "big", signed=True)  # the size of b.jpg
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 156] = b"%06o\0 " % sum(content[512:1024])
    (tmp_path / "round.tar").write_bytes(content)
    with pytest.raises(ValueError, match="round.tar is not a whole, uncompressed tar"):
        list(tar_members(str(tmp_path / "round.tar")))


# --- imagenet100 --------------------------------------------------------------------------------


def test_imagenet100_takes_its_classes_from_the_same_sources(tmp_path):
    classes = imagenet100.class_names()
    assert len(set(classes)) == 100 and classes == sorted(classes)
    assert {"n02869837", "n01749939", "n02488291", "n02107142", "n02090622"} <= set(classes)
    assert "n01440764" not in classes

    images = {wnid: f"{wnid}_1.JPEG" for wnid in ["n01440764", *classes]}
    of_classes = {f"{wnid}.tar": tar_bytes({name: jpeg(name)}) for wnid, name in images.items()}
    write_tar(tmp_path / "tars" / "ILSVRC2012_img_train.tar", of_classes)
    write(tmp_path / "folders", *(f"train/{wnid}/{name}" for wnid, name in images.items()))
    expected = [(f"train/{wnid}/{images[wnid]}", label) for label, wnid in enumerate(classes)]
    for layout in ("tars", "folders"):
        found = listed(imagenet100, tmp_path / layout)
        assert found["train"][0] == classes
        assert names(found["train"][1]) == expected
        assert_images_read_back(found)

    (tmp_path / "folders" / "train" / classes[5]).rename(tmp_path / "gone")
    assert names(listed(imagenet100, tmp_path / "folders")["train"][1]) == expected[:5] + expected[6:]
    write(tmp_path / "others", "train/n01440764/a.JPEG")
    with pytest.raises(ValueError, match="hold none of the 100 classes of imagenet100"):
        imagenet100.splits(tmp_path / "others")


def test_the_wheel_ships_the_list_of_imagenet100(tmp_path):
    import zipfile

    from hatchling.builders.wheel import WheelBuilder

    root = Path(imagenet100.__file__).parents[1]
    (wheel,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    assert "beton_builders/imagenet100.txt" in zipfile.ZipFile(wheel).namelist()


# --- tinyimagenet -------------------------------------------------------------------------------


def tiny(root: Path) -> Path:
    write(root, "train/n02/images/n02_1.JPEG", "train/n02/images/n02_0.JPEG")
    write(root, "train/n01/images/n01_0.JPEG", "test/images/test_0.JPEG")
    write(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    (root / "train" / "n01" / "n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\ttench\nn02\tgoldfish\nn03\tshark\n")
    lines = ["val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t1\t2\t3\t4", "val_2.JPEG\tn02\t"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tinyimagenet(tmp_path):
    tiny(tmp_path / "tiny-imagenet-200")
    for source in (tmp_path, tmp_path / "tiny-imagenet-200"):
        found = listed(tinyimagenet, source)
        assert [classes for classes, _ in found.values()] == [["n01", "n02"]] * 2
        assert names(found["train"][1]) == [
            ("train/n01/images/n01_0.JPEG", 0),
            ("train/n02/images/n02_0.JPEG", 1),
            ("train/n02/images/n02_1.JPEG", 1),
        ]
        assert names(found["val"][1]) == [
            ("val/images/val_1.JPEG", 0),
            ("val/images/val_0.JPEG", 1),
            ("val/images/val_2.JPEG", 1),
        ]
        assert_images_read_back(found)


def test_tinyimagenet_with_val_in_class_folders(tmp_path):
    (tiny(tmp_path) / "val" / "images").rename(tmp_path / "away")
    write(tmp_path, "val/n01/val_1.JPEG", "val/n02/val_0.JPEG", "val/n02/val_2.JPEG")
    assert names(listed(tinyimagenet, tmp_path)["val"][1]) == [
        ("val/n01/val_1.JPEG", 0),
        ("val/n02/val_0.JPEG", 1),
        ("val/n02/val_2.JPEG", 1),
    ]


def test_tinyimagenet_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no wnids.txt in .*: unpack tiny-imagenet-200.zip"):
        tinyimagenet.splits(tmp_path)
    annotations = tiny(tmp_path) / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\nval_1.JPEG n01\n")
    with pytest.raises(ValueError, match="Line 2 of .*val_annotations.txt must be a file name"):
        listed(tinyimagenet, tmp_path)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match="val_annotations.txt is missing"):
        listed(tinyimagenet, tmp_path)
    (tmp_path / "wnids.txt").write_text("n01\nn02\nn03\n")
    with pytest.raises(FileNotFoundError, match="no folder 'n03' in .*train, and wnids.txt names it: unpack"):
        tinyimagenet.splits(tmp_path)
    (tmp_path / "wnids.txt").write_bytes(b"n01\n\xff\n")
    with pytest.raises(ValueError, match="wnids.txt is not a text file"):
        tinyimagenet.splits(tmp_path)
