"""Files from elsewhere: pipes, devices and links in the place of files, impossible numbers, forms and sizes."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from rich.console import Console
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import build_beton, draw_sheet, inspect_beton, jpeg, read_header, read_index_list, read_names, verify
from fastssl.beton.format import ARRAY_FIELD, FIELD, HEADER, OUR_ARRAY_FIELDS, OUR_FIELDS, metadata_type
from fastssl.beton.images import StoragePlan, encode_all
from fastssl.beton.options import BuildOptions
from fastssl.beton.partial_build import FILES
from fastssl.beton.source import list_splits
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader
from fastssl.recipe import ViewsConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROOT = Path(__file__).parents[2]
JPEG = jpeg_bytes(photo(0, 24, 20))
PLAN = StoragePlan("canvas", 16, 90)
HUGE = 200 << 30  # bytes of a file that is nothing but a hole


def make_special(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))  # a socket's path may have 107 bytes
    elif kind == "device":
        os.symlink("/dev/zero", path)
    elif kind == "link":
        victim = path.parent.parent / "victim"
        victim.write_text("of the user")
        path.symlink_to(victim)
    elif kind == "hard link":
        victim = path.parent.parent / "victim"
        victim.write_text("of the user")
        os.link(victim, path)
    elif kind == "hole":
        with open(path, "wb") as file:
            file.truncate(HUGE)


@pytest.fixture(autouse=True)
def no_hang(monkeypatch, tmp_path):
    """A test that waits for a pipe ends after a minute. Paths of sockets are relative to the folder of the test."""
    import faulthandler

    monkeypatch.chdir(tmp_path)
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """raw/, bc4/ and full/ with a train.beton of 6 photographs in 2 classes each."""
    root = tmp_path_factory.mktemp("untrusted")
    for number in range(6):
        folder = root / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg_bytes(photo(number, 40 + number, 30)))
    build_beton("imagefolder", root / "photos", root / "raw", workers=1, canvas=16)
    build_beton("imagefolder", root / "photos", root / "bc4", workers=1, canvas=16, codec="bc4")
    build_beton("imagefolder", root / "photos", root / "full", workers=1, max_side=64)
    return root


@pytest.fixture
def copied(folders, tmp_path):
    def copy(name: str = "raw") -> Path:
        shutil.copytree(folders / name, tmp_path / name)
        return tmp_path / name / "train.beton"

    return copy


# --- in the place of files that a build writes --------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link", "hard link"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_written_through_what_lies_in_a_partial_build(name, kind, folders, tmp_path):
    make_special(tmp_path / "out" / "train.beton.part" / name, kind)
    with pytest.raises(UserError, match=rf"train.beton.part/{name} is a .*so nothing is written to it"):
        build_beton("imagefolder", folders / "photos", tmp_path / "out", workers=1, canvas=16)
    victim = tmp_path / "out" / "victim"
    assert "link" not in kind or victim.read_text() == "of the user"


def test_a_partial_build_in_a_linked_folder_is_not_resumed(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.beton.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train.beton.part is a symbolic link"):
        build_beton("imagefolder", folders / "photos", tmp_path / "out", workers=1, canvas=16)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_build_that_was_killed_between_two_renames_does_not_take_a_link(folders, tmp_path):
    part = tmp_path / "out" / "train.beton.part"
    make_special(part.with_name("train.beton"), "link")
    part.mkdir()
    (part / "manifest.json").write_text("{}")
    build_beton("imagefolder", folders / "photos", tmp_path / "out", workers=1, canvas=16)
    assert (tmp_path / "victim").read_text() == "of the user"
    assert not part.with_name("train.beton").is_symlink()


def test_what_is_not_ours_stays_in_the_folder_of_a_partial_build(folders, tmp_path):
    part = tmp_path / "out" / "train.beton.part"
    part.mkdir(parents=True)
    (part / "notes.txt").write_text("of the user")
    build_beton("imagefolder", folders / "photos", tmp_path / "out", workers=1, canvas=16)
    assert [path.name for path in part.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"split": "val", "name": "a", "index": 1, "reason": "x"}\n', 1),
        ('{"split": "val", "name": "\\ud800", "index": 1, "reason": "x"}\n', 1),
        ('{"split": 3, "name": "a", "index": "x", "reason": []}\n', 0),
        ("[" * 100_000 + "\n", 0),
        ('{"split": "val", "index": ' + "9" * 5000 + "}\n", 0),
        ("[1, 2]\n", 0),
        ("\x00\n", 0),
    ],
)
def test_a_list_of_bad_images_of_any_form_is_replaced(content, kept, folders, tmp_path):
    """Lines about other splits are kept if a build may have written them."""
    source = tmp_path / "photos"
    shutil.copytree(folders / "photos", source)
    (source / "class0" / "bad.jpg").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bad_images.jsonl").write_text(content)
    build_beton("imagefolder", source, tmp_path / "out", workers=1, canvas=16)
    lines = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
    assert len(lines) == kept + 1
    assert json.loads(lines[-1])["name"] == "class0/bad.jpg"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_list_of_bad_images_that_is_none_is_named(kind, folders, tmp_path):
    make_special(tmp_path / "out" / "bad_images.jsonl", kind)
    source = tmp_path / "photos"
    shutil.copytree(folders / "photos", source)
    (source / "class0" / "bad.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="bad_images.jsonl is a .*so nothing is written to it"):
        build_beton("imagefolder", source, tmp_path / "out", workers=1, canvas=16)


# --- in the place of files that are read --------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "hole"])
def test_a_beton_and_what_lies_next_to_it_are_regular_files_of_some_size(kind, copied, tmp_path):
    path = copied()
    listed = tmp_path / "list.txt"
    listed.write_text("class1/1.jpg\n")
    uses = {
        "train.beton.json": lambda: read_header(path),
        "train.beton.names.txt": lambda: read_names(path, [0]),
        "train.beton.names.txt ": lambda: verify(path, workers=1),
        "list.txt": lambda: read_index_list(path, listed),
    }
    if kind != "hole":  # a .beton is mapped, not read
        uses["train.beton"] = lambda: read_header(path)
    for name, use in uses.items():
        file = listed if name == "list.txt" else path.with_name(name.strip())
        kept = file.read_bytes()
        make_special(file, kind)
        with pytest.raises(UserError, match=str(file)):
            use()
        file.unlink()
        file.write_bytes(kept)
        use()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "hole"])
@pytest.mark.parametrize(
    ("builder", "name", "others"),
    [
        ("csv", "list.csv", ()),
        ("webdataset", "a.tar", ()),
        ("webdataset", "s/classes.txt", ("s/a.tar",)),
        ("parquet", "a.parquet", ()),
        ("parquet", "s/a.parquet", ()),
        ("svhn", "s/train_32x32.mat", ("s/test_32x32.mat",)),
        ("mnist", "s/train-images-idx3-ubyte", ("s/train-labels-idx1-ubyte",)),
        ("mnist", "s/train-images-idx3-ubyte.gz", ("s/train-labels-idx1-ubyte",)),
        ("cifar10", "s/cifar-10-python.tar.gz", ()),
        ("cifar10", "s/cifar-10-batches-py/data_batch_1", ()),
        ("imagenet", "s/ILSVRC2012_img_train.tar", ()),
        ("imagenet", "s/LOC_val_solution.csv", ("s/val/a.JPEG",)),
        ("imagenet", "s/ILSVRC2012_devkit_t12.tar.gz", ("s/val/a.JPEG",)),
        ("sun397", "s/ClassName.txt", ("s/a/abbey/x.jpg",)),
        ("places365", "s/categories_places365.txt", ("s/places365_val.txt", "s/val_256/a.jpg")),
        ("inaturalist", "s/train2018.json", ("s/train_val2018/a.jpg",)),
        ("stl10", "s/train_X.bin", ("s/class_names.txt",)),
    ],
)
def test_sources_are_regular_files_of_some_size(builder, name, others, kind, tmp_path):
    make_special(tmp_path / name, kind)
    for other in others:
        path = tmp_path / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shard(JPEG) if path.suffix == ".tar" else b"x")
    source = tmp_path / name.split("/")[0]
    with pytest.raises(UserError, match=str(source)) as raised:
        list_splits(builder, source)
    assert "\n" not in str(raised.value)


def shard(*images: bytes) -> bytes:
    """A tar of images and labels."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, image in enumerate(images):
            for name, data in ((f"{number}.jpg", image), (f"{number}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "hole"])
def test_entries_of_a_list_that_are_no_images_are_bad(kind, tmp_path):
    make_special(tmp_path / "x.jpg", kind)
    result = encode_all([str(tmp_path / "x.jpg")], PLAN)[0]
    reason = "has 214.7 GB, more than the 1 GiB that an image file may have" if kind == "hole" else "not a regular file"
    assert result == f"ValueError: {reason}"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "hole"])
