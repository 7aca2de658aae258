"""Images of one's own in a CSV file's list, in WebDataset shards and in Parquet files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet as pq
from test_builders_large import colour, jpeg, listed, names, tar_bytes, write, write_tar

from beton_builders import csv, parquet, webdataset
from fastssl.beton import LeftOut, Sample, build_beton, read_header, read_labels, read_metadata
from fastssl.beton.reading import read_image_bytes


def assert_built(report, expected: list[tuple[str, int]], pictures: list[str]) -> None:
    """The file holds these names' labels, and the pictures that were made for them."""
    assert sorted(read_labels(report.path)) == sorted(label for _, label in expected)
    content = report.path.read_bytes()
    for row in read_metadata(report.path):
        assert row["label"] == expected[row["index"]][1]
        pixels = np.frombuffer(content, np.uint8, 192, row["image"]["data_ptr"])
        difference = pixels.reshape(-1, 3) - np.array(colour(pictures[row["index"]]), int)
        assert np.abs(difference).max() <= 4


# --- csv ----------------------------------------------------------------------------------------


def table(root: Path, text: str | bytes, name: str = "images.csv") -> Path:
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root / name


def test_csv(tmp_path):
    write(tmp_path, "cats/a 1.jpg", "dogs/b.jpg", "ä, c.jpg")
    rows = [
        "split,note,path,label",
        'val,x,"ä, c.jpg",dog',
        "",
        f"train,,{tmp_path}/dogs/b.jpg,dog",
        'train,"two\nlines",cats/a 1.jpg,"cat, grey"',
    ]
    for ending, start in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        source = table(tmp_path, start + ending.join(rows).encode())
        found = listed(csv, source)
        assert [(split, classes) for split, (classes, _) in found.items()] == [
            ("val", ["cat, grey", "dog"]),
            ("train", ["cat, grey", "dog"]),
        ]
        assert names(found["val"][1]) == [("ä, c.jpg", 1)]
        assert names(found["train"][1]) == [(f"{tmp_path}/dogs/b.jpg", 1), ("cats/a 1.jpg", 0)]
        for _, samples in found.values():
            for sample in samples:
                assert read_image_bytes(sample.image) == jpeg(sample.name)


def test_csv_orders_numbers_as_numbers(tmp_path):
    classes, samples = listed(csv, table(tmp_path, "path,label\na,10\nb,9\nc,-5\nd,10"))["train"]
    assert classes == ["-5", "9", "10"]
    assert names(samples) == [("a", 2), ("b", 1), ("c", 0), ("d", 2)]
    classes, _ = listed(csv, table(tmp_path, "path,label\na,10\nb,9\nc,x"))["train"]
    assert classes == ["10", "9", "x"]


def test_csv_without_labels(tmp_path):
    found = listed(csv, table(tmp_path, "path\na.jpg\nb.jpg\n"))
    assert found["train"][0] == []
    assert names(found["train"][1]) == [("a.jpg", -1), ("b.jpg", -1)]


