"""The list of a source's images that processes share, each of which builds a shard."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from fastssl.beton import BuildOptions, beton_file, build_beton, listing, read_header, shared_list
from fastssl.beton.manifest import read_checked
from fastssl.beton.shared_list import list_folder, read_or_make_list
from fastssl.beton.source import load_builder
from fastssl.common.errors import UserError
from fastssl.common.files import try_lock


@pytest.fixture
def source(tmp_path):
    """Twelve images in two classes, one of which has a name that is not UTF-8."""
    root = tmp_path / "source"
    for number in range(12):
        path = root / "train" / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
    os.rename(root / "train/class0/04.png", os.fsencode(root / "train/class0") + b"/\xff4.png")
    return root


@pytest.fixture
def listings(monkeypatch):
    """How often this process has listed a source."""
    calls, list_splits = [], listing.list_splits

    def counted(*arguments):
        calls.append(arguments)
        return list_splits(*arguments)

    monkeypatch.setattr(listing, "list_splits", counted)
    return calls


def build(source, out, shard=None, builder="imagefolder", **options):
    options = {"canvas": 8, "shards": 3, "workers": 1, **options}
    return build_beton(builder, source, out, shard=shard, **options)


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def photos_in_a_tar(source: Path, folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number, path in enumerate(sorted((source / "train").rglob("*.png"))):
            tar.add(path, f"{number:02}.png")
    return folder


def photos_in_parquet(source: Path, folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted((source / "train").rglob("*.png"))]
    table = pyarrow.table({"image": images, "label": [number % 2 for number in range(len(images))]})
    parquet.write_table(table, folder / "train-0.parquet", row_group_size=5)
    return folder


@pytest.mark.parametrize(
    "builder, make",
    [
        ("imagefolder", lambda source, folder: source),
        ("webdataset", photos_in_a_tar),
        ("parquet", photos_in_parquet),
    ],
)
def test_a_source_is_listed_once_for_all_shards(builder, make, source, tmp_path, listings, capsys):
    images = make(source, tmp_path / "images")
    build(images, tmp_path / "together", builder=builder)
    assert len(listings) == 1
    listings.clear()
    for shard in (1, 0, 2):
        account = build(images, tmp_path / "apart", shard, builder).account
        assert "Of 12 images: 4 stored, 8 in other shards." in account
        assert account.startswith(f"Of {12 if builder == 'imagefolder' else 1} file")
        said = "Uses the list of 12 images in" in capsys.readouterr().err
        assert said == (shard != 1)
    assert len(listings) == 1
    assert content(tmp_path / "apart") == content(tmp_path / "together")
    name = "list-of-00003/train.jsonl"
    assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "apart" / name).read_text()
    assert all(split.up_to_date for split in build(images, tmp_path / "apart", 1, builder).splits)


def test_images_in_memory_are_listed_by_every_process(tmp_path, listings):
    for shard in range(3):
        build(None, tmp_path / "apart", shard, "mnist5k", canvas=32, limit=30)
    assert len(listings) == 3
    assert list_folder(tmp_path / "apart", 3).exists()
    assert sorted(file.name for file in list_folder(tmp_path / "apart", 3).iterdir()) == ["header.json", "lock"]
    build(None, tmp_path / "together", None, "mnist5k", canvas=32, limit=30)
    assert content(tmp_path / "apart") == content(tmp_path / "together")


def test_files_outside_of_the_source_are_listed_by_every_process(source, tmp_path, listings):
    rows = [f"{path},0" for path in sorted((source / "train").rglob("1*.png"))]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.csv").write_text("\n".join(["path,label", *rows]))
    for shard in range(2):
        build(tmp_path / "lists/list.csv", tmp_path / "out", shard, "csv", shards=2)
    assert len(listings) == 2 and read_header(beton_file(tmp_path / "out", "train")).num_samples == 2


def test_a_list_is_used_until_the_options_differ_or_all_shards_are_built(source, tmp_path, listings, capsys):
    out = tmp_path / "out"
    build(source, out, 0)
    Image.new("RGB", (8, 8)).save(source / "train/class0/new.png")
    build(source, out, 1)
    assert len(listings) == 1  # files that were added are not in the list,
    build(source, out, 0, limit=9)
    assert len(listings) == 2
    build(source, out, 0, quality=None, max_side=8, canvas=None)  # how images are stored does not matter
    assert len(listings) == 3
    build(source, out, 1, max_side=8, canvas=None)
    assert len(listings) == 3
    build(source, out)
    assert len(listings) == 4
    build(source, out, 1)
    assert len(listings) == 4 and "Uses the list of 13 images" in capsys.readouterr().err
    assert read_header(beton_file(out, "train")).num_samples == 13  # but they are when all shards are built


def test_a_file_that_has_changed_since_is_noticed(source, tmp_path, listings):
    out = tmp_path / "out"
    build(source, out)
    assert all(build(source, out, shard).splits[0].up_to_date for shard in range(3))
    Image.new("RGB", (8, 8)).save(source / "train/class1/07.png")
    assert sum(build(source, out, shard).splits[0].up_to_date for shard in range(3)) == 2
    (source / "train/class1/07.png").unlink()
    reports = [build(source, out, shard).splits[0] for shard in range(3)]
    assert sum(report.bad for report in reports) == 1 and sum(report.up_to_date for report in reports) == 2
    assert len(listings) == 1


def test_the_source_may_be_elsewhere_but_is_the_same(source, tmp_path, listings):
    out = tmp_path / "out"
    build(source, out, 0)
    shutil.copytree(source, tmp_path / "mount/copy")
    build(tmp_path / "mount/copy", out, 1)
    assert len(listings) == 1
    (tmp_path / "other/train/class0").mkdir(parents=True)
    with pytest.raises(UserError, match="is of .*/source, and .*/other does not hold its images"):
        build(tmp_path / "other", out, 2)


def changed_line(folder: Path, change) -> None:
    """Write a list in which the image of each line is another one, with the SHA-256 that fits."""
    import hashlib

    header = json.loads((folder / "header.json").read_text())
    split = header["splits"][0]
    file = (folder / "train.jsonl").read_bytes()
    parts = []
    for shard in split["shards"]:
        lines = [json.loads(line) for line in file[shard["start"] :][: shard["size"]].splitlines()]
        part = b"".join(json.dumps(change(line)).encode() + b"\n" for line in lines)
        shard |= {"start": sum(map(len, parts)), "size": len(part), "sha256": hashlib.sha256(part).hexdigest()}
        parts.append(part)
    (folder / "train.jsonl").write_bytes(b"".join(parts))
    (folder / "header.json").write_text(json.dumps(header))


def changed_header(**changes):
    def damage(folder: Path) -> None:
        header = json.loads((folder / "header.json").read_text())
        header["splits"][0] |= changes
        (folder / "header.json").write_text(json.dumps(header))

    return damage


def changed_top(folder: Path, **changes) -> None:
    header = json.loads((folder / "header.json").read_text())
    header["splits"][0]["spot_checked"] = changes.pop("spot_checked", [])
    (folder / "header.json").write_text(json.dumps({**header, **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "header.json").write_text("{"),
        lambda folder: (folder / "header.json").write_text("[" * 100_000),
        lambda folder: (folder / "header.json").write_bytes(b"\xff"),
        lambda folder: (folder / "train.jsonl").unlink(),
        lambda folder: (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes()[:200]),
        lambda folder: (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes().swapcase()),
        changed_header(name="../train"),
        changed_header(images=13),
        changed_header(samples=3),
        changed_header(samples=2**64),
        changed_header(shards=[{"start": 2**64, "size": 1, "sha256": "0" * 64}] * 3),
        changed_header(spot_checked=["0"] * 257),
        lambda folder: changed_top(folder, source="/x", spot_checked=["["]),
        lambda folder: changed_top(folder, splits=[]),
        lambda folder: changed_top(folder, tables={'"../a"': {"size": 1, "changed": 2**64}}),
        lambda folder: changed_top(folder, tables={'"../a"': {"size": 1, "changed": 1}}),
        lambda folder: changed_top(folder, tables={"[": {"size": 1, "changed": 1}}),
        changed_header(shards=[]),
        changed_header(sample_list_sha256="x"),
        lambda folder: changed_line(folder, lambda line: [*line[:3], "/etc/passwd"]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], "../secret.png"]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], ["a.tar", -1, 5]]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], ["a.tar", 2**70, 5]]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], {"class": "Popen", "args": "true"}]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], None]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], "a\0b"]),
        lambda folder: changed_line(folder, lambda line: [*line[:3], "\ud800"]),
        lambda folder: changed_line(folder, lambda line: [*line[:2], "\ud800", line[3]]),
        lambda folder: changed_line(folder, lambda line: [*line[:2], 5, line[3]]),
        lambda folder: changed_line(folder, lambda line: [0, *line[1:]]),
        lambda folder: changed_line(folder, lambda line: [line[0] + 5, *line[1:]]),
        lambda folder: changed_line(folder, lambda line: [line[0], 2**70, *line[2:]]),
        lambda folder: changed_line(folder, lambda line: {}),
        lambda folder: changed_line(folder, lambda line: line[:3]),
    ],
)
def test_a_damaged_list_is_made_again(damage, source, tmp_path, listings, capsys):
    out, options = tmp_path / "out", [BuildOptions(shards=3, shard=shard) for shard in range(3)]
    folder = list_folder(out, 3)
    expected = [images_of(read_or_make_list("imagefolder", source, out, each)) for each in options]
    whole = (folder / "header.json").read_bytes()
    damage(folder)
    assert [images_of(read_or_make_list("imagefolder", source, out, each)) for each in options] == expected
    assert len(listings) == 2
    said = capsys.readouterr().err
    assert f"The list in {folder} is damaged (" in said and said.count("so it is made again") == 1
    assert (folder / "header.json").read_bytes() == whole


def images_of(found) -> list:
    split = found.splits[0].split
    return [(index, split.samples[index]) for index in split.order]


def test_a_list_that_cannot_be_read_is_named(source, tmp_path):
    out = tmp_path / "out"
    build(source, out, 0)
    (list_folder(out, 3) / "header.json").unlink()
    os.mkfifo(list_folder(out, 3) / "header.json")
    with pytest.raises(UserError, match="list-of-00003 cannot be read .a named pipe") as error:
        build(source, out, 1)
    assert "delete it" in error.value.hint
    shutil.rmtree(list_folder(out, 3))
    (tmp_path / "elsewhere").mkdir()
    list_folder(out, 3).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link, so nothing is written to it"):
        build(source, out, 1)


BUILD = """
import sys
from pathlib import Path
from fastssl.beton import build_beton