def test_a_list_of_images_to_embed_is_a_regular_file_with_lines(kind, tmp_path):
    from fastssl.evaluation.embed.images import list_images

    make_special(tmp_path / "list", kind)
    with pytest.raises(UserError, match=f"{tmp_path / 'list'} is .*(name a folder, a list|name one)"):
        list_images(tmp_path / "list")
    make_special(tmp_path / "photo.jpg", kind)
    (sample,) = list_images(tmp_path / "photo.jpg").samples
    assert isinstance(encode_all([sample.image], PLAN)[0], str)


def test_a_link_to_itself_is_a_bad_image_and_no_source(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "good.jpg").write_bytes(JPEG)
    os.symlink("loop.jpg", tmp_path / "photos" / "loop.jpg")
    report = build_beton("imagefolder", tmp_path / "photos", tmp_path / "out", workers=1, canvas=16).splits[0]
    assert (report.samples, report.bad) == (1, 1)
    with pytest.raises(UserError, match="loop.jpg does not exist"):
        build_beton("csv", tmp_path / "photos" / "loop.jpg", tmp_path / "out")


# --- sizes --------------------------------------------------------------------------------------


def write_holes(path: Path, kind: bytes, name: str) -> None:
    """A tar with a member, or a header of a kind, of HUGE bytes that are holes."""
    good = shard(JPEG).rstrip(b"\0")
    good += bytes(-len(good) % 512)
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, HUGE
    with open(path, "wb") as file:
        file.write(good + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(len(good) + 512 + HUGE + 10240)


def test_a_huge_member_of_a_tar_is_a_bad_image(tmp_path):
    write_holes(tmp_path / "a.tar", tarfile.REGTYPE, "9.jpg")
    samples = list_splits("webdataset", tmp_path / "a.tar", "source")[0].samples
    results = encode_all([sample.image for sample in samples], PLAN)
    assert not isinstance(results[0], str)
    assert results[1:] == ["ValueError: has 214.7 GB, more than the 1 GiB that an image file may have"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_huge_header_of_a_tar_is_not_read(kind, tmp_path):
    write_holes(tmp_path / "a.tar", kind, "x")
    with pytest.raises(UserError, match="a.tar is not a whole, uncompressed tar .a header of 214,748,364,800 bytes"):
        list_splits("webdataset", tmp_path / "a.tar")


def test_a_function_that_returns_too_much_is_a_bad_image(monkeypatch):
    monkeypatch.setattr("fastssl.beton.reading.LARGEST_FILE", len(JPEG))
    assert not isinstance(encode_all([lambda: JPEG], PLAN)[0], str)
    for source in (lambda: JPEG + b"\0", JPEG + b"\0"):
        assert "more than the" in encode_all([source], PLAN)[0]


def test_a_large_cell_of_a_parquet_file_is_a_bad_image(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    import beton_builders.parquet

    monkeypatch.setattr(beton_builders.parquet, "LARGEST_IMAGE", 100_000)
    table = pyarrow.table({"image": pyarrow.array([JPEG, bytes(200_000), JPEG], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    samples = list_splits("parquet", tmp_path / "a.parquet", "source")[0].samples
    results = encode_all([sample.image for sample in samples], PLAN)
    assert [isinstance(result, str) for result in results] == [False, True, False]
    assert "more than an image file may have" in results[1]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, metadata: bytes = b"") -> bytes:
    pixels = zlib.compress(bytes((3 * width + 1) * height)) if width * height < 1e6 else b""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + metadata + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def with_size(image_format: str, position: int, packed: bytes) -> bytes:
    content = io.BytesIO()
    photo(0, 16, 16).save(content, image_format)
    data = bytearray(content.getvalue())
    if image_format == "JPEG2000":
        position += data.find(b"ihdr")
    if image_format == "JPEG":
        position += data.find(b"\xff\xc0")
    data[position : position + len(packed)] = packed
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        png(65535, 65535),
        png(2**31 - 1, 1),
        with_size("GIF", 6, struct.pack("<HH", 65535, 65535)),
        with_size("JPEG", 5, struct.pack(">HH", 65500, 65500)),
        with_size("JPEG2000", 4, struct.pack(">II", 65535, 65535)),
        with_size("BMP", 18, struct.pack("<II", 65535, 65535)),
    ],
    ids=["png", "png line", "gif", "jpeg", "jpeg 2000", "bmp"],
)
def test_an_image_that_claims_to_be_huge_is_bad(content):
    for plan in (PLAN, StoragePlan("canvas", 256, 90), StoragePlan("full", 500, 90)):
        assert "has more than 179 megapixels" in encode_all([content], plan)[0]


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_metadata_that_unpacks_to_gigabytes_is_not_unpacked(kind):
    bomb = zlib.compressobj(9)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(200)) + bomb.flush()
    prefix = b"x\0\1\0\0\0" if kind == b"iTXt" else b"x\0\0"
    before = peak_memory()
    result = encode_all([png(16, 16, png_chunk(kind, prefix + packed))], PLAN)[0]
    assert not isinstance(result, str)
    assert peak_memory() - before < 100 << 20


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize(("canvas", "megapixels"), [(65500, 179), (13380, 179), (32, 0)])
def test_a_canvas_is_no_larger_than_an_image_may_be(canvas, megapixels):
    if not megapixels:
        assert BuildOptions(canvas=1000, max_megapixels=1).plan(32).side == 1000
        return
    with pytest.raises(UserError, match="more than --max-megapixels 179: use --canvas 13379 or less"):
        BuildOptions(canvas=canvas, max_megapixels=megapixels).plan(32)


def test_reasons_are_short():
    hostile = b"\x93NUMPY\x01\x00" + struct.pack("<H", 7000) + b"{'shape': " + b"(" * 6990
    (reason,) = encode_all([hostile], StoragePlan("canvas", 16, 90, channels=4))
    assert len(reason) <= 300


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 100000, 100000)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4, 0, 5)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4, -1, 5)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4, 10000000000000000000000, 5)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4, True, 8)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4, 1, 1)}",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (4, 1, 1)}",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (4, 1, 1)}",
        "__import__('os').abort()",
        "{'shape': " + "(" * 3000,
    ],
)
def test_hostile_arrays_are_bad(header):
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(32)
    (reason,) = encode_all([content], StoragePlan("canvas", 16, 90, channels=4))
    assert isinstance(reason, str)


