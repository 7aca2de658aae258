"""Shards and Parquet files as other programs write them: names of splits, links in tars, Arrow types, no label."""

import io
import os
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet as pq
from test_builders_large import jpeg, listed, tar_bytes, write_tar

from beton_builders import parquet, webdataset
from beton_builders._shards import files_by_split, split_of
from fastssl.beton import LeftOut, Sample
from fastssl.beton.reading import read_image_bytes

IMAGES = [jpeg(f"{number}.jpg") for number in range(4)]


def train(builder, source):
    """Return the classes, and per sample its label and bytes; and what was left out."""
    classes, found = listed(builder, source)["train"]
    samples = [each for each in found if isinstance(each, Sample)]
    left_out = {each.reason: each.count for each in found if isinstance(each, LeftOut)}
    return classes, [(each.label, read_image_bytes(each.image)) for each in samples], left_out


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-000000.tar", "train"),
        ("imagenet1k-validation-07.tar", "val"),
        ("DEV_3.tar", "val"),
        ("testing1.tar", "test"),
        ("eval-00000-of-00001.parquet", "test"),
        ("train/crash-test-0.tar", "train"),
        ("val/part/crash-test-0.tar", "val"),
        ("imagenet-val/000.tar", "val"),
        ("contest-000.tar", None),
        ("shards/000.tar", None),
    ],
)
def test_the_name_of_a_shard_tells_its_split(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["train/val/0.tar", "train-test-0.tar", "imagenet-train/crash-test-0.tar"])
def test_a_name_with_words_for_two_splits_is_refused(name):
    with pytest.raises(ValueError, match="has words for the splits .*--splits none"):
        split_of(name)


