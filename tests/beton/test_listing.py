"""The compact list of samples: what goes in comes out."""

from functools import partial
from pathlib import Path

import pytest

from fastssl.beton import Sample
from fastssl.beton.images import read_image_bytes
from fastssl.beton.sample_list import SampleList


def test_a_listing_gives_back_what_was_listed(tmp_path):
    (tmp_path / "archive").write_bytes(b"0123456789")
    samples = [
        Sample("cat/ä 1.jpg", 3, "ä 1"),
        Sample((str(tmp_path / "archive"), 2, 5), 0, "member"),
        Sample(partial(bytes, b"made when called"), 1, "row 7"),
    ]
    listing = SampleList(iter(samples))
    assert len(listing) == 3
    assert list(listing)[:2] == samples[:2]
    assert read_image_bytes(listing[1].image) == b"23456"
    assert read_image_bytes(listing[2].image) == b"made when called"
    with pytest.raises(IndexError):
        listing[3]


def test_a_path_object_and_a_string_are_listed_alike():
    assert SampleList([Sample(Path("a/b.jpg"), 0, "b")])[0] == SampleList([Sample("a/b.jpg", 0, "b")])[0]


def test_a_part_that_the_file_does_not_have_is_an_error(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"01234")
    with pytest.raises(ValueError, match="cut.tar ends within this image, at byte 5"):
        read_image_bytes((tmp_path / "cut.tar", 3, 10))