# --- numbers and forms --------------------------------------------------------------------------


def change_column(path: Path, name: str, values) -> None:
    """Write a column of the metadata, which is between field descriptors and images."""
    kind = metadata_type(OUR_FIELDS)
    count = read_header(path).num_samples
    table = np.memmap(path, kind, "r+", HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize, count)
    table[name] = values
    table.flush()


@pytest.mark.parametrize("way", ["open", "verify", "load"])
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("height", [5, 5, 0, 5, 5, 0], "the source of its sample 2 cannot have a height of 0 px"),
        ("width", -1, "the source of its sample 0 cannot have a width of -1 px"),
        ("width", [1, 2**31, 1, 1, 1, 1], "sample 1 cannot have a width of 2147483648 px"),
        ("height", -(2**63), "cannot have a height of -9223372036854775808 px"),
        ("index", [3, 1, 2, -7, 4, 5], "its sample 3 has the negative index -7"),
        ("index", [3, 1, 2, 9, 1, 5], "its samples 1 and 4 have the same index 1"),
        ("label", [0, 1, 0, 0, 2, 0], "its sample 4 has the label 2, and train.beton.json names 2 classes"),
        ("label", 2**63 - 1, "its sample 0 has the label 9223372036854775807"),
    ],
)
def test_impossible_numbers_of_a_sample_are_named(column, values, message, way, copied):
    path = copied("full")
    change_column(path, column, values)
    use = {
        "open": read_header,
        "verify": lambda path: verify(path, workers=1),
        "load": lambda path: BetonLoader(path, 2, crop="eval", views=ViewsConfig(size=32)),
    }[way]
    with pytest.raises(UserError, match=message) as raised:
        use(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("height", [0, 2**64 - 5])
def test_sizes_that_are_no_integers_of_ffcv_are_not_read(height, copied):
    """Fields of other types are not checked: crop boxes are computed from the stored size instead."""
    path = copied("bc4")
    want = next(iter(BetonLoader(path, 6, crop="cpu", shuffle=False, views=ViewsConfig(size=32)))).image
    fields = np.memmap(path, FIELD, "r+", HEADER.itemsize, len(OUR_FIELDS))
    for name in ("height", "width"):
        fields["type_id"][list(OUR_FIELDS).index(name)] = ARRAY_FIELD
    fields.flush()
    offset = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
    table = np.memmap(path, metadata_type(OUR_ARRAY_FIELDS), "r+", offset, 6)
    table["height"] = np.uint64(height).astype(np.int64)
    table.flush()
    batch = next(iter(BetonLoader(path, 6, crop="cpu", shuffle=False, views=ViewsConfig(size=32))))
    assert (batch.height == read_header(path).resolution[0]).all() and batch.image.shape == want.shape


def test_extreme_numbers_that_are_possible_are_read(copied):
    """A source of 2^31 - 1 px, indices far apart, and negative labels, which are none."""
    path = copied("full")
    change_column(path, "height", 2**31 - 1)
    change_column(path, "index", [0, 2**63 - 1, 2**40, 5, 6, 7])
    change_column(path, "label", -100)
    for crop in ("cpu", "eval"):
        loader = BetonLoader(path, 2, crop=crop, views=ViewsConfig(size=32), drop_last=False)
        assert sum(len(batch.index) for batch in loader) == 6
    Console(file=io.StringIO()).print(inspect_beton(path))
    draw_sheet(path, path.with_name("sheet.png"))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(classes=[["a"], 3]),
        lambda manifest: manifest.update(samples="6"),
        lambda manifest: manifest.update(samples=6.0),
        lambda manifest: manifest.update(counts=[]),
        lambda manifest: manifest.update(counts={"bad": -1}),
        lambda manifest: manifest.update(counts={"bad": 1e400}),
        lambda manifest: manifest.update(source_formats={"JPEG": "many"}),
        lambda manifest: manifest.update(order={"a": {}}),
        lambda manifest: manifest.update(layout="cubes"),
        lambda manifest: manifest.update(checksums="none"),
        lambda manifest: manifest.update(nearly_black=[]),
        lambda manifest: manifest.update(canvas="16"),
        lambda manifest: manifest.pop("classes"),
        lambda manifest: "text",
        lambda manifest: "[" * 100_000,
        lambda manifest: '{"x":' * 100_000,
        lambda manifest: "9" * 5000,
        lambda manifest: '{"samples": ' + "9" * 5000 + "}",
        lambda manifest: "",
        lambda manifest: "null",
        lambda manifest: b"\xff\xfe",
    ],
)
def test_a_manifest_of_any_form_is_refused_or_read(change, copied):
    path = copied()
    file = path.with_name("train.beton.json")
    manifest = json.loads(file.read_text())
    changed = change(manifest)
    content = changed if isinstance(changed, str | bytes) else json.dumps(manifest)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for use in (read_header, inspect_beton, lambda path: verify(path, workers=1), lambda path: BetonLoader(path, 2)):
        with pytest.raises(UserError, match=f"{file} is damaged .*: delete it") as raised:
            use(path)
        assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)