def test_shards_with_and_without_a_split_in_their_names_are_refused(tmp_path):
    for name in ("train-0.tar", "extra.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="train-0.tar tells its split, and the name of extra.tar does not.*none"):
        files_by_split(tmp_path, (".tar",))
    assert [name for _, name in files_by_split(tmp_path, (".tar",), by_name=False)["train"]] == [
        "extra.tar",
        "train-0.tar",
    ]


def test_shards_behind_links_to_folders_are_found_once(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "disk" / "0.tar").write_bytes(b"")
    (tmp_path / "source" / "more").symlink_to("../disk")
    (tmp_path / "source" / "again").symlink_to("../disk")
    (tmp_path / "disk" / "loop").symlink_to("../source")
    assert [name for _, name in files_by_split(tmp_path / "source", (".tar",))["train"]] == ["again/0.tar"]
    os.mkfifo(tmp_path / "source" / "pipe.tar")
    with pytest.raises(ValueError, match="pipe.tar is a broken link or no regular file"):
        files_by_split(tmp_path / "source", (".tar",))


def add(archive, name, content=b"", kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(content)
    archive.addfile(member, io.BytesIO(content))


def test_links_in_a_shard_stand_for_the_files_to_which_they_lead(tmp_path):
    """To earlier and later members, over another link, from images and labels; a link to nothing is counted."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "./0.cls", kind=tarfile.LNKTYPE, target="2.cls")
        add(archive, "./0.jpg", IMAGES[0])
        add(archive, "./1.jpg", kind=tarfile.LNKTYPE, target="./0.jpg")
        add(archive, "./1.cls", kind=tarfile.SYMTYPE, target="0.cls")
        add(archive, "./2.cls", b"3")
        add(archive, "./2.jpg", kind=tarfile.SYMTYPE, target="a/../1.jpg")
        for name, target in (("3", "../out.jpg"), ("4", "/etc/passwd"), ("5", "5.jpg")):
            add(archive, f"{name}.jpg", kind=tarfile.SYMTYPE, target=target)
    classes, found, left_out = train(webdataset, tmp_path)
    assert found == [(3, IMAGES[0])] * 3 and classes == ["0", "1", "2", "3"]
    assert left_out == {"images in shards: a link to no file in the tar": 3}


def test_a_hard_link_leads_to_the_file_that_had_the_name_before_it(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.jpg", IMAGES[0])
        add(archive, "1.jpg", kind=tarfile.LNKTYPE, target="0.jpg")
        add(archive, "0.jpg", IMAGES[1])
    assert [image for _, image in train(webdataset, tmp_path)[1]] == [IMAGES[0], IMAGES[0], IMAGES[1]]


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    parts = [tar_bytes({f"{number}.jpg": IMAGES[number]}) for number in range(3)]
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    assert [image for _, image in train(webdataset, tmp_path)[1]] == IMAGES[:3]
    (tmp_path / "0.tar").write_bytes(parts[0] + b"what an old tar left there")
    assert len(train(webdataset, tmp_path)[1]) == 1


@pytest.mark.parametrize(
    "files, expected, left_out",
    [
        ({"0.png": 1, "0.jpg": 0, "0.cls": b"1"}, [(1, 0)], {webdataset.FURTHER: 1}),
        ({"0.v2.jpg": 0, "0.v2.cls": b"1"}, [(1, 0)], {}),
        ({"0.left.jpg": 0, "0.right.jpg": 1, "0.cls": b"2"}, [(2, 0), (2, 1)], {}),
        ({"a.1.cls": b"1", "a.2.cls": b"2", "a.2.jpg": 0, "a.1.jpg": 1}, [(2, 0), (1, 1)], {}),
        ({"0.mask.png": 1, "0.jpg": 0, "0.txt": b""}, [(-1, 0)], {webdataset.FURTHER: 1, webdataset.NOT_USED: 1}),
        ({"b.c/0.jpg": 0, "b.d/0.jpg": 1}, [(-1, 0), (-1, 1)], {}),
    ],
)
def test_names_with_further_dots_vanish_never(tmp_path, files, expected, left_out):
    contents = {name: content if isinstance(content, bytes) else IMAGES[content] for name, content in files.items()}
    write_tar(tmp_path / "0.tar", contents)
    _, found, counted = train(webdataset, tmp_path)
    assert found == [(label, IMAGES[image]) for label, image in expected] and counted == left_out


@pytest.mark.parametrize("name, content", [("cls", text) for text in (b"-1", b"", b" None\n", b"nan", b"N/A")] + [
    ("json", text) for text in (b"{}", b'{"label": null}', b'{"cls": -1}', b'{"label": NaN}', b'{"label": "none"}')
])  # fmt: skip
def test_shards_store_no_label_as_minus_one(tmp_path, name, content):
    write_tar(tmp_path / "0.tar", {"0.jpg": IMAGES[0], f"0.{name}": content, "1.jpg": IMAGES[1], "1.cls": b"1.0"})
    classes, found, _ = train(webdataset, tmp_path)
    assert [label for label, _ in found] == [-1, 1] and classes == ["0", "1"]


def test_a_sample_that_comes_again_is_a_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(2):
            add(archive, "0.cls", str(number).encode())
            add(archive, "0.jpg", IMAGES[number])
    assert train(webdataset, tmp_path)[1] == [(0, IMAGES[0]), (1, IMAGES[1])]


def struct(images, kind):
    paths = pyarrow.array([None] * len(images), pyarrow.string())
    return pyarrow.StructArray.from_arrays([pyarrow.array(images, kind), paths], ["bytes", "path"])


SAME_LENGTH = [image.ljust(2000, b"\0") for image in IMAGES]


@pytest.mark.parametrize(
    "column, images",
    [
        (pyarrow.array(IMAGES, pyarrow.binary_view()), IMAGES),
        (pyarrow.array(IMAGES, pyarrow.large_binary()), IMAGES),
        (pyarrow.array(SAME_LENGTH, pyarrow.binary(2000)), SAME_LENGTH),
        (pyarrow.array(IMAGES).dictionary_encode(), IMAGES),
        (struct(IMAGES, pyarrow.binary_view()), IMAGES),
        (struct(IMAGES, pyarrow.large_binary()), IMAGES),
        (pyarrow.array([[each] for each in IMAGES]), IMAGES),
        (pyarrow.array([[each] for each in IMAGES], pyarrow.large_list(pyarrow.binary())), IMAGES),
        (pyarrow.array([[{"bytes": each}] for each in IMAGES]), IMAGES),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_parquet_reads_every_type_of_bytes(tmp_path, column, images):
    pq.write_table(pyarrow.table({"image": column}), tmp_path / "a.parquet", row_group_size=4)
    assert [image for _, image in train(parquet, tmp_path)[1]] == images


@pytest.mark.parametrize(
    "column, classes, labels",
    [
        (pyarrow.array(["dog", "cat", None, "none"]), ["cat", "dog"], [1, 0, -1, -1]),
        (pyarrow.array(["dog", "cat", None, ""]).dictionary_encode(), ["cat", "dog"], [1, 0, -1, -1]),
        (pyarrow.array(["10", "9", "9", "-1"], pyarrow.large_string()), ["9", "10"], [1, 0, 0, -1]),
        (pyarrow.array(["b", "a", None, "a"], pyarrow.string_view()), ["a", "b"], [1, 0, -1, 0]),
        (pyarrow.array([True, None, True, True]), ["False", "True"], [1, -1, 1, 1]),
        (pyarrow.array([0.0, 2.0, float("nan"), None]), ["0", "1", "2"], [0, 2, -1, -1]),
        (pyarrow.array([1, None, -1, 0], pyarrow.int8()), ["0", "1"], [1, -1, -1, 0]),
        (pyarrow.nulls(4), [], [-1] * 4),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_parquet_reads_every_type_of_label(tmp_path, column, classes, labels):
    pq.write_table(pyarrow.table({"image": IMAGES, "label": column}), tmp_path / "a.parquet")
    found, samples, _ = train(parquet, tmp_path)
    assert found == classes and [label for label, _ in samples] == labels


def test_parquet_numbers_text_over_all_files(tmp_path):
    for name, texts in (("train-0", ["b", "c"]), ("train-1", ["c", "a"]), ("test", [None, "none"])):
        pq.write_table(
            pyarrow.table({"image": IMAGES[:2], "label": pyarrow.array(texts, "string")}), tmp_path / f"{name}.parquet"
        )
    found = listed(parquet, tmp_path)
    assert found["train"][0] == ["a", "b", "c"] and found["test"][0] == []
    assert [each.label for each in found["train"][1]] == [1, 2, 2, 0]
    pq.write_table(pyarrow.table({"image": IMAGES[:2], "label": [0, 1]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="train-0.parquet holds the labels as text, and .*train-1.parquet as numbers"):
        parquet.splits(tmp_path)


def of_paths(paths, images):
    arrays = [pyarrow.array(images, pyarrow.binary()), pyarrow.array(paths)]
    return pyarrow.table({"image": pyarrow.StructArray.from_arrays(arrays, ["bytes", "path"])})


def test_parquet_reads_images_from_paths_within_source(tmp_path):
    """Relative to the file or to SOURCE; in rows without bytes, all of them or some."""
    for folder in ("data/pics", "pics"):
        (tmp_path / folder).mkdir(parents=True)
    for number, folder in enumerate(("data/pics", "pics", "pics")):
        (tmp_path / folder / f"{number}.jpg").write_bytes(IMAGES[number])
    paths = ["pics/0.jpg", "pics/1.jpg", "../pics/2.jpg"]
    for last in (None, IMAGES[2]):
        pq.write_table(of_paths(paths, [None, None, last]), tmp_path / "data" / "a.parquet")
        assert [image for _, image in train(parquet, tmp_path)[1]] == IMAGES[:3]


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "a/../../../x.jpg"])
def test_parquet_reads_no_image_outside_of_source(tmp_path, path):
    (tmp_path / "source").mkdir()
    pq.write_table(of_paths([path, path], [None, IMAGES[0]]), tmp_path / "source" / "a.parquet")
    (_, samples) = listed(parquet, tmp_path / "source")["train"]
    with pytest.raises(ValueError, match="names the image .*, which is not within"):
        read_image_bytes(samples[0].image)
    pq.write_table(of_paths([path], [None]), tmp_path / "source" / "a.parquet")
    with pytest.raises(ValueError, match="names the image .*, which is not within"):
        listed(parquet, tmp_path / "source")


def test_large_groups_are_read_in_any_order_with_little_memory(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    images = [rng.bytes(1000) for _ in range(100)]
    pq.write_table(pyarrow.table({"image": images}), tmp_path / "a.parquet", row_group_size=60)
    monkeypatch.setattr(parquet, "CACHED", 30_000)
    _, samples = listed(parquet, tmp_path)["train"]
    assert "row groups of up to 0 MB" in capsys.readouterr().err
    for number in (*range(100), *rng.permutation(100)):
        assert samples[number].image() == images[number]
        assert sum(reader.size for reader in parquet._readers.values()) <= 30_000
    assert samples[0].image.path == str(tmp_path / "a.parquet")