def test_csv_is_built(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    source = table(tmp_path, "path,label\na.jpg,x\nb.jpg,y\nc.jpg,x\n")
    (report,) = build_beton("csv", source, tmp_path / "out", canvas=8, workers=1).splits
    assert_built(report, [("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 0)], ["a.jpg", "b.jpg", "c.jpg"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "must name its columns in line 1, and that line is '': write path,label or path,label,split there"),
        ("file,label\na,b", "must name its columns in line 1, and that line is 'file,label'"),
        ("path|label\na|b", "must name its columns in line 1, .* is 'path|label'"),
        ("path,x;image\n", "could be separated by commas or semicolons"),
        ("image\tlabel,path\n", "could be separated by commas or tabs"),
        ("Path,label,path\n", "has the columns path and path: call the one to use 'path'"),
        ("file_name,image\n", "has the columns file_name and image: call"),
        ("path,Label,label\n", "has the columns label and label: call"),
        ("path,class\na,b\n", "has no column label, but a column class: call it label"),
        ("path;label\na;b;c\n", "Line 2 of .*: put values with a semicolon in double quotes"),
        ("path,label\n", "lists no images"),
        ("path,label\na.jpg,cat\nb.jpg\n", "Line 3 of .*.csv has 1 values, and line 1 names 2"),
        ("path,label\n\na,b.jpg,cat\n", "Line 3 of .*.csv has 3 values, and line 1 names 2"),
        ("path,label\n,cat\n", "Line 2 of .*.csv gives no path or split"),
        ("path,split\na.jpg, \n", "Line 2 of .*.csv gives no path or split"),
        ("path,split\na.jpg,../etc\n", "Line 2 of .*.csv has the split '../etc'"),
        (b"path,label\na.jpg,cat\n\xe4.jpg,dog\n", "Line 3 of .*.csv is not UTF-8 text: save"),
        ("path,label\n".encode("utf-16-le"), "is not UTF-8 text: save"),
        ("path,label\n".encode("utf-32"), "is UTF-32 text: save"),
        ("path\n\ud800".encode("utf-16", "surrogatepass"), "is not whole UTF-16 text .*: save"),
        ("path\na.jpg\n".encode("utf-16")[:-1], "is not whole UTF-16 text .*: save"),
        ('path,label\n"a.jpg,cat\n', "Line 2 of .*.csv is not comma-separated text .*write"),
        (f"path\n{'x' * 200_000}\n", "Line 2 of .*.csv is not comma-separated text .*write"),
    ],
)
def test_csv_says_what_is_wrong(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        csv.splits(table(tmp_path, text))


def test_csv_needs_a_file(tmp_path):
    with pytest.raises(ValueError, match="csv needs --source, a CSV file"):
        csv.splits(tmp_path)


# --- webdataset ---------------------------------------------------------------------------------


def shard(start: int, labels: list[int], ending: str = "cls") -> dict[str, bytes]:
    files = {}
    for number, label in enumerate(labels, start):
        text = f"{label}\n" if ending == "cls" else json.dumps({"label": label, "caption": "x"})
        files[f"{number:04}.{ending}"] = text.encode()
        files[f"{number:04}.jpg"] = jpeg(f"{number:04}.jpg")
    return files


def shards(root: Path) -> Path:
    write_tar(root / "train-000001.tar", shard(2, [1, 0]))
    write_tar(root / "train-000000.tar", shard(0, [3, 0]))
    write_tar(root / "validation-000000.tar", shard(9, [2], "json"))
    (root / "README.md").write_text("shards")
    return root


EXPECTED = {
    "train": [
        ("train-000000.tar/0000.jpg", 3),
        ("train-000000.tar/0001.jpg", 0),
        ("train-000001.tar/0002.jpg", 1),
        ("train-000001.tar/0003.jpg", 0),
    ],
    "val": [("validation-000000.tar/0009.jpg", 2)],
}


def test_webdataset(tmp_path):
    found = listed(webdataset, shards(tmp_path))
    assert list(found) == ["train", "val"]
    for split, (classes, samples) in found.items():
        assert classes == ["0", "1", "2", "3"]
        assert names(samples) == EXPECTED[split]
        for sample in samples:
            assert read_image_bytes(sample.image) == jpeg(sample.name)
    one = listed(webdataset, tmp_path / "train-000001.tar")
    assert one["train"][0] == ["0", "1"]
    assert names(one["train"][1]) == EXPECTED["train"][2:]


def test_webdataset_is_built(tmp_path):
    reports = build_beton(
        "webdataset", shards(tmp_path), tmp_path.with_name(tmp_path.name + "-out"), canvas=8, workers=1
    ).splits
    for report in reports:
        expected = EXPECTED[report.split]
        assert_built(report, expected, [name for name, _ in expected])


def test_webdataset_takes_class_names_from_a_file(tmp_path):
    (shards(tmp_path) / "classes.txt").write_text("ant\nbee\n\ncat\ndög\n", encoding="utf-8")
    for source in (tmp_path, tmp_path / "train-000001.tar"):
        assert listed(webdataset, source)["train"][0] == ["ant", "bee", "cat", "dög"]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat")
    with pytest.raises(ValueError, match="names 3 classes, but the shards hold the label 3: add"):
        webdataset.splits(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xe4")
    with pytest.raises(ValueError, match="classes.txt is not UTF-8 text"):
        webdataset.splits(tmp_path)


def test_webdataset_without_labels(tmp_path):
    files = {
        "./photos/": b"",
        "photos/1.5.jpg": jpeg("photos/1.5.jpg"),  # its key is photos/1
        "photos/a.PNG": b"an image",
        "photos/a.json": b'{"caption": "x"}',
        "photos/a.seg.png": b"not the image of the sample",
        "photos/b.txt": b"no image",
        "photos/._c.jpg": b"of macOS",
        "license": b"",
        "other/a.webp": b"another key",
    }
    write_tar(tmp_path / "000.tar", files)
    found = listed(webdataset, tmp_path)
    assert list(found) == ["train"]
    classes, samples = found["train"]
    assert classes == []
    left_out = {each.reason: each.count for each in samples if isinstance(each, LeftOut)}
    assert left_out == {webdataset.FURTHER: 1, webdataset.NOT_USED: 4}
    samples = [each for each in samples if isinstance(each, Sample)]
    found = [("photos/1.5.jpg", -1), ("photos/a.PNG", -1), ("other/a.webp", -1)]
    assert names(samples) == [(f"000.tar/{name}", label) for name, label in found]
    assert read_image_bytes(samples[1].image) == b"an image"


@pytest.mark.parametrize(
    "files, said",
    [
        ({"1.jpg": b"", "1.cls": b"cat"}, "1.cls in .* must give a label as a whole number"),
        ({"1.jpg": b"", "1.cls": b"9" * 5000}, "1.cls in .* must give a label as a whole number"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, "1.cls in .* must give a label as a whole number"),
        ({"1.jpg": b"", "1.cls": b"-2"}, "1.cls in .* as a whole number, .*it is '-2'"),
        ({"1.jpg": b"", "1.cls": b"1000001"}, "1.cls in .*it is '1000001'"),
        ({"1.jpg": b"", "1.json": b"{"}, "1.json in .* must give a label as a whole number"),
        ({"1.jpg": b"", "1.json": b"[3]"}, "1.json in .* must give a label as a whole number"),
        ({"1.jpg": b"", "1.json": b"[" * 10**5}, "1.json in .* must give a label"),
        ({"1.jpg": b"", "1.json": b'{"label": "cat"}'}, "1.json in .*it is 'cat'"),
        ({"1.jpg": b"", "1.json": b'{"cls": true}'}, "1.json in .*it is 'True'"),
        ({"1.jpg": b"", "1.cls": b"1.5"}, "1.cls in .*it is '1.5'"),
        ({"1.jpg": b"", "2.jpg": b"", "1.cls": b"1"}, "the label 1.cls without an image next to it"),
    ],
)
def test_webdataset_says_what_is_wrong_in_a_shard(tmp_path, files, said):
    write_tar(tmp_path / "train-0.tar", files)
    with pytest.raises(ValueError, match=said):
        webdataset.splits(tmp_path)


def test_webdataset_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no .tar shards in .*: name their folder"):
        webdataset.splits(tmp_path)
    write_tar(tmp_path / "train-0.tar", shard(0, [1]))
    write_tar(tmp_path / "train-1.tar.gz", shard(0, [1]))
    for source in (tmp_path, tmp_path / "train-1.tar.gz"):
        with pytest.raises(ValueError, match="train-1.tar.gz is compressed, .*: uncompress it"):
            webdataset.splits(source)
    (tmp_path / "train-1.tar.gz").unlink()
    (tmp_path / "train-1.tar").write_bytes(gzip.compress(tar_bytes(shard(0, [1]))))
    with pytest.raises(ValueError, match="train-1.tar is not a whole, uncompressed tar .*again"):
        webdataset.splits(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 512, 800, 1024, 1600, 2048])
def test_webdataset_refuses_a_shard_that_is_cut_off(tmp_path, kept):
    (tmp_path / "0.tar").write_bytes(tar_bytes(shard(0, [1]))[:kept])
    with pytest.raises(ValueError, match="0.tar is not a whole, uncompressed tar .*again"):
        webdataset.splits(tmp_path)


# --- parquet ------------------------------------------------------------------------------------


def hugging_face(path: Path, start: int, labels: list[int], classes: list[str] | None = None, label="label") -> Path:
    """A file as datasets writes it: the image a struct, the classes in the schema's metadata."""
    numbers = range(start, start + len(labels))
    images = [{"bytes": jpeg(f"{number}.jpg"), "path": f"{number}.jpg"} for number in numbers]
    columns = {"image": images, label: pyarrow.array(labels, pyarrow.int64())}
    columns["caption"] = ["x"] * len(labels)
    features = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
    if classes:
        features[label] = {"names": classes, "_type": "ClassLabel"}
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.table(columns).replace_schema_metadata(notes), path, row_group_size=3)
    return path


def parquet_folder(root: Path) -> Path:
    classes = ["ant", "bee", "cat"]
    hugging_face(root / "data" / "train-00001-of-00002.parquet", 5, [2, 0], classes)
    hugging_face(root / "data" / "train-00000-of-00002.parquet", 0, [1, 0, 1, 2, 2], classes)
    hugging_face(root / "data" / "validation-00000-of-00001.parquet", 7, [1], classes)
    hugging_face(root / "data" / "test-00000-of-00001.parquet", 8, [-1, -1], classes)
    return root


def test_parquet(tmp_path):
    found = listed(parquet, parquet_folder(tmp_path))
    assert {split: classes for split, (classes, _) in found.items()} == {
        "test": [],
        "train": ["ant", "bee", "cat"],
        "val": ["ant", "bee", "cat"],
    }
    first, second = (f"data/train-0000{i}-of-00002.parquet" for i in (0, 1))
    labels = [(first, 0, 1), (first, 1, 0), (first, 2, 1), (first, 3, 2), (first, 4, 2)]
    labels += [(second, 0, 2), (second, 1, 0)]
    assert names(found["train"][1]) == [(f"{name}/{row}", label) for name, row, label in labels]
    assert names(found["test"][1])[1] == ("data/test-00000-of-00001.parquet/1", -1)
    for split, start in (("train", 0), ("val", 7), ("test", 8)):
        for number, sample in enumerate(found[split][1], start):
            assert read_image_bytes(sample.image) == jpeg(f"{number}.jpg")
    one = listed(parquet, tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert names(one["val"][1]) == [("validation-00000-of-00001.parquet/0", 1)]


def test_parquet_is_built(tmp_path):
    source = parquet_folder(tmp_path / "source")
    expected = {split: names(samples) for split, (_, samples) in listed(parquet, source).items()}
    reports = build_beton("parquet", source, tmp_path / "out", canvas=8, workers=1).splits
    assert [report.split for report in reports] == ["test", "train", "val"]
    for report, start in zip(reports, (8, 0, 7)):
        pictures = [f"{start + position}.jpg" for position in range(report.samples)]
        assert_built(report, expected[report.split], pictures)
    assert read_header(reports[1].path).classes == ["ant", "bee", "cat"]


def columns_file(root: Path, columns: dict, name: str = "train.parquet") -> Path:
    pq.write_table(pyarrow.table(columns), root / name)
    return root / name


IMAGES = [jpeg("0.jpg"), jpeg("1.jpg")]


@pytest.mark.parametrize(
    "columns, classes, labels",
    [
        ({"picture": IMAGES, "label": [2, 0]}, ["0", "1", "2"], [2, 0]),
        ({"img": IMAGES, "mask": IMAGES, "fine_label": [1, 0]}, ["0", "1"], [1, 0]),
        ({"image.bytes": [1, 2], "image": IMAGES, "width": [5, 6]}, [], [-1, -1]),
        ({"image": [{"bytes": each} for each in IMAGES]}, [], [-1, -1]),
        ({"image": pyarrow.array(IMAGES, pyarrow.large_binary())}, [], [-1, -1]),
        ({"image": IMAGES, "label": pyarrow.array([None, None], "int8")}, [], [-1, -1]),
    ],
)
def test_parquet_without_notes(tmp_path, columns, classes, labels):
    found, samples = listed(parquet, columns_file(tmp_path, columns))["train"]
    assert found == classes
    assert [sample.label for sample in samples] == labels
    assert [read_image_bytes(sample.image) for sample in samples] == IMAGES


def test_parquet_finds_the_class_label_of_the_notes(tmp_path):
    source = hugging_face(tmp_path / "train.parquet", 0, [1, 0], ["ant", "bee"], label="animal")
    classes, samples = listed(parquet, source)["train"]
    assert classes == ["ant", "bee"]
    assert [sample.label for sample in samples] == [1, 0]


def test_parquet_with_an_image_missing_names_its_row(tmp_path):
    source = columns_file(tmp_path, {"image": [{"bytes": IMAGES[0]}, {"bytes": None}]})
    _, samples = listed(parquet, source)["train"]
    assert read_image_bytes(samples[0].image) == IMAGES[0]
    with pytest.raises(ValueError, match="row 1 of row group 0 of .* holds no image"):
        read_image_bytes(samples[1].image)


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"label": [1, 2]}, "must have one column of images .* it has none among label"),
        ({"a": IMAGES, "b": IMAGES}, "must have one column of images .* it has a, b among a, b"),
        ({"image": IMAGES, "label": [[0], [1]]}, "holds list.* in its column label: .* or text"),
        ({"image": IMAGES, "label": [0.0, 0.5]}, "holds fractions in its column label"),
        ({"image": IMAGES, "label": [0.0, float("inf")]}, "holds fractions in its column label"),
        ({"image": IMAGES, "label": [0, 0], "Label": [1, 1]}, "has several columns of classes, label, Label"),
        ({"image": [IMAGES, IMAGES]}, "holds several images per row in its column image"),
        ({"image": IMAGES, "label": [0, -2]}, "holds labels from -2 to 0 in its column label"),
        ({"image": IMAGES, "label": [0, 10**9]}, "holds labels from 0 to 1000000000"),
    ],
)
def test_parquet_says_what_is_wrong_in_a_file(tmp_path, columns, said):
    with pytest.raises(ValueError, match=said):
        parquet.splits(columns_file(tmp_path, columns))


