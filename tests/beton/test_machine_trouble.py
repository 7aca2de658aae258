"""Trouble of the machine stops a build and is never an image's fault; what is missing is looked for again."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import build_beton, inspect_beton, read_header, read_labels
from fastssl.beton.images import StoragePlan, encode_all
from fastssl.beton.parts import map_file
from fastssl.beton.pool import Turns
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader

JPEG = jpeg_bytes(photo(0, 24, 20))
PLAN = StoragePlan("canvas", 16, 90)
ROOT = Path(__file__).parents[2]


@dataclass
class Failing:
    """An image whose file cannot be read."""

    number: int
    path: str = "/data/photo.jpg"

    def __call__(self):
        raise OSError(self.number, os.strerror(self.number), self.path)


def build(source, out, builder="imagefolder", **options):
    return build_beton(builder, source, out, workers=1, canvas=8, **options)


def photos(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(JPEG)
    return folder


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ETIMEDOUT],
)
def test_errors_of_the_machine_stop_the_build(number):
    with pytest.raises(UserError, match=f"/data/photo.jpg cannot be read .{os.strerror(number)}.*a build goes on"):
        encode_all([JPEG, Failing(number)], PLAN)


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_errors_of_the_entry_make_it_bad(number):
    good, bad = encode_all([JPEG, Failing(number)], PLAN)
    assert not isinstance(good, str)
    assert bad == os.strerror(number)


def test_an_error_without_a_number_comes_from_a_decoder():
    def damaged():
        raise OSError("broken data stream")

    assert encode_all([damaged], PLAN) == ["OSError: broken data stream"]


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would wait for a writer; /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    results = encode_all([str(path) for path in sorted(tmp_path.iterdir())], PLAN)
    assert results == ["ValueError: not a regular file"] * 3


def test_files_that_wait_or_have_no_end_are_not_read(tmp_path):
    """The kernel's own, and one of which most is a hole."""
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(5 << 30)
    results = encode_all(["/proc/kmsg", str(tmp_path / "hole.jpg")], PLAN)
    too_large = "ValueError: has 5.4 GB, more than the 1 GiB that an image file may have"
    assert results == ["ValueError: the file is empty", too_large]


@pytest.mark.parametrize("kind", ["gone", "empty", "linked"])
def test_a_disk_that_is_away_stops_the_build_and_the_next_one_goes_on(kind, tmp_path):
    """The disk's folder is gone, or an empty mount point, or the images are links to it."""
    disk, away = photos(tmp_path / "disk"), tmp_path / "away"
    source = tmp_path / "list.csv"
    source.write_text("path,label\n" + "".join(f"disk/{number}.jpg,a\n" for number in range(3)))
    builder = "csv"
    if kind == "linked":
        source, builder = photos(tmp_path / "links", 1), "imagefolder"
        for number in range(3):
            os.symlink(disk / f"{number}.jpg", source / f"b{number}.jpg")
    shutil.move(disk, away)
    if kind == "empty":
        disk.mkdir()
    with pytest.raises(UserError, match=f"the folder {re.escape(str(disk))} is missing or empty: mount its disk"):
        build(source, tmp_path / "out", builder)
    if kind == "empty":
        disk.rmdir()
    shutil.move(away, disk)
    report = build(source, tmp_path / "out", builder).splits[0]
    assert (report.samples, report.bad, report.up_to_date) == (4 if kind == "linked" else 3, 0, False)


@pytest.mark.parametrize("kind", ["csv", "link", "later"])
def test_a_missing_file_is_bad_and_looked_for_again(kind, tmp_path):
    """One of a list, the target of a link, or one in a file that is finished and then comes back."""
    source = photos(tmp_path / "photos")
    hidden = tmp_path / "hidden.jpg"
    shutil.move(source / "1.jpg", hidden)
    builder = "csv"
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"photos/{number}.jpg,a\n" for number in range(3)))
    if kind == "link":
        listed, builder = photos(tmp_path / "links", 1), "imagefolder"
        os.symlink(source / "1.jpg", listed / "x.jpg")
    for up_to_date in (False, True):
        report = build(listed, tmp_path / "out", builder).splits[0]
        assert (report.bad, report.up_to_date) == (1, up_to_date)
    manifest = read_header(report.path).manifest
    assert len(manifest["missing"]) == 1
    (line,) = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "missing"
    shutil.move(hidden, source / "1.jpg")
    for up_to_date in (False, True):
        report = build(listed, tmp_path / "out", builder).splits[0]
        assert (report.bad, report.up_to_date) == (0, up_to_date)
    assert "missing" not in read_header(report.path).manifest


