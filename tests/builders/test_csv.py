"""CSV lists as people and programs write them: names of columns, separators, encodings, spaces, no label."""

import os

import pytest
from test_builders_large import listed, names, write
from test_builders_large_containers import table

from beton_builders import csv
from beton_builders._files import number_classes
from fastssl.beton import build_beton, read_labels

WANTED = (["a", "b"], [("img/0.jpg", 0), ("img/1.jpg", 1)])


def read(root, text):
    found = listed(csv, table(root, text))
    assert list(found) == ["train"]
    classes, samples = found["train"]
    return classes, names(samples)


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\nimg/0.jpg,a\nimg/1.jpg,b\n",
        "Image,Label\nimg/0.jpg,a\nimg/1.jpg,b\n",
        "LABEL,FileName\na,img/0.jpg\nb,img/1.jpg\n",
        "image,path,label\n0,img/0.jpg,a\n1,img/1.jpg,b\n",  # path before all others
        " path , label , split \n img/0.jpg , a , train \nimg/1.jpg ,b, Training\n",
        'path, label\n"img/0.jpg", "a"\nimg/1.jpg,  "b"\n',
        "path;label\nimg/0.jpg;a\nimg/1.jpg;b\n",
        "path\tlabel\timg,x\nimg/0.jpg\ta\t\nimg/1.jpg\tb\t\n",
        "path,label\rimg/0.jpg,a\rimg/1.jpg,b\r",
        "path,label\nimg/0.jpg,a\nimg/1.jpg,b\n".encode("utf-16"),
        "\ufeffpath;label\r\nimg/0.jpg;a\r\nimg/1.jpg;b\r\n".encode("utf-16-be"),
        b"\xef\xbb\xbfpath,label\nimg/0.jpg,a\nimg/1.jpg,b",
        "path,label\nimg\\0.jpg,a\n.\\img\\..\\img\\1.jpg,b\n",
    ],
)
def test_csv_reads_the_same_list(tmp_path, text):
    write(tmp_path, "img/0.jpg", "img/1.jpg")
    classes, found = read(tmp_path, text)
    assert (classes, [(os.path.normpath(name), label) for name, label in found]) == WANTED


def test_csv_takes_the_file_whose_name_is_written(tmp_path):
    """Spaces and backslashes belong to the path if there is such a file, and stay if there is none at all."""
    write(tmp_path, " a.jpg", "a.jpg", "b.jpg", "c\\d.jpg", "c/d.jpg", "e/f.jpg")
    text = "path\n a.jpg\na.jpg\n b.jpg\nc\\d.jpg\ne\\f.jpg\ng\\h.jpg\n i.jpg\n"
    expected = [" a.jpg", "a.jpg", "b.jpg", "c\\d.jpg", "e/f.jpg", "g\\h.jpg", "i.jpg"]
    assert [name for name, _ in read(tmp_path, text)[1]] == expected


@pytest.mark.parametrize("word", ["", " ", "-1", "-1.0", "None", "NaN", "null", "NA", "n/a", "<NA>", '"none"'])
def test_csv_stores_no_label_as_minus_one(tmp_path, word):
    """Next to labelled images, and in a split without any."""
    text = f"path,label,split\na,cat,train\nb,{word},train\nc,{word},test\n"
    found = listed(csv, table(tmp_path, text))
    assert found["train"][0] == ["cat"] and names(found["train"][1]) == [("a", 0), ("b", -1)]
    assert found["test"][0] == [] and names(found["test"][1]) == [("c", -1)]


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["10.0", "1.0", "2.0", "2"], ["1", "2", "10"]),  # pandas writes whole numbers so next to an empty cell
        (["10", "9", "nan"], ["9", "10"]),
        (["1.5", "-3", "1.0", "10"], ["-3", "1", "1.5", "10"]),
        (["007", "7"], ["007", "7"]),
        (["1.0", "2.0", "beta"], ["1.0", "2.0", "beta"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["9" * 18, "9" * 17], ["9" * 17, "9" * 18]),
        (["none", "-1"], []),
    ],
)
def test_numbers_are_classes_in_the_order_of_their_values(labels, classes):
    names, numbers = number_classes(labels)
    assert names == classes and set(numbers) == set(labels)
    assert sorted(set(numbers.values()) - {-1}) == list(range(len(classes)))


def test_csv_maps_words_for_splits_and_keeps_others(tmp_path):
    text = "path,split\na,Train\nb,valid\nc,validation\nd,DEV\ne,Evaluation\nf,query\ng,training\n"
    found = {split: [name for name, _ in names(samples)] for split, (_, samples) in csv_splits(tmp_path, text).items()}
    assert found == {"train": ["a", "g"], "val": ["b", "c", "d"], "test": ["e"], "query": ["f"]}


def csv_splits(root, text):
    return listed(csv, table(root, text))


def test_csv_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ValueError, match="pipe.csv is no regular file: write the list to a file"):
        csv.splits(tmp_path / "pipe.csv")


def test_csv_with_and_without_labels_is_built(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    source = table(tmp_path, "path,label\na.jpg,x\nb.jpg,\nc.jpg,y\n")
    (report,) = build_beton("csv", source, tmp_path / "out", canvas=8, workers=1, order="source").splits
    assert read_labels(report.path).tolist() == [0, -1, 1] and report.unlabelled == 1