def test_a_manifest_of_another_form_is_built_again(copied, folders):
    path = copied()
    path.with_name("train.beton.json").write_text('{"samples": []}')
    report = build_beton("imagefolder", folders / "photos", path.parent, workers=1, canvas=16).splits[0]
    assert not report.up_to_date and read_header(path).manifest["samples"] == 6


def test_batches_that_no_memory_holds_are_refused(copied):
    path = copied()
    with pytest.raises(UserError, match=r"Batches of 1000000000 images of .* px, take .* lower train.batch_size"):
        BetonLoader(path, 10**9, drop_last=False)


def test_a_jpeg_header_without_a_size_is_refused():
    for content in (b"\xff\xd8\xff\xe0", JPEG[:4], JPEG[:30], b"", b"x"):
        with pytest.raises(ValueError):
            jpeg.read_size(content)


@pytest.mark.parametrize("kind", ["raw", "bc4", "full"])
def test_changed_tables_are_refused_or_read(kind, folders, copied, monkeypatch):
    """A hundred of the mutations of benchmarks/fuzz_commands.py, in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from fuzz_inputs import mutate_beton

    path = copied(kind)
    content = path.read_bytes()
    refused = 0
    for seed in range(100):
        path.write_bytes(mutate_beton(Random(seed), content))
        try:
            Console(file=io.StringIO()).print(inspect_beton(path))
            draw_sheet(path, path.with_name("sheet.png"))
            loader = BetonLoader(
                path, 2, crop="eval", views=ViewsConfig(size=32), workers=1, drop_last=False, on_bad_sample="skip"
            )
            assert sum(len(batch.index) for batch in loader) == 6
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 20 < refused < 100


# --- names --------------------------------------------------------------------------------------

HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J"


def test_hostile_names_are_escaped_on_the_screen(tmp_path):
    """Of classes, images and files, in what build-beton and inspect print, and on the sheet."""
    for name in (HOSTILE, "plain"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        (folder / f"{HOSTILE}.jpg").write_bytes(JPEG)
        (folder / f"{HOSTILE}bad.jpg").write_bytes(b"x")
    (tmp_path / "photos" / f"{HOSTILE}empty").mkdir()
    (tmp_path / "list.txt").write_text(f"{HOSTILE}\n")
    out = tmp_path / f"out{HOSTILE}"
    build = ["build-beton", "imagefolder", "--source", tmp_path / "photos", "--workers", "1"]
    commands = [
        [*build, "--out", out, "--canvas", "16"],
        [*build, "--out", out, "--dry-run"],
        [*build, "--out", tmp_path / "strict", "--strict"],
        ["inspect", out / "train.beton", "--verify", "--workers", "1", "--sheet", tmp_path / "sheet.png"],
        ["inspect", out / "train.beton", "--subset", tmp_path / "list.txt"],
    ]
    for command in commands:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "fastssl", *command], capture_output=True, env=environment)
        printed = (done.stdout + done.stderr).decode()
        assert "Traceback" not in printed
        assert not [c for c in printed if not c.isprintable() and c != "\n"], printed
    assert (tmp_path / "sheet.png").stat().st_size > 0
