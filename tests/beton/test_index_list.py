"""Lists of images, by name or by index: the meaning of each line, and the error for each mistake."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic_images import jpeg_bytes, photo

from fastssl import cli
from fastssl.beton import build_beton, read_index_list, read_metadata
from fastssl.beton.index_list import _match
from fastssl.common.errors import UserError

# In the order of their index; the image with index 3 is bad.
NAMES = [
    "train/n01440764/n01440764_10.JPEG",
    "train/n01440764/n01440764_9.JPEG",
    "train/n01440764/same.jpg",
    "train/n01443537/broken.jpg",
    "train/n01443537/käse 1.png",
    "train/n01443537/same.jpg",
    "train/n01443537/twin.jpg",
    "train/n01443537/twin.png",
    "train/n01443537/v1.2",
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    """A file with names like ImageNet's, in shuffled order."""
    root = tmp_path_factory.mktemp("listed")
    for number, name in enumerate(NAMES):
        path = root / "source" / (name + ("" if "v1.2" not in name else ".jpg"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(photo(number, 40, 40)) if "broken" not in name else b"no image")
    report = build_beton("imagefolder", root / "source", root, canvas=32, workers=1).splits[0]
    assert report.samples == 8
    names = root / "train.beton.names.txt"
    names.write_text(names.read_text().replace("v1.2.jpg", "v1.2"))  # a builder may name without suffixes
    assert names.read_text().splitlines() == NAMES
    return report.path


@pytest.fixture
def read(beton, tmp_path):
    """Read a list of these lines."""

    def read(*lines: str, end: str = "\n") -> list[int]:
        path = tmp_path / "list.txt"
        path.write_text("".join(line + end for line in lines), encoding="utf-8")
        index = read_index_list(beton, path)
        assert index.dtype == np.int64 and index.shape == (len(index),)
        assert np.isin(index, read_metadata(beton)["index"]).all()
        return index.tolist()

    return read


# --- the meaning of a line --------------------------------------------------------------------------


def test_names_are_read_in_the_order_of_the_list(read):
    assert read("n01440764_9.JPEG", "käse 1.png", "n01440764_10.JPEG") == [1, 4, 0]
    assert read(*[NAMES[index] for index in (8, 2, 5, 0)]) == [8, 2, 5, 0]
    assert read("n01443537/same.jpg", "./train/n01440764/same.jpg", "twin.png") == [5, 2, 7]


def test_suffixes_are_ignored_only_if_the_whole_name_is_not_found(read):
    assert read("n01440764_9", "n01440764_10.jpg", "train/n01443537/käse 1") == [1, 0, 4]
    assert read("twin.png", "twin.jpg", "v1.2") == [7, 6, 8]
    with pytest.raises(UserError, match="'v1.3', names no image"):  # .3 is not a suffix
        read("v1.3")


def test_a_whole_name_has_precedence_over_the_end_of_a_name():
    index, count = _match([b"a/b.jpg", b"b.jpg", b"c"], enumerate([b"x/a/b.jpg", b"b.jpg", b"a/b.jpg", b"cc", b"b/cc"]))
    assert index.tolist()[:2] == [2, 1] and count.tolist() == [1, 1, 0]


def test_blank_lines_comments_and_line_ends(read):
    assert read("# the 1 % subset", "", "  n01440764_9.JPEG  ", "#twin.png", end="\r\n") == [1]
    assert read("\ufeffn01440764_9.JPEG") == [1]
    assert read("n01440764_9.JPEG\ntwin.png", end="") == [1, 7]


def test_lines_of_numbers_are_indices(read):
    assert read("8", "0", "004") == [8, 0, 4]


def test_a_name_that_is_not_utf_8(beton, tmp_path):
    path = Path(shutil.copytree(beton.parent, tmp_path / "copy")) / "train.beton"
    names = path.with_name("train.beton.names.txt")
    names.write_bytes(names.read_bytes().replace("käse".encode(), b"k\xe4se\x85"))
    (tmp_path / "list.txt").write_bytes(b"k\xe4se\x85 1.png\n")
    assert read_index_list(path, tmp_path / "list.txt").tolist() == [4]


# --- mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, says",
    [
        (["# none", ""], "names no images: write the name of one"),
        (
            ["twin.png", "#", "missing.JPEG", "also missing"],
            "Line 3 of LIST, 'missing.JPEG', names no image of BETON (2 such lines in all): "
            "write names like 'train/n01440764/n01440764_10.JPEG'.",
        ),
        (["twin.png 7"], "'twin.png 7', names no image"),
        (["same.jpg"], "Line 1 of LIST, 'same.jpg', names 2 images of BETON: write more of the path"),
        (["twin"], "'twin', names 2 images of BETON: write more of the path before it, or its suffix"),
        (
            ["twin.png", "", "twin.jpg", "twin.png"],
            "Line 4 of LIST, 'twin.png', names the image of line 1 again: remove one of them.",
        ),
        (["n01440764_9.JPEG", "n01440764/n01440764_9.JPEG"], "names the image of line 1 again"),
        (["5", "5", "05"], "'5', names the image of line 1 again"),
        (["5", "05"], "'05', names the image of line 1 again"),
        (
            ["broken.jpg"],
            "Line 1 of LIST, 'broken.jpg', names an image that is not in BETON: it was bad when the "
            "file was built (bad_images.jsonl in its folder has the reason): remove it.",
        ),
        (["1", "3"], "Line 2 of LIST, '3', names an image that is not in BETON: it was bad"),
        (["1", "9", "12"], "'9', is no index of BETON (2 such lines in all): write indices from 0 to 8."),
        (["1", "9" * 40], "names no image of BETON"),
        (["-1"], "'-1', names no image of BETON"),
    ],
)
def test_a_mistake_is_a_user_error_that_names_the_line(read, beton, tmp_path, lines, says):
    says = says.replace("LIST", str(tmp_path / "list.txt")).replace("BETON", str(beton))
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        read(*lines)
    assert "\n" not in str(raised.value)