if __name__ == "__main__":
    source, out, shard = sys.argv[1:]
    build_beton("imagefolder", Path(source), Path(out), canvas=8, shards=3, shard=int(shard), workers=1)
"""


def test_a_process_waits_for_the_one_that_lists(source, tmp_path):
    out, script = tmp_path / "out", tmp_path / "build.py"
    script.write_text(BUILD)
    list_folder(out, 3).mkdir(parents=True)
    with open(list_folder(out, 3) / "lock", "w") as lock:
        assert try_lock(lock)
        waiting = subprocess.Popen([sys.executable, script, source, out, "1"], stderr=subprocess.PIPE, text=True)
        assert waiting.stderr.readline().startswith("Another process lists the images in")
        time.sleep(0.5)
        assert waiting.poll() is None and not (list_folder(out, 3) / "header.json").exists()
    _, said = waiting.communicate(timeout=60)  # the lock is free, as if its process had been killed
    assert waiting.returncode == 0 and read_header(out / "train-00001-of-00003.beton").num_samples == 4


SLOW = """
import os, sys, time
from pathlib import Path
from fastssl.beton import BuildOptions, listing
from fastssl.beton.manifest import read_checked
from fastssl.beton.shared_list import read_or_make_list

list_splits = listing.list_splits
listing.list_splits = lambda *options: (print("lists", flush=True), time.sleep(60), list_splits(*options))[-1]
read_or_make_list("imagefolder", Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(shards=3, shard=0))
"""


def test_a_process_that_is_killed_while_it_lists_leaves_the_list_to_another(source, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.Popen([sys.executable, "-c", SLOW, source, out], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "lists\n"
    killed.kill()
    killed.communicate()
    for shard in range(3):
        build(source, out, shard)
    build(source, tmp_path / "in_turn")
    assert content(out) == content(tmp_path / "in_turn")


def test_processes_that_start_at_once_list_once(source, tmp_path):
    out, script = tmp_path / "out", tmp_path / "build.py"
    script.write_text(BUILD)
    builds = [
        subprocess.Popen([sys.executable, script, source, out, str(shard)], stderr=subprocess.PIPE, text=True)
        for shard in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in builds]
    assert [process.returncode for process in builds] == [0, 0, 0], said
    assert sum("Uses the list" in each for each in said) == 2
    build(source, tmp_path / "in_turn")
    assert content(out) == content(tmp_path / "in_turn")


# -- a source that has changed, or is another one ---------------------------------------------------


def change_in_place(path: Path, content: bytes) -> None:
    """Write another content of the same size, a second later: the clock of a file system may be coarse."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def rows_in_a_csv(root: Path, order) -> Path:
    names = [f"train/class{number % 2}/{number:02}.png,c{number % 2}" for number in order if number != 4]
    return (root / "list.csv", "\n".join(["path,label", *names]).encode())