def test_a_link_to_another_old_file_is_a_change(tmp_path):
    source, other = photos(tmp_path / "photos", 1), tmp_path / "other.jpg"
    other.write_bytes(jpeg_bytes(photo(5, 30, 30)))
    os.symlink(source / "0.jpg", source / "link.jpg")
    first = build(source, tmp_path / "out").splits[0]
    os.unlink(source / "link.jpg")
    os.symlink(other, source / "link.jpg")
    second = build(source, tmp_path / "out").splits[0]
    assert not first.up_to_date
    assert not second.up_to_date


@pytest.mark.parametrize(
    ("bad", "images", "allow_bad", "is_problem"),
    [(10, 12, None, False), (11, 40, None, True), (11, 1200, None, False), (13, 1200, None, True)]
    + [(11, 40, 50.0, False), (11, 40, 20.0, True), (1, 40, 0.0, True), (0, 40, 0.0, False)],
)
def test_too_many_bad_images_are_a_problem(bad, images, allow_bad, is_problem, tmp_path):
    source = photos(tmp_path / "photos", 0)
    for number in range(images):
        (source / f"{number}.jpg").write_bytes(b"x" if number < bad else JPEG)
    for _ in range(2):  # the second one is up to date
        report = build(source, tmp_path / "out", allow_bad=allow_bad)
        assert (report.problem is not None) == is_problem
        assert report.splits[0].samples == images - bad
    assert not is_problem or "allow that with --allow-bad" in report.problem


@pytest.mark.parametrize(("option", "code"), [([], 1), (["--allow-bad", "50%"], 0), (["--allow-bad", "30"], 0)])
def test_the_command_ends_with_1_after_it_has_built_the_file(option, code, tmp_path):
    source = photos(tmp_path / "photos", 40)
    for number in range(11):
        (source / f"{number}.jpg").write_bytes(b"x")
    command = ["build-beton", "imagefolder", "--source", source, "--out", tmp_path / "out", "--canvas", "8", *option]
    done = subprocess.run(
        [sys.executable, "-m", "fastssl", *command, "--workers", "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    assert ("11 of the 40 images of the split 'train' are bad, 27.5%" in done.stderr) == bool(code)
    assert len(read_labels(tmp_path / "out" / "train.beton")) == 29


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserError, match="--allow-bad must be from 0 to 100 %, got 101"):
        build_beton("mnist5k", None, Path("out"), allow_bad=101)


def test_an_earlier_chunk_is_still_written_when_a_later_one_fails():
    """Chunk 1 waits for chunk 0 while chunk 2 fails: both get their turn, and chunk 3 gives up."""
    turns = Turns(multiprocessing.get_context("spawn"))
    turns.restart(0)
    positions = {}

    def reserve(turn):
        try:
            positions[turn] = turns.reserve(turn, [10])
        except RuntimeError:
            positions[turn] = None

    waiting = [threading.Thread(target=reserve, args=(turn,)) for turn in (1, 3)]
    for thread in waiting:
        thread.start()
    turns.fail(2)
    reserve(0)
    for thread in waiting:
        thread.join(timeout=10)
    assert positions == {0: [0], 1: [10], 3: None}


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "make room in /dev/shm"), (errno.EROFS, "/dev/shm"), (errno.EMFILE, "ulimit -n")]
    + [(errno.EAGAIN, "ulimit -u")],
)
def test_workers_that_cannot_start_are_not_blamed_on_the_output(number, fix, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    source = photos(tmp_path / "photos")
    monkeypatch.setattr("fastssl.beton.pool.Turns", refuse)
    with pytest.raises(UserError, match=fix) as raised:
        build(source, tmp_path / "out")
    assert "worker processes cannot be started" in str(raised.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_a_limit_on_the_address_space_is_named(error, tmp_path, monkeypatch):
    path = build(photos(tmp_path / "photos"), tmp_path / "out").splits[0].path

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(np, "memmap", refuse)
    for use in (map_file, inspect_beton, lambda path: BetonLoader(path, 2)):
        with pytest.raises(UserError, match=r"the limit on the address space .*ulimit -v; on Grid Engine h_vmem"):
            use(path)