def test_images_left_out_by_limit(beton, tmp_path):
    out = tmp_path / "out"
    path = build_beton("imagefolder", beton.parent / "source", out, canvas=32, limit=4, workers=1).splits[0].path
    absent = np.setdiff1d(range(9), [3, *read_metadata(path)["index"]])
    (tmp_path / "list.txt").write_text(f"{absent[0]}\n")
    with pytest.raises(UserError, match="not in .*: it was left out by --limit 4, or bad"):
        read_index_list(path, tmp_path / "list.txt")


def test_files_without_names_or_indices(beton, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    (tmp_path / "names.txt").write_text("twin.png\n")
    (tmp_path / "indices.txt").write_text("7\n")
    (tmp_path / "beyond.txt").write_text("9\n")
    old = Path(shutil.copy(beton, tmp_path))  # without manifest and names
    assert read_index_list(old, tmp_path / "indices.txt").tolist() == [7]
    with pytest.raises(UserError, match="is no index of .*: write indices from 0 to 8"):
        read_index_list(old, tmp_path / "beyond.txt")
    with pytest.raises(UserError, match="names.txt is missing, .*older version built it.: build it with"):
        read_index_list(old, tmp_path / "names.txt")
    with pytest.raises(UserError, match="No file .*no.txt"):
        read_index_list(old, tmp_path / "no.txt")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_index_list(old, tmp_path)

    stock = tmp_path / "stock.beton"
    fields = {"image": RGBImageField("raw"), "label": IntField()}
    rows = [(np.zeros((8, 8, 3), np.uint8), 0)] * 4
    DatasetWriter(str(stock), fields, num_workers=1).from_indexed_dataset(rows)
    with pytest.raises(UserError, match="has no integer field 'index'.*build-beton"):
        read_index_list(stock, tmp_path / "indices.txt")


# --- large lists, and the command ---------------------------------------------------------------


def test_a_list_of_one_percent_is_found_among_many_names():
    """Among 1.28 million names this takes a second; the limit for 200,000 leaves room for a slow machine."""
    names = [f"train/n{n // 1300:08}/n{n // 1300:08}_{n}.JPEG".encode() for n in range(200_000)]
    keys = [name.rpartition(b"/")[2] for name in names[::100]]
    start = time.process_time()
    index, count = _match(keys, enumerate(names))
    assert time.process_time() - start < 3
    assert (count == 1).all() and (index == np.arange(0, 200_000, 100)).all()


@pytest.mark.parametrize("lines, code", [(["n01440764_9.JPEG", "twin.png", "twin.jpg"], 0), (["no"], 2)])
def test_the_command_shows_a_subset(beton, tmp_path, monkeypatch, capsys, lines, code):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["fastssl", "inspect", str(beton), "--subset", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert (end.value.code or 0) == code
    if code == 0:
        subset = out[out.index(f"{path} names 3 of 8 images, 37.50%") :]
        assert "2 classes, samples per class: min 1, median 2, max 2" in subset
        assert re.search("n01440764 +1 +█{15} ", subset) and re.search("n01443537 +2 +█{30}", subset)
    else:
        assert err.count("\n") == 2 and "names no image" in err
