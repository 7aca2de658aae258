"""Splits as builders list them, SampleList, and where the bytes of a sample are read from."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastssl.beton import LeftOut, Sample
from fastssl.beton.reading import read_image_bytes
from fastssl.beton.source import SampleList, changed_since, list_splits
from fastssl.common.errors import UserError


def test_a_sample_list_returns_its_samples(tmp_path):
    (tmp_path / "archive").write_bytes(b"0123456789")
    samples = [
        Sample("cat/ä 1.jpg", 3, "ä 1"),
        Sample((str(tmp_path / "archive"), 2, 5), 0, "member"),
        Sample(partial(bytes, b"made when called"), 1, "row 7"),
    ]
    sample_list = SampleList(iter(samples))
    assert len(sample_list) == 3
    assert list(sample_list)[:2] == samples[:2]
    assert read_image_bytes(sample_list[1].image) == b"23456"
    assert read_image_bytes(sample_list[2].image) == b"made when called"
    with pytest.raises(IndexError):
        sample_list[3]


def test_a_path_object_becomes_a_string():
    assert SampleList([Sample(Path("a/b.jpg"), 0, "b")])[0] == SampleList([Sample("a/b.jpg", 0, "b")])[0]


def test_a_range_beyond_the_end_of_the_file_is_an_error(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"01234")
    with pytest.raises(ValueError, match="cut.tar ends within this image, at byte 5"):
        read_image_bytes((tmp_path / "cut.tar", 3, 10))


@pytest.mark.parametrize("kind", [list, iter])
def test_what_a_builder_leaves_out_is_counted_by_reason(monkeypatch, kind):
    """LeftOut may stand anywhere among the samples, of a list or of a generator."""
    listed = [LeftOut("rows without an image", 2), Sample("a.jpg", 0, "a"), LeftOut("hard links", 1)]
    listed += [Sample("b.jpg", 0, "b"), LeftOut("rows without an image", 3)]
    builder = SimpleNamespace(CANVAS=32, splits=lambda source: {"train": (["a"], kind(listed))})
    monkeypatch.setattr("fastssl.beton.source.load_builder", lambda name: builder)
    (split,) = list_splits("some", None)
    assert [sample.name for sample in split.samples] == ["a", "b"]
    assert split.left_out == {"rows without an image": 5, "hard links": 1}


def test_splits_none_is_for_builders_that_take_splits_from_names(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.jpg").touch()
    assert [split.name for split in list_splits("imagefolder", tmp_path)] == ["train", "val"]
    (split,) = list_splits("imagefolder", tmp_path, split_rule="none")
    assert (split.name, split.classes) == ("train", ["train", "val"])
    for builder in ("cifar10", "mnist", "dtd"):
        with pytest.raises(UserError, match=f"{builder} does not take its splits from names: leave out --splits none"):
            list_splits(builder, tmp_path, split_rule="none")


def make_classes(folder, images):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (folder / name / f"{number:03}.jpg").touch()


def names_of(split):
    return {sample.name for sample in split.samples}


def test_hold_out_takes_a_share_of_each_class_for_val(tmp_path):
    make_classes(tmp_path, 500)
    train, val = list_splits("imagefolder", tmp_path, hold_out=20)
    assert (train.name, val.name) == ("train", "val") and train.classes == val.classes == ["cat", "dog"]
    assert names_of(train) | names_of(val) == names_of(list_splits("imagefolder", tmp_path)[0])
    assert len(train.samples) + len(val.samples) == 1000
    for label in (0, 1):  # 100 ± 9
        assert 70 < sum(sample.label == label for sample in val.samples) < 130
    make_classes(tmp_path, 700)
    train_later, val_later = list_splits("imagefolder", tmp_path, hold_out=20)
    assert names_of(train) < names_of(train_later) and names_of(val) < names_of(val_later)


def test_hold_out_counts_what_is_left_out_once(monkeypatch):
    listed = [LeftOut("rows without an image", 2), *(Sample(f"{n}.jpg", 0, str(n)) for n in range(40))]
    builder = SimpleNamespace(CANVAS=32, splits=lambda source: {"train": (["a"], listed)})
    monkeypatch.setattr("fastssl.beton.source.load_builder", lambda name: builder)
    train, val = list_splits("some", None, hold_out=50)
    assert train.left_out == {"rows without an image": 2} and val.left_out == {}
    assert len(train.samples) + len(val.samples) == 40 and len(val.samples) > 5


def test_hold_out_of_splits_or_of_too_few_images_is_an_error(tmp_path):
    make_classes(tmp_path / "few", 2)
    with pytest.raises(UserError, match="--hold-out 0.01% leaves the split 'val' without images: name another share"):
        list_splits("imagefolder", tmp_path / "few", hold_out=0.01)
    make_classes(tmp_path / "split" / "train", 2)
    make_classes(tmp_path / "split" / "val", 2)
    with pytest.raises(UserError, match="is for a source without splits, and this one has train, val: leave out"):
        list_splits("imagefolder", tmp_path / "split", hold_out=10)


def test_a_function_that_reads_an_image_tells_its_file_by_an_attribute(tmp_path):
    """As the parquet builder's do: a change of the file is seen, whatever kind of `image` the sample has."""
    path = tmp_path / "table.parquet"
    path.write_bytes(b"old")
    before = path.stat().st_ctime_ns
    reader = partial(path.read_bytes)
    reader.path = str(path)
    for image in (reader, str(path), path, (str(path), 0, 3)):
        assert not changed_since([Sample(image, 0, "a")], [0], before)
        assert changed_since([Sample(image, 0, "a")], [0], before - 1)
    path.unlink()
    assert changed_since([Sample(reader, 0, "a")], [0], before)
    assert not changed_since([Sample(lambda: b"", 0, "a")], [0], before)
