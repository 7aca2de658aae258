"""SampleList, and where the bytes of a sample are read from."""

from functools import partial
from pathlib import Path

import pytest

from fastssl.beton import Sample
from fastssl.beton.images import read_image_bytes
from fastssl.beton.source import SampleList


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
