"""The builders of small data sets, on their official layouts with a handful of made-up images.

torchvision reads most of these data sets too, so it is asked for the same images and labels.
"""

from __future__ import annotations

import gzip
import inspect
import io
import pickle
import re
import shutil
import struct
import tarfile
from pathlib import Path

import checksums
import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from beton_builders import (
    caltech101,
    cifar10,
    cifar100,
    dtd,
    fashionmnist,
    flowers102,
    mnist,
    stl10,
    svhn,
)
from fastssl.beton import Sample, build_beton, builder_names, read_labels, read_metadata
from fastssl.beton.source import download_dataset, load_builder
from fastssl.common.errors import UserError

BUILDERS = (caltech101, cifar10, cifar100, dtd, fashionmnist, flowers102, mnist, stl10, svhn)


OFFICIAL = {cifar10: torchvision.datasets.CIFAR10, cifar100: torchvision.datasets.CIFAR100}


def short(module) -> str:
    return module.__name__.rpartition(".")[2]


def listed(builder, source: Path) -> dict[str, tuple[list[str], list[Sample]]]:
    return {name: (classes, list(found)) for name, (classes, found) in builder.splits(source).items()}


def names(found: dict[str, tuple[list[str], list[Sample]]]) -> dict[str, list[tuple[str, int]]]:
    return {split: [(sample.name, sample.label) for sample in samples] for split, (_, samples) in found.items()}


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_jpeg(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels(seed, 8, 9, 3)).save(path)