def test_parquet_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no .parquet files in .*: name their folder"):
        parquet.splits(tmp_path)
    hugging_face(tmp_path / "train-0.parquet", 0, [0], ["ant", "bee"])
    hugging_face(tmp_path / "train-1.parquet", 0, [0], ["ant", "cat"])
    with pytest.raises(ValueError, match="train-0.parquet and .*train-1.parquet name different"):
        parquet.splits(tmp_path)
    hugging_face(tmp_path / "train-1.parquet", 0, [2], ["ant", "bee"])
    with pytest.raises(ValueError, match="names 2 classes, but there is a label 2"):
        parquet.splits(tmp_path)
    content = (tmp_path / "train-0.parquet").read_bytes()
    for damaged in (b"", b"PAR1", content[:-100], b"x" * 2000, content[:-400] + content[-300:]):
        (tmp_path / "train-1.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="train-1.parquet is not a whole parquet file .*again"):
            parquet.splits(tmp_path)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        parquet.splits(tmp_path)


@pytest.mark.parametrize("kind", [b"\x04", b"\x00", b"\x0a"])
def test_parquet_survives_a_footer_that_ends_the_process_of_pyarrow(kind, tmp_path):
    """The bytes of the images have another type in a row group than in the schema: in Thrift \x0c, now a number's."""
    good = hugging_face(tmp_path / "a" / "train-0.parquet", 0, [1, 0], ["ant", "bee"])
    bad = hugging_face(tmp_path / "a" / "train-1.parquet", 0, [1, 0], ["ant", "bee"])
    content = bad.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.index(b"\x26\x00\x1c\x15\x0c", footer) + 4
    bad.write_bytes(content[:at] + kind + content[at + 1 :])
    with pytest.raises(ValueError, match=f"{bad} is not a whole parquet file .*: download it again"):
        parquet.splits(tmp_path / "a")
    bad.unlink()
    assert list(parquet.splits(good.parent)) == ["train"]