def test_a_csv_that_changes_is_listed_again(source, tmp_path, listings, capsys):
    path, content = rows_in_a_csv(source, range(12))
    path.write_bytes(content)
    for shard in range(3):
        build(path, tmp_path / "out", shard, "csv")
    change_in_place(path, content.replace(b"00.png,c0", b"00.png,c1").replace(b"01.png,c1", b"01.png,c0"))
    reports = [build(path, tmp_path / "out", shard, "csv").splits[0] for shard in range(3)]
    assert len(listings) == 2 and not any(report.up_to_date for report in reports)
    assert f"is outdated ({path} has changed since), so it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("builder", ["webdataset", "parquet"])
def test_images_of_an_archive_or_a_table_that_is_written_again_are_listed_again(builder, source, tmp_path, listings):
    """The same images in another order: what the list says of a position would be another image's label."""
    make = {"webdataset": photos_in_a_tar, "parquet": photos_in_parquet}[builder]
    images = make(source, tmp_path / "images")
    for shard in range(3):
        build(images, tmp_path / "out", shard, builder)
    (table,) = images.iterdir()
    (source / "train/class0/00.png").rename(source / "train/class1/99.png")  # another order
    changed = next(make(source, tmp_path / "changed").iterdir())
    os.utime(changed, ns=(0, table.stat().st_mtime_ns + 10**9))
    os.replace(changed, table)
    for shard in range(3):
        build(images, tmp_path / "out", shard, builder)
    assert len(listings) == 2
    build(images, tmp_path / "fresh", None, builder)
    for path in (tmp_path / "fresh").glob("train-*.beton"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_label_files_that_change_are_noticed(source, tmp_path, listings, capsys):
    images = photos_in_a_tar(source, tmp_path / "images")
    build(images, tmp_path / "out", 0, "webdataset")
    (images / "classes.txt").write_text("cat\ndog\n")
    build(images, tmp_path / "out", 0, "webdataset")
    (images / "classes.txt").write_text("cats\ndogs\n")
    build(images, tmp_path / "out", 0, "webdataset")
    (images / "classes.txt").unlink()
    build(images, tmp_path / "out", 0, "webdataset")
    build(images, tmp_path / "out", 1, "webdataset")
    assert len(listings) == 4
    said = capsys.readouterr().err
    assert all(
        f"classes.txt {what}), so it is made again" in said for what in ("is new", "has changed since", "is missing")
    )


def test_builders_that_read_lists_name_them():
    for name in ("tinyimagenet", "dtd", "flowers102", "inaturalist", "places365", "sun397", "imagenet", "imagenet100"):
        assert load_builder(name).LABEL_FILES


@pytest.fixture
def other(source, tmp_path):
    """Other pixels with the names, labels and times of change of `source`."""
    shutil.copytree(source, tmp_path / "other")
    for path in (tmp_path / "other").rglob("*.png"):
        Image.new("RGB", (8, 8), (0, 99, 20)).save(path)
    return tmp_path / "other"


def test_shards_of_another_source_with_the_same_names_are_not_up_to_date(source, other, tmp_path):
    out = tmp_path / "out"
    build(source, out)
    before = content(out)
    for options in ({}, {"shard": 1}):
        shutil.rmtree(list_folder(out, 3), ignore_errors=True)
        with pytest.raises(UserError, match="is built from '.*/source', and --source .*/other holds other images with"):
            build(other, out, **options)
    assert content(out) == before


def test_shards_of_two_sources_are_not_read_as_a_set(source, other, tmp_path):
    for shard, images in enumerate((source, source, other)):
        build(images, tmp_path / "out", shard)
        shutil.rmtree(list_folder(tmp_path / "out", 3))
    assert not (tmp_path / "out/train-of-00003.beton.json").exists()
    with pytest.raises(UserError, match="are of different images with the same names, from '.*other' and '.*source'"):
        read_header(beton_file(tmp_path / "out", "train"))
    # A manifest from elsewhere may lack what it is from.
    path = tmp_path / "out" / "train-00002-of-00003.beton.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "source"}))
    with pytest.raises(UserError, match="are of different images with the same names, from None and '.*source'"):
        read_header(beton_file(tmp_path / "out", "train"))


def test_a_list_of_another_source_is_refused(source, other, tmp_path):
    build(source, tmp_path / "out", 0)
    with pytest.raises(UserError, match="The list in .* is of .*/source, and .*/other holds other images"):
        build(other, tmp_path / "out", 1)


def test_a_copy_of_the_source_is_up_to_date_and_its_files_are_not_counted(source, tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(source, copy)
    assert "Of 12 files in" in build(source, out).account
    report = build(copy, out, 1)
    assert report.splits[0].up_to_date and report.account.startswith("Of 12 images: 4 stored")
    assert f"from {source}. Files that were added" in capsys.readouterr().err


def test_a_list_that_cannot_be_read_for_a_moment_is_read_again(source, tmp_path, listings, monkeypatch):
    build(source, tmp_path / "out", 0)
    fails = [OSError(errno.ESTALE, "Stale file handle")]

    def stale(*arguments):
        if fails:
            raise fails.pop()
        return read_checked(*arguments)

    monkeypatch.setattr(shared_list, "read_checked", stale)
    build(source, tmp_path / "out", 1)
    assert not fails and len(listings) == 1
    fails += [OSError(errno.ESTALE, "Stale file handle")] * 2
    with pytest.raises(UserError, match="cannot be read .Stale file handle") as error:
        build(source, tmp_path / "out", 2)
    assert error.value.hint.startswith("run the same command again")