# --- the official layouts, each where torchvision leaves it below its root ----------------------


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which made the official files of CIFAR."""

    def save_string(self, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}


def python2_pickle(value: dict) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_batch(seed: int, labels_key: str, classes: int) -> dict:
    labels = np.random.default_rng(seed).integers(0, classes, 6).tolist()
    return {"data": random_pixels(seed, 6, 3072), labels_key: labels}


def make_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(python2_pickle(cifar_batch(seed, "labels", 10)))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": cifar10.CLASSES}))


def make_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    meta = {"fine_label_names": [f"class {n}" for n in range(100)], "coarse_label_names": ["a"]}
    (folder / "meta").write_bytes(python2_pickle(meta))
    for seed, name in enumerate(["train", "test"]):
        batch = cifar_batch(seed, "fine_labels", 100) | {"coarse_labels": [0] * 6}
        (folder / name).write_bytes(python2_pickle(batch))


def make_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("\n".join(STL10_CLASSES) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2 \n" * 10)
    for seed, (file, images) in enumerate({"train": 10, "test": 4, "unlabeled": 3}.items()):
        (folder / f"{file}_X.bin").write_bytes(random_pixels(seed, images, 3, 96, 96).tobytes())
        if file != "unlabeled":
            (folder / f"{file}_y.bin").write_bytes(bytes(10 - n for n in range(images)))


STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()


def make_svhn(root: Path) -> None:
    root.mkdir(parents=True)
    for seed, (split, images) in enumerate({"train": 11, "test": 5, "extra": 3}.items()):
        digits = (np.arange(images) % 10 + 1).astype(np.uint8)[:, None]
        content = {"X": random_pixels(seed, 32, 32, 3, images), "y": digits}
        savemat(root / f"{split}_32x32.mat", content, do_compression=True)


def make_idx(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed, (prefix, images) in enumerate({"train": 12, "t10k": 5}.items()):
        pixels = struct.pack(">IIII", 2051, images, 28, 28)
        pixels += random_pixels(seed, images, 28, 28).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        labels = struct.pack(">II", 2049, images) + bytes(n % 10 for n in range(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def make_mnist(root: Path) -> None:
    make_idx(root / "MNIST" / "raw")


def make_fashionmnist(root: Path) -> None:
    make_idx(root / "FashionMNIST" / "raw")


def make_dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = []
        for label in reversed(range(47)):
            lines.append(f"texture{label:02d}/texture{label:02d}_{split}.jpg\n")
            write_jpeg(folder / "images" / lines[-1].strip(), label)
        (folder / "labels" / f"{split}1.txt").write_text("".join(lines))
    (folder / "images" / "texture03" / ".directory").touch()  # the archive holds such a file


def make_flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 103):
        write_jpeg(folder / "jpg" / f"image_{number:05d}.jpg", number)
    labels = np.random.default_rng(0).permutation(102).astype(np.uint8)[None] + 1
    savemat(folder / "imagelabels.mat", {"labels": labels})
    numbers = np.random.default_rng(1).permutation(102).astype(np.uint16)[None] + 1
    parts = {"trnid": numbers[:, :20], "valid": numbers[:, 20:30], "tstid": numbers[:, 30:]}
    savemat(folder / "setid.mat", parts)


def make_caltech101(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for name in ["BACKGROUND_Google", "Faces", *(f"thing{n:03d}" for n in range(100))]:
        for number in (1, 2):
            write_jpeg(folder / name / f"image_{number:04d}.jpg", number)


MAKERS = {
    caltech101: make_caltech101,
    cifar10: make_cifar10,
    cifar100: make_cifar100,
    dtd: make_dtd,
    fashionmnist: make_fashionmnist,
    flowers102: make_flowers102,
    mnist: make_mnist,
    stl10: make_stl10,
    svhn: make_svhn,
}


@pytest.fixture(scope="session")
def made_layouts(tmp_path_factory) -> dict:
    made = {}
    for builder, make in MAKERS.items():
        made[builder] = tmp_path_factory.mktemp("layouts") / short(builder)
        make(made[builder])
    return made


@pytest.fixture
def layouts(made_layouts, monkeypatch) -> dict:
    """Every layout once, with the checksums of its files as the published ones; a test that changes one copies it."""
    for builder, dataset in ((cifar10, torchvision.datasets.CIFAR10), (cifar100, torchvision.datasets.CIFAR100)):
        checksums.publish(monkeypatch, dataset, made_layouts[builder] / dataset.base_folder)
    return made_layouts


@pytest.fixture
def copy(layouts, tmp_path):
    def copied(builder) -> Path:
        return shutil.copytree(layouts[builder], tmp_path / short(builder))

    return copied


# --- the same as torchvision --------------------------------------------------------------------


def sample_pixels(sample: Sample) -> np.ndarray:
    """RGB."""
    if isinstance(sample.image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(sample.image))
    else:
        image = Image.open(sample.image)
    return np.asarray(image.convert("RGB"))


SAME = [
    (caltech101, "train", "Caltech101", {}),
    (cifar10, "train", "CIFAR10", {"train": True}),
    (cifar10, "val", "CIFAR10", {"train": False}),
    (cifar100, "train", "CIFAR100", {"train": True}),
    (cifar100, "val", "CIFAR100", {"train": False}),
    (dtd, "train", "DTD", {"split": "train"}),
    (dtd, "val", "DTD", {"split": "val"}),
    (dtd, "test", "DTD", {"split": "test"}),
    (fashionmnist, "train", "FashionMNIST", {"train": True}),
    (fashionmnist, "test", "FashionMNIST", {"train": False}),
    (flowers102, "train", "Flowers102", {"split": "train"}),
    (flowers102, "val", "Flowers102", {"split": "val"}),
    (flowers102, "test", "Flowers102", {"split": "test"}),
    (mnist, "train", "MNIST", {"train": True}),
    (mnist, "test", "MNIST", {"train": False}),
    (stl10, "train", "STL10", {"split": "train"}),
    (stl10, "test", "STL10", {"split": "test"}),
    (stl10, "unlabelled", "STL10", {"split": "unlabeled"}),
    (svhn, "train", "SVHN", {"split": "train"}),
    (svhn, "test", "SVHN", {"split": "test"}),
    (svhn, "extra", "SVHN", {"split": "extra"}),
]


@pytest.mark.parametrize(
    ("builder", "split", "dataset", "options"),
    SAME,
    ids=[f"{short(builder)}-{split}" for builder, split, _, _ in SAME],
)
def test_reads_what_torchvision_reads(layouts, monkeypatch, builder, split, dataset, options):
    kind = getattr(torchvision.datasets, dataset)
    # the checksums are those of the real files
    module = f"torchvision.datasets.{kind.__module__.rpartition('.')[2]}"
    monkeypatch.setattr(f"{module}.check_integrity", lambda *_: True, raising=False)
    expected = kind(root=layouts[builder], download=False, **options)

    classes, samples = listed(builder, layouts[builder])[split]
    assert len(samples) == len(expected) > 0
    for sample, (image, label) in zip(samples, expected):
        assert np.array_equal(sample_pixels(sample), np.asarray(image.convert("RGB")))
        assert sample.label == (-1 if split == "unlabelled" else label)
    if builder in (cifar10, cifar100, dtd, fashionmnist, flowers102, stl10) and split in (
        "train",
        "val",
    ):
        assert classes == expected.classes


def test_svhn_and_mnist_label_by_digit(layouts):
    found = listed(svhn, layouts[svhn])
    assert found["train"][0] == list("0123456789")
    assert [sample.label for sample in found["train"][1]] == [*range(1, 10), 0, 1]
    found = listed(mnist, layouts[mnist])
    assert found["test"][0] == list("0123456789")
    assert [sample.label for sample in found["test"][1]] == [0, 1, 2, 3, 4]


# --- names, and the other places where SOURCE may point -----------------------------------------


def test_builder_names_leave_out_shared_modules():
    assert not [name for name in builder_names() if name.startswith("_")]
    assert {short(builder) for builder in BUILDERS} < set(builder_names())


def test_samples_are_named_within_the_source(layouts):
    first = {
        builder: {split: samples[0].name for split, (_, samples) in listed(builder, source).items()}
        for builder, source in layouts.items()
    }
    assert first == {
        caltech101: {"train": "caltech101/101_ObjectCategories/Faces/image_0001.jpg"},
        cifar10: {"train": "data_batch_1/0", "val": "test_batch/0"},
        cifar100: {"train": "train/0", "val": "test/0"},
        dtd: {split: f"dtd/dtd/images/texture46/texture46_{split}.jpg" for split in ("train", "val", "test")},
        fashionmnist: {"train": "train-images-idx3-ubyte/0", "test": "t10k-images-idx3-ubyte/0"},
        flowers102: first[flowers102],
        mnist: {"train": "train-images-idx3-ubyte/0", "test": "t10k-images-idx3-ubyte/0"},
        stl10: {
            "train": "train_X.bin/0",
            "test": "test_X.bin/0",
            "unlabelled": "unlabeled_X.bin/0",
        },
        svhn: {
            "train": "train_32x32.mat/0",
            "test": "test_32x32.mat/0",
            "extra": "extra_32x32.mat/0",
        },
    }
    for builder in (caltech101, dtd, flowers102):
        for _, samples in listed(builder, layouts[builder]).values():
            assert all(type(sample.image) is str for sample in samples)
            assert all(sample.image == f"{layouts[builder]}/{sample.name}" for sample in samples)
            assert all(Path(sample.image).is_file() for sample in samples)


@pytest.mark.parametrize(
    ("builder", "below"),
    [
        (caltech101, "caltech101"),
        (cifar10, "cifar-10-batches-py"),
        (cifar100, "cifar-100-python"),
        (dtd, "dtd"),
        (dtd, "dtd/dtd"),
        (fashionmnist, "FashionMNIST"),
        (fashionmnist, "FashionMNIST/raw"),
        (flowers102, "flowers-102"),
        (mnist, "MNIST"),
        (mnist, "MNIST/raw"),
        (stl10, "stl10_binary"),
    ],
)
def test_the_source_may_be_a_folder_further_down(layouts, builder, below):
    above, found = listed(builder, layouts[builder]), listed(builder, layouts[builder] / below)
    assert list(found) == list(above)
    for split, (classes, samples) in found.items():
        assert classes == above[split][0]
        assert [sample.label for sample in samples] == [sample.label for sample in above[split][1]]
        for sample, same in zip(samples, above[split][1]):
            assert same.name.endswith(sample.name)
            if isinstance(sample.image, str):
                assert sample.image == same.image
            else:
                assert (sample.image == same.image).all()


def test_caltech101_unzipped_by_hand(copy):
    source = copy(caltech101)
    (source / "caltech101").rename(source / "caltech-101")
    (sample, *_) = listed(caltech101, source)["train"][1]
    assert sample.name == "caltech-101/101_ObjectCategories/Faces/image_0001.jpg"


@pytest.mark.parametrize("builder", [cifar10, cifar100])
def test_cifar_archive_is_read_packed(layouts, tmp_path, builder, monkeypatch):
    folder = layouts[builder] / OFFICIAL[builder].base_folder
    with tarfile.open(tmp_path / OFFICIAL[builder].filename, "w:gz") as archive:
        archive.add(folder, folder.name)
    checksums.publish_archive(monkeypatch, OFFICIAL[builder], tmp_path / OFFICIAL[builder].filename)
    expected = listed(builder, folder)
    for source in (tmp_path, tmp_path / OFFICIAL[builder].filename):
        found = listed(builder, source)
        assert names(found) == names(expected)
        for split, (classes, samples) in found.items():
            assert classes == expected[split][0]
            for sample, same in zip(samples, expected[split][1]):
                assert (sample.image == same.image).all()
    assert sorted(tmp_path.iterdir()) == [tmp_path / OFFICIAL[builder].filename]  # nothing was unpacked


@pytest.mark.parametrize("builder", [mnist, fashionmnist])
def test_idx_files_packed(copy, builder):
    source = copy(builder)
    expected = listed(builder, source)
    for path in list(source.rglob("*-ubyte")):
        (source / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    found = listed(builder, source)
    assert names(found) == names(expected)
    for split, (_, samples) in found.items():
        for sample, same in zip(samples, expected[split][1]):
            assert (sample.image == same.image).all()


def test_splits_whose_files_are_missing_are_left_out(copy):
    source = copy(mnist)
    for path in list(source.rglob("train-*")):
        path.unlink()
    assert list(listed(mnist, source)) == ["test"]
    source = copy(svhn)
    (source / "extra_32x32.mat").unlink()
    assert list(listed(svhn, source)) == ["train", "test"]
    source = copy(stl10)
    (source / "stl10_binary" / "unlabeled_X.bin").unlink()
    assert list(listed(stl10, source)) == ["train", "test"]


@pytest.mark.parametrize("builder", [cifar100, mnist, stl10, svhn])
def test_pixels_are_views_of_one_array(layouts, builder):
    """A copy an image would take the memory twice; stl10 takes none, its files stay on the disk."""
    for _, samples in listed(builder, layouts[builder]).values():
        assert {id(base(sample.image)) for sample in samples} == {id(base(samples[0].image))}


def base(array) -> object:
    """What holds the memory that an array is a view of."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


# --- wrong and damaged sources ------------------------------------------------------------------


@pytest.mark.parametrize("builder", [name for name in builder_names() if name != "mnist5k"])
def test_needs_a_source(builder, tmp_path):
    with pytest.raises(UserError, match=f"^{builder} needs --source, "):
        build_beton(builder, None, tmp_path)


@pytest.mark.parametrize("builder", BUILDERS, ids=short)
def test_needs_a_source_that_holds_it(builder, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{short(builder)} found n.* in {tmp_path}.*get "):
        builder.splits(tmp_path)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        path.write_bytes(b"<html>this is what a server says instead of a file</html>")


@pytest.mark.parametrize("how", ["cut", "empty", "other", "missing"])
@pytest.mark.parametrize(
    ("builder", "file"),
    [
        (cifar10, "cifar-10-batches-py/data_batch_4"),
        (cifar100, "cifar-100-python/meta"),
        (cifar100, "cifar-100-python/train"),
        (stl10, "stl10_binary/class_names.txt"),
        (stl10, "stl10_binary/train_X.bin"),
        (stl10, "stl10_binary/test_y.bin"),
        (stl10, "stl10_binary/unlabeled_X.bin"),
        (svhn, "test_32x32.mat"),
        (svhn, "extra_32x32.mat"),
        (mnist, "MNIST/raw/t10k-images-idx3-ubyte"),
        (mnist, "MNIST/raw/train-labels-idx1-ubyte"),
        (dtd, "dtd/dtd/labels/val1.txt"),
        (flowers102, "flowers-102/imagelabels.mat"),
        (flowers102, "flowers-102/setid.mat"),
    ],
    ids=lambda value: value if isinstance(value, str) else short(value),
)
def test_a_damaged_file_is_named(copy, builder, file, how):
    source = copy(builder)
    path = source / file
    if how == "missing":
        path.unlink()
    else:
        damage(path, how)
    if how == "missing" and path.name in ("unlabeled_X.bin", "extra_32x32.mat"):
        return  # these may be
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        listed(builder, source)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    message = str(caught.value)
    assert path.name in message and str(source) in message and "\n" not in message
    assert any(mend in message for mend in ("again", "get ", "put it there")), message


def test_damaged_gzip(copy):
    source = copy(mnist)
    raw = source / "MNIST" / "raw"
    packed = raw / "train-images-idx3-ubyte.gz"
    content = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").unlink()
    good = gzip.compress(content)
    for bad in (good[:-100], b"", content, good[:40] + bytes(40) + good[80:]):
        packed.write_bytes(bad)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz .*download it again"):
            mnist.splits(source)


def test_idx_heads(copy):
    source = copy(mnist)
    raw = source / "MNIST" / "raw"
    labels, images = raw / "t10k-labels-idx1-ubyte", raw / "t10k-images-idx3-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(images.read_bytes())
    with pytest.raises(ValueError, match="not an idx file of labels"):
        mnist.splits(source)
    labels.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="has 14 bytes uncompressed, and its header announces 13"):
        mnist.splits(source)
    labels.write_bytes(struct.pack(">II", 2049, 4) + bytes(4))
    with pytest.raises(ValueError, match="label below 10 for each of the 5 images"):
        mnist.splits(source)
    labels.write_bytes(good[:-1] + bytes([10]))
    with pytest.raises(ValueError, match="label below 10 for each of the 5 images"):
        mnist.splits(source)
    labels.write_bytes(good)
    content = images.read_bytes()
    images.write_bytes(content[:8] + struct.pack(">II", 32, 32) + content[16:])
    with pytest.raises(ValueError, match="not an idx file of 28 px images"):
        mnist.splits(source)
    images.unlink()
    with pytest.raises(FileNotFoundError, match="labels-idx1-ubyte without t10k-images-idx3-ubyte"):
        mnist.splits(source)


@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_arrays_in_either_order(copy, monkeypatch, order):
    source = copy(cifar100)
    pixels = random_pixels(7, 6, 3072)
    content = {"data": np.asarray(pixels, order=order), "fine_labels": [99] * 6}
    (source / "cifar-100-python" / "test").write_bytes(pickle.dumps(content, protocol=4))
    checksums.publish(monkeypatch, torchvision.datasets.CIFAR100, source / "cifar-100-python")
    for sample, row in zip(listed(cifar100, source)["val"][1], pixels):
        assert (sample.image.transpose(2, 0, 1).reshape(-1) == row).all()


def test_cifar100_archive_damaged_or_another(layouts, tmp_path):
    archive = tmp_path / OFFICIAL[cifar100].filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(layouts[cifar100] / OFFICIAL[cifar100].base_folder, OFFICIAL[cifar100].base_folder)
    content = archive.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for bad in (content[: len(content) // 2], b"", b"no archive", changed):
        archive.write_bytes(bad)
        with pytest.raises(ValueError, match="cifar-100-python.tar.gz.*download it again"):
            cifar100.splits(tmp_path)
    with tarfile.open(archive, "w:gz") as file:
        file.add(layouts[cifar10] / OFFICIAL[cifar10].base_folder, OFFICIAL[cifar10].base_folder)
    with pytest.raises(ValueError, match="not the whole cifar-100-python.tar.gz.*download it again"):
        cifar100.splits(tmp_path)


def test_stl10_says_how_to_unpack(tmp_path):
    archive = tmp_path / "stl10_binary.tar.gz"
    archive.touch()
    for source in (tmp_path, archive):
        with pytest.raises(FileNotFoundError, match=rf"tar -xzf '{archive}' -C '{tmp_path}'\.$"):
            stl10.splits(source)


def test_dtd_lists_and_folders(copy):
    source = copy(dtd)
    path = source / "dtd" / "dtd" / "labels" / "test1.txt"
    good = path.read_text()
    for line in (
        "texture99/1.jpg",
        "texture01",
        "texture01/",
        "../../1.jpg",
        "texture01/../1.jpg",
        "texture01/1",
    ):
        path.write_text(good + line + "\n")
        with pytest.raises(ValueError, match="^Line 48 of .*test1.txt must be an image of a class"):
            dtd.splits(source)
    path.write_text(good)
    shutil.rmtree(source / "dtd" / "dtd" / "images" / "texture01")
    with pytest.raises(ValueError, match="46 class folders instead of 47"):
        dtd.splits(source)


def test_flowers102_needs_its_images(copy):
    source = copy(flowers102)
    shutil.rmtree(source / "flowers-102" / "jpg")
    with pytest.raises(FileNotFoundError, match="tar -xzf 102flowers.tgz"):
        flowers102.splits(source)


@pytest.fixture
def mat_files(monkeypatch):
    """Variables by file name, in place of MATLAB files: reading a real one starts a process (see test_files.py)."""
    contents = {}
    for builder in (flowers102, svhn):
        monkeypatch.setattr(
            builder, "read_mat", lambda path, names: {name: contents[path.name][name] for name in names}
        )
    return contents


def test_svhn_images_and_labels_are_checked(copy, mat_files):
    source = copy(svhn)
    pixels, digits = random_pixels(0, 32, 32, 3, 4), np.array([[0.0], [1], [9], [10]])
    good = {"X": pixels, "y": digits}  # as MATLAB would save them again: doubles
    mat_files |= {"train_32x32.mat": good, "extra_32x32.mat": good, "test_32x32.mat": good}
    assert [sample.label for sample in listed(svhn, source)["test"][1]] == [0, 1, 9, 0]
    cell = np.empty(2, object)
    cell[:] = [pixels[0], pixels]
    for bad in (pixels[:31], pixels[..., 0], pixels[:, :, :2], pixels * 1.0, np.array(["text"]), cell):
        mat_files["test_32x32.mat"] = {"X": bad, "y": digits}
        with pytest.raises(ValueError, match="test_32x32.mat does not hold images of 32 x 32 x 3"):
            svhn.splits(source)
    for bad in (digits + 1, digits - 1, digits / 2, digits * np.nan, np.array(["text"])):
        mat_files["test_32x32.mat"] = {"X": pixels, "y": bad}
        with pytest.raises(ValueError, match="does not hold whole numbers from 0 to 10 as y: dow"):
            svhn.splits(source)
    mat_files["test_32x32.mat"] = {"X": pixels, "y": digits[:3]}
    with pytest.raises(ValueError, match="test_32x32.mat holds 4 images and 3 labels: download"):
        svhn.splits(source)


def test_flowers102_labels_and_numbers_are_checked(copy, mat_files):
    source = copy(flowers102)
    labels = {"labels": np.arange(1, 103)[None]}
    good = {"trnid": np.array([[1.0, 2]]), "valid": np.array([[3.0]]), "tstid": np.array([[102.0, 101]])}
    mat_files |= {"imagelabels.mat": labels, "setid.mat": good}
    for name in good:
        for bad in ([[0]], [[103]], [[1.5]], [["a"]]):
            mat_files["setid.mat"] = {**good, name: np.array(bad)}
            with pytest.raises(ValueError, match=f"setid.mat does not hold whole numbers from 1 to 102 as {name}"):
                flowers102.splits(source)
    mat_files["setid.mat"] = good
    found = names(listed(flowers102, source))
    assert [name[-9:] for name, _ in found["test"]] == ["00102.jpg", "00101.jpg"]
    for bad in ([[0] * 102], [[103] * 102]):
        mat_files["imagelabels.mat"] = {"labels": np.array(bad)}
        with pytest.raises(ValueError, match="imagelabels.mat does not hold .* 1 to 102 as labels"):
            flowers102.splits(source)
    mat_files |= {"imagelabels.mat": {"labels": np.full((1, 8190), 1.0)}}
    mat_files |= {"setid.mat": {**good, "tstid": np.array([[8190]])}}
    with pytest.raises(ValueError, match="from 1 to 8,189 as tstid"):
        flowers102.splits(source)


def test_caltech101_needs_every_class(copy):
    source = copy(caltech101)
    shutil.rmtree(source / "caltech101" / "101_ObjectCategories" / "thing007")
    with pytest.raises(ValueError, match="100 class folders besides BACKGROUND_Google instead of 101"):
        caltech101.splits(source)


# --- build-beton from end to end ----------------------------------------------------------------


def test_flowers102_becomes_beton(copy, tmp_path):
    source = copy(flowers102)
    bad = listed(flowers102, source)["val"][1][3]
    Path(bad.image).write_bytes(b"no image")
    reports = build_beton("flowers102", source, tmp_path / "out", canvas=16, workers=1).splits
    counts = [(report.split, report.samples, report.bad) for report in reports]
    assert counts == [("train", 20, 0), ("val", 9, 1), ("test", 72, 0)]
    for report in reports:
        expected = listed(flowers102, source)[report.split][1]
        order = read_metadata(report.path)["index"]
        assert read_labels(report.path).tolist() == [expected[index].label for index in order]
    assert bad.name in (tmp_path / "out" / "bad_images.jsonl").read_text()


def test_stl10_becomes_beton(layouts, tmp_path):
    reports = build_beton("stl10", layouts[stl10], tmp_path, canvas=32, workers=1).splits
    counts = [(report.split, report.samples, len(report.classes)) for report in reports]
    assert counts == [("train", 10, 10), ("test", 4, 10), ("unlabelled", 3, 0)]
    rows = read_metadata(reports[0].path)
    assert read_labels(reports[0].path).tolist() == [9 - index for index in rows["index"]]
    assert read_labels(reports[2].path).tolist() == [-1, -1, -1]
    content = reports[0].path.read_bytes()
    samples = listed(stl10, layouts[stl10])["train"][1]
    for row in rows:
        stored = np.frombuffer(content, np.uint8, 3072, row["image"]["data_ptr"])
        image = Image.fromarray(np.ascontiguousarray(samples[row["index"]].image))
        expected = image.resize((32, 32), Image.Resampling.BILINEAR)
        assert (stored.reshape(32, 32, 3) == np.asarray(expected)).all()


# --- download -----------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [name for name in builder_names() if hasattr(load_builder(name), "DOWNLOAD")])
def test_download_asks_torchvision(monkeypatch, tmp_path, builder):
    module, calls = load_builder(builder), []
    for call in module.DOWNLOAD:
        accepted = inspect.signature(getattr(torchvision.datasets, call["dataset"])).bind

        def dataset(accepted=accepted, **options):
            accepted(**options)  # raises TypeError for an option that torchvision does not know
            calls.append(options)

        monkeypatch.setattr(torchvision.datasets, call["dataset"], dataset)
    download_dataset(builder, tmp_path)
    assert calls == [
        {"root": tmp_path, "download": True, **{name: value for name, value in call.items() if name != "dataset"}}
        for call in module.DOWNLOAD
    ]


def test_which_builders_can_download():
    can = {
        name: [tuple(call.values()) for call in load_builder(name).DOWNLOAD]
        for name in builder_names()
        if hasattr(load_builder(name), "DOWNLOAD")
    }
    assert can == {
        "caltech101": [("Caltech101",)],
        "cifar10": [("CIFAR10",)],
        "cifar100": [("CIFAR100",)],
        "dtd": [("DTD",)],
        "fashionmnist": [("FashionMNIST",)],
        "flowers102": [("Flowers102",)],
        "inaturalist": [("INaturalist", "2021_train_mini"), ("INaturalist", "2021_valid")],
        "mnist": [("MNIST",)],
        "places365": [("Places365", "val", True)],
        "stl10": [("STL10", "train")],
        "sun397": [("SUN397",)],
        "svhn": [("SVHN", "train"), ("SVHN", "test"), ("SVHN", "extra")],
    }


def test_docstrings_have_the_checksums_that_torchvision_checks():
    known = torchvision.datasets
    published = {
        caltech101: re.findall(r'md5="(\w{32})"', inspect.getsource(known.Caltech101)),
        cifar10: [known.CIFAR10.tgz_md5],
        cifar100: [known.CIFAR100.tgz_md5],
        dtd: [known.DTD._MD5],
        fashionmnist: [md5 for _, md5 in known.FashionMNIST.resources],
        flowers102: [md5 for _, md5 in known.Flowers102._file_dict.values()],
        mnist: [md5 for _, md5 in known.MNIST.resources],
        stl10: [known.STL10.tgz_md5],
        svhn: [md5 for _, _, md5 in known.SVHN.split_list.values()],
    }
    for builder, published_checksums in published.items():
        assert re.findall(r"\b[0-9a-f]{32}\b", builder.__doc__) == published_checksums


@pytest.mark.parametrize("builder", BUILDERS, ids=short)
def test_docstring_begins_with_one_line(builder):
    line = builder.__doc__.splitlines()[0]
    assert len(line) <= 90 and line.endswith(".")
