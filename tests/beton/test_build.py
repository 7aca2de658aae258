"""build_beton under hard conditions: bad images, processes that die, full disks, builds that resume."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ffcv.libffcv import ctypes_imdecode
from PIL import Image
from rich.console import Console
from synthetic_images import jpeg_bytes, photo

import beton_builders
from fastssl.beton import (
    BuildOptions,
    build_beton,
    draw_sheet,
    estimate_build,
    inspect_beton,
    jpeg,
    partial_build,
    pool,
    read_header,
    read_labels,
    read_metadata,
    read_names,
    subset_table,
)
from fastssl.beton.images import StoragePlan
from fastssl.common.errors import UserError

FILES = ("train.beton", "train.beton.json", "train.beton.names.txt")


def add_builder(tmp_path: Path, monkeypatch, name: str, source: str) -> None:
    """Add a module to beton_builders, as a user would."""
    folder = tmp_path / "builders"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    monkeypatch.delitem(sys.modules, f"beton_builders.{name}", raising=False)  # that of another test
    monkeypatch.setattr(beton_builders, "__path__", [*beton_builders.__path__, str(folder)])


def built(out: Path) -> dict[str, bytes]:
    """Return the contents of the files of a build."""
    return {name: (out / name).read_bytes() for name in FILES}


# --- bad images, bad sources --------------------------------------------------------------------


@pytest.fixture
def with_bad_images(forty_photos, tmp_path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(forty_photos, source)
    whole = jpeg_bytes(photo(1, 100, 100))
    (source / "bird" / "00a truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "bird" / "00b ünï text.jpg").write_text("not an image")
    (source / "cat" / "zz empty.JPEG").write_bytes(b"")
    return source


@pytest.mark.parametrize("options", [{"canvas": 32}, {"max_side": 200}])
def test_bad_images_are_listed_and_skipped(with_bad_images, tmp_path, options):
    start = time.monotonic()
    report = build_beton("imagefolder", with_bad_images, tmp_path / "out", **options).splits[0]
    assert time.monotonic() - start < 20
    assert (report.samples, report.bad) == (40, 3)
    lines = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [entry["name"] for entry in bad] == [
        "bird/00a truncated.jpg",
        "bird/00b ünï text.jpg",
        "cat/zz empty.JPEG",
    ]
    assert [entry["index"] for entry in bad] == [1, 2, 42]
    assert "truncated" in bad[0]["reason"] and "empty" in bad[2]["reason"]
    index = read_metadata(report.path)["index"]
    assert sorted(index) == [position for position in range(43) if position not in (1, 2, 42)]
    assert list((tmp_path / "out").glob("*.part")) == []
    names = (tmp_path / "out" / "train.beton.names.txt").read_text().splitlines()
    assert names[2] == "bird/00b ünï text.jpg" and len(names) == 43


def test_strict_stops_at_the_first_bad_image_and_resumes_once_it_is_repaired(with_bad_images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="[.](jpg|JPEG) is bad: .*leave out --strict"):
        build_beton("imagefolder", with_bad_images, out, canvas=32, strict=True)
    assert not (out / "train.beton").exists()
    for path in with_bad_images.glob("*/*"):
        if path.name[:2] in ("00", "zz") and path.name != "00.jpg":
            path.write_bytes(jpeg_bytes(photo(0, 50, 50)))
    assert build_beton("imagefolder", with_bad_images, out, canvas=32, strict=True).splits[0].samples == 43


def test_a_second_build_forgets_bad_images_that_were_repaired(with_bad_images, tmp_path):
    out = tmp_path / "out"
    assert build_beton("imagefolder", with_bad_images, out, canvas=32).splits[0].bad == 3
    (with_bad_images / "bird" / "00b ünï text.jpg").write_bytes(jpeg_bytes(photo(0, 50, 50)))
    report = build_beton("imagefolder", with_bad_images, out, canvas=32).splits[0]
    assert (report.bad, report.up_to_date) == (2, False)
    assert len((out / "bad_images.jsonl").read_text().splitlines()) == 2


def test_a_split_of_bad_images_is_an_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_text("no")
    with pytest.raises(UserError, match="None of the 1 images .* could be read"):
        build_beton("imagefolder", source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("train*"))


def test_wrong_options_are_user_errors(forty_photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="did you mean imagefolder"):
        build_beton("imagefoldr", forty_photos, out)
    with pytest.raises(UserError, match="exclude each other"):
        build_beton("imagefolder", forty_photos, out, canvas=32, max_side=32)
    with pytest.raises(UserError, match="--max-side must be from 1 to 65,?500 px, got 70000"):
        build_beton("imagefolder", forty_photos, out, max_side=70000)
    with pytest.raises(UserError, match="--workers must be 1 or more, got 0"):
        build_beton("imagefolder", forty_photos, out, workers=0)
    with pytest.raises(UserError, match="--limit must be 1 or more, got 0"):
        build_beton("imagefolder", forty_photos, out, limit=0)
    with pytest.raises(UserError, match="nowhere does not exist"):
        build_beton("imagefolder", tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="imagefolder cannot be downloaded"):
        build_beton("imagefolder", tmp_path / "nowhere", out, download=True)
    with pytest.raises(UserError, match="no images"):
        (tmp_path / "empty").mkdir()
        build_beton("imagefolder", tmp_path / "empty", out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out cannot be written"):
        build_beton("imagefolder", forty_photos, tmp_path / "file" / "out")
    assert not out.exists()


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path / "source") + b"/cl\xe9"
    os.makedirs(folder)
    for name, content in ((b"a\xe9.jpg", jpeg_bytes(photo(0, 40, 40))), (b"bad\xe9.jpg", b"no image")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    report = build_beton("imagefolder", tmp_path / "source", tmp_path / "out").splits[0]
    assert (report.samples, report.bad) == (1, 1)
    assert read_header(report.path).classes == ["cl\\udce9"]
    assert json.loads((tmp_path / "out" / "bad_images.jsonl").read_text())["name"] == "cl\\udce9/bad\\udce9.jpg"
    assert (tmp_path / "out" / "train.beton.names.txt").read_bytes() == b"cl\xe9/a\xe9.jpg\ncl\xe9/bad\xe9.jpg\n"


# --- the loader's decoder decides what is bad -----------------------------------------------------


def test_checking_at_an_eighth_of_the_size_finds_the_same_faults_as_decoding_in_full():
    """On 600 damaged JPEGs, jpeg.check, jpeg.decode and FFCV's decoder agree."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    wholes = [
        jpeg_bytes(photo(2, 48, 64)),
        jpeg_bytes(Image.fromarray(pixels), progressive=True),
        jpeg_bytes(Image.fromarray(pixels), subsampling=0),
    ]
    verdicts = {"good": 0, "warned": 0, "failed": 0}
    for trial in range(600):
        content = bytearray(wholes[trial % 3])
        if trial % 4 == 0:
            content = content[: rng.integers(1, len(content))]
        else:
            for _ in range(trial % 5):
                content[rng.integers(200, len(content))] = rng.integers(256)
        content = bytes(content)
        verdict = verdict_of(lambda c: jpeg.check(c), content)
        assert verdict == verdict_of(lambda c: jpeg.decode(c).warning, content)
        if verdict != "failed" and jpeg.read_size(content) == (64, 48):
            out, source = np.empty((64, 48, 3), np.uint8), np.frombuffer(content, np.uint8)
            where = source.ctypes.data, source.size, 64, 48, out.ctypes.data, 64, 48
            assert (ctypes_imdecode(*where, 0, 0, 1, 1, False, False) == 0) == (verdict == "good")
        verdicts[verdict] += 1
    assert all(count > 10 for count in verdicts.values()), verdicts


def verdict_of(decode, content: bytes) -> str:
    try:
        return "warned" if decode(content) else "good"
    except ValueError:
        return "failed"


def test_images_are_encoded_again_for_each_reason(tmp_path):
    """The decoder warning comes from bytes between two segments: every viewer shows the image, turbojpeg warns."""
    (tmp_path / "source").mkdir()
    whole = jpeg_bytes(photo(0, 60, 60))
    (tmp_path / "source" / "whole.jpg").write_bytes(whole)
    at = whole.index(b"\xff\xdb")
    (tmp_path / "source" / "warned.jpg").write_bytes(whole[:at] + b"\0\0\0" + whole[at:])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    (tmp_path / "source" / "rotated.jpg").write_bytes(jpeg_bytes(photo(0, 60, 40), exif=rotated))
    (tmp_path / "source" / "large.jpg").write_bytes(jpeg_bytes(photo(0, 90, 40)))
    (tmp_path / "source" / "grey.jpg").write_bytes(jpeg_bytes(photo(0, 50, 50).convert("L")))
    photo(0, 50, 50).save(tmp_path / "source" / "image.png")
    report = build_beton("imagefolder", tmp_path / "source", tmp_path / "out", max_side=64).splits[0]
    manifest = read_header(report.path).manifest
    assert manifest["counts"] == {"passed_through": 1, "raw": 0, "bad": 0, "encoded": 5}
    assert manifest["encoded_because"] == {
        "not_jpeg": 1,
        "not_rgb": 1,
        "rotated": 1,
        "larger_than_max_side": 1,
        "decoder_warning": 1,
    }
    assert manifest["source_formats"] == {"JPEG": 5, "PNG": 1}


PIXELS = """
import numpy as np
from fastssl.beton import Sample

CANVAS = 32

def splits(source):
    return {"train": (["a"], [Sample(np.zeros((8, 8, 3), np.uint8), 0, str(n)) for n in range(3)])}
"""


def test_the_manifest_counts_sources_that_are_pixels(tmp_path, monkeypatch):
    add_builder(tmp_path, monkeypatch, "pixels", PIXELS)
    report = build_beton("pixels", None, tmp_path / "out", workers=1).splits[0]
    assert read_header(report.path).manifest["source_formats"] == {"pixels": 3}


def test_a_label_beyond_the_classes_is_a_user_error(tmp_path, monkeypatch):
    add_builder(tmp_path, monkeypatch, "mislabelled", PIXELS.replace("np.uint8), 0,", "np.uint8), 1,"))
    with pytest.raises(UserError, match="gave . the label 1, but the split 'train' has 1 classes: correct the builder"):
        build_beton("mislabelled", None, tmp_path / "out", workers=1)


HALF_LABELLED = """
import numpy as np
from fastssl.beton import Sample

CANVAS = 32

def splits(source):
    mixed = [Sample(np.full((8, 8, 3), n, np.uint8), (0, -1, 1, -1)[n], str(n)) for n in range(4)]
    none = [Sample(image, -1, name) for image, _, name in mixed]
    return {"mixed": (["cat", "dog"], mixed), "none": ([], none), "named": (["cat", "dog"], none)}
"""


def test_images_without_a_label_are_stored_with_minus_one_and_counted(tmp_path, monkeypatch, capsys):
    """Next to labelled ones, in a split of their own without classes, and in one whose classes have names."""
    add_builder(tmp_path, monkeypatch, "half_labelled", HALF_LABELLED)
    reports = build_beton("half_labelled", None, tmp_path / "out", workers=1, order="source").splits
    assert [(len(report.classes), report.unlabelled) for report in reports] == [(2, 2), (0, 4), (2, 4)]
    assert read_labels(reports[0].path).tolist() == [0, -1, 1, -1]
    again = build_beton("half_labelled", None, tmp_path / "out", workers=1, order="source").splits
    assert again == [report._replace(up_to_date=True) for report in reports]
    (tmp_path / "list.txt").write_text("1\n2\n")
    shown = []
    for report in reports:
        draw_sheet(report.path, tmp_path / "sheet.png")
        for table in (inspect_beton(report.path), subset_table(report.path, tmp_path / "list.txt")):
            Console(width=200).print(table)
            shown.append(capsys.readouterr().out)
    assert "2 classes, samples per class: min 1, median 1, max 1; 2 without a label" in shown[0]
    assert "max 1; 1 without a label" in shown[1]
    assert all("none of the 4 images has a label" in text for text in (shown[2], shown[4]))
    assert all("none of the 2 images has a label" in text for text in (shown[3], shown[5]))


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_built_on_and_said(error, tmp_path, monkeypatch, capsys):
    add_builder(tmp_path, monkeypatch, "half_labelled", HALF_LABELLED)

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    build_beton("half_labelled", None, tmp_path / "out", workers=1, limit=1)
    assert "mixed.beton is on a file system without locks" in capsys.readouterr().err.replace("\n", " ")


def test_only_splits_none_is_recorded_so_that_older_files_stay_up_to_date(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    for splits, recorded in (("auto", None), ("none", "none")):
        report = build_beton("imagefolder", photos, tmp_path / splits, workers=1, canvas=8, splits=splits)
        manifest = read_header(report.splits[0].path).manifest
        assert manifest.get("splits") == recorded


def test_held_out_images_are_built_as_val(tmp_path):
    for number in range(40):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    build = functools.partial(build_beton, "imagefolder", tmp_path / "photos", workers=1, canvas=8)
    for shards in (None, 2):
        report = build(out=tmp_path / f"out{shards}", hold_out=25, shards=shards)
        assert [split.split for split in report.splits] == ["train", "val"]
        assert sum(split.samples for split in report.splits) == 40
        assert "Of 40 images: 40 stored." in report.account
        train, val = (set(read_names(split.path, range(40)).values()) for split in report.splits)
        assert len(train | val) == 40 and not train & val
        # Without --hold-out, or with sources that have lost their images, train would hold those of the old val too.
        with pytest.raises(UserError, match="val.*beton holds images that --hold-out 25% has taken"):
            build(out=tmp_path / f"out{shards}", shards=shards)
        with pytest.raises(UserError, match="they would be in train too"):
            estimate_build(
                "imagefolder", tmp_path / "photos", tmp_path / f"out{shards}", BuildOptions(canvas=8, shards=shards)
            )
    manifest = read_header(tmp_path / "outNone" / "val.beton").manifest
    assert manifest["hold_out"] == 25 and manifest["samples"] == report.splits[1].samples
    # What the hint says is enough, and a build of other splits does not matter.
    shutil.copytree(tmp_path / "photos", tmp_path / "test" / "test")
    build_beton("imagefolder", tmp_path / "test", tmp_path / "outNone", workers=1, canvas=8)
    (tmp_path / "outNone" / "val.beton").unlink()
    assert build(out=tmp_path / "outNone").splits[0].samples == 40
    for share in (0, 100, -3):
        with pytest.raises(UserError, match="--hold-out must be more than 0 % and less than 100 %"):
            build(out=tmp_path / "none", hold_out=share)


# --- processes that die, disks that are full ----------------------------------------------------


DEADLY = """
import os
from functools import partial
import numpy as np
from fastssl.beton import Sample

CANVAS = 32

class Deadly:
    def __reduce__(self):
        return os._exit, (1,)  # unpickling, in the worker, ends it

def splits(source):
    good = [Sample(np.full((8, 8, 3), n, np.uint8), 0, str(n)) for n in range(80)]
    return {"train": (["a"], good[:40] + [Sample(DEADLY, 0, 'deadly')] + good[40:])}
"""


# What a worker calls in place of an image: of the modules that it can import.
KILL = "partial(eval, \"__import__('os').kill(__import__('os').getpid(), 9)\")"
CRASH = "partial(eval, \"__import__('ctypes').string_at(0)\")"
FILL = """partial(exec, 'import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, -1)); bytearray(4 << 30)')"""


@pytest.mark.parametrize(
    ("deadly", "reason"),
    [
        ("Deadly()", "the worker process died"),  # while its task is read
        (KILL, "the worker process died"),
        (CRASH, "the worker process died"),
        ("partial(bytes, 1 << 60)", "there is not enough memory to decode it"),
        (FILL, "there is not enough memory to decode it"),
    ],
)
def test_a_build_goes_on_without_an_image_of_which_its_workers_die(deadly, reason, tmp_path, monkeypatch, capsys):
    """It is the second of three chunks; the result is that of a build without it."""
    add_builder(tmp_path, monkeypatch, "deadly", DEADLY.replace("DEADLY", deadly))
    add_builder(tmp_path, monkeypatch, "sound", DEADLY.replace("[Sample(DEADLY", "[Sample(b'no image'"))
    for builder in ("deadly", "sound"):
        report = build_beton(builder, None, tmp_path / builder, workers=2, order="source").splits[0]
        assert (report.samples, report.bad) == (80, 1)
    (bad,) = map(json.loads, (tmp_path / "deadly" / "bad_images.jsonl").read_text().splitlines())
    assert bad == {"split": "train", "name": "deadly", "index": 40, "reason": reason}
    contents = [(tmp_path / builder / "train.beton").read_bytes() for builder in ("deadly", "sound")]
    assert contents[0] == contents[1]
    assert "train: a worker process died or had too little memory, of deadly." in capsys.readouterr().err
    with pytest.raises(UserError, match=f"deadly is bad: {reason}: repair or remove it"):
        build_beton("deadly", None, tmp_path / "strict", workers=2, strict=True)


def test_several_images_of_which_workers_die(tmp_path, monkeypatch):
    source = DEADLY.replace("[Sample(DEADLY, 0, 'deadly')]", f"[Sample({KILL}, 0, str(n)) for n in range(3)]")
    add_builder(tmp_path, monkeypatch, "deadly", source)
    report = build_beton("deadly", None, tmp_path / "out", workers=2).splits[0]
    assert (report.samples, report.bad) == (80, 3)


@pytest.mark.parametrize("deadly", [KILL, FILL])
def test_images_of_which_workers_die_are_bad_without_a_build_too(deadly):
    """As `embed` encodes them: three of 40, in several chunks, among arrays and files."""
    good = [np.full((8, 8, 3), number, np.uint8) for number in range(40)]
    images = list(good)
    for position in (5, 6, 35):
        images[position] = eval(deadly, {"partial": functools.partial})
    with pool.worker_pool(2) as workers:
        results = list(workers.encode(images, StoragePlan("canvas", 32, 90), images_per_task=4))
        assert [number for number, result in enumerate(results) if isinstance(result, str)] == [5, 6, 35]
        assert {result for result in results if isinstance(result, str)} <= {pool.DIED, pool.NO_MEMORY}
        assert [result.payload[0] for result in results if not isinstance(result, str)] == [
            number for number in range(40) if number not in (5, 6, 35)
        ]
        again = list(workers.encode(good, StoragePlan("canvas", 32, 90)))  # with both workers again
        assert len(again) == 40 and workers.executor._max_workers == 2


def test_a_worker_that_starts_while_the_others_are_ended_is_not_waited_for():
    """Python's executor forgets it, and then waits for it: so an interrupted `embed` could hang."""
    workers = pool.Pool(1)
    first = workers.executor.submit(os.getpid).result()
    state = vars(workers.executor)
    manager, processes = state["_executor_manager_thread"], state["_processes"]
    wait_for_processes, started = manager.join_executor_internals, threading.Event()
    late = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))

    def start_and_wait():  # called after the executor has ended its processes
        late.start()
        processes[late.pid] = late
        started.set()
        wait_for_processes()

    manager.join_executor_internals = start_and_wait
    os.kill(first, signal.SIGKILL)
    assert started.wait(60)
    closing = threading.Thread(target=workers.close, daemon=True)
    closing.start()
    closing.join(60)
    is_closed = not closing.is_alive()
    late.kill()
    assert is_closed


def test_workers_that_cannot_work_at_all_are_a_user_error_and_no_image_is_bad(forty_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_start_worker", os._exit)  # its argument is none, so each worker ends with an error
    with pytest.raises(UserError, match="A worker process died"):
        build_beton("imagefolder", forty_photos, tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "bad_images.jsonl").exists()
    assert not (tmp_path / "out" / "train.beton").exists()


def test_a_chunk_is_written_although_a_later_one_has_failed():
    turns = pool.Turns(multiprocessing.get_context("spawn"))
    turns.restart(100)
    turns.fail(1)
    assert len(turns.reserve(0, [10, 20])) == 2
    with pytest.raises(RuntimeError, match="earlier chunk"):
        turns.reserve(2, [10])


BUILD = """
import sys, pathlib, signal
from fastssl.beton import build_beton, pool, partial_build

# Processes in the background of a shell ignore Ctrl-C, and tests may run there.
signal.signal(signal.SIGINT, signal.default_int_handler)
partial_build.SAVE_EVERY = 0.0  # after every chunk
pool.TASKS_PER_WORKER = 2  # otherwise the workers may have finished before the first chunks are saved
if __name__ == "__main__":
    source, out = map(pathlib.Path, sys.argv[1:])
    build_beton("imagefolder", source, out, canvas=256, workers=2)
"""


@pytest.fixture
def slow_source(tmp_path) -> Path:
    """600 names of one image: seconds of work on any machine."""
    source = tmp_path / "source"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    (source / "0.jpg").write_bytes(jpeg_bytes(Image.fromarray(noise)))
    for number in range(1, 600):
        os.link(source / "0.jpg", source / f"{number}.jpg")
    return source


def start_build(tmp_path: Path, source: Path, out: Path, rows: int) -> subprocess.Popen:
    """Start a build in its own process group, and return when more than `rows` bytes of rows have been saved."""
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    command = [sys.executable, script, source, out]
    build = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    saved = out / "train.beton.part" / "rows"
    while build.poll() is None and not (saved.exists() and saved.stat().st_size > rows):
        time.sleep(0.02)
    assert build.poll() is None
    return build


def test_a_build_that_was_killed_resumes_and_gives_the_same_files(slow_source, tmp_path):
    """Interrupted as by a terminal, then killed. Where one worker is killed, no image is at fault."""
    out, part = tmp_path / "out", tmp_path / "out" / "train.beton.part"
    rows = 0
    for kill in ("ctrl-c", "kill -9"):
        build = start_build(tmp_path, slow_source, out, rows)
        if kill == "ctrl-c":
            os.killpg(build.pid, signal.SIGINT)
        else:
            build.kill()
        build.communicate(timeout=20)  # returns when the workers have ended too
        assert build.returncode != 0
        assert not (out / "train.beton").exists()
        assert (part / "rows").stat().st_size > rows
        rows = (part / "rows").stat().st_size
    build = start_build(tmp_path, slow_source, out, rows)
    os.kill(workers_of(build)[0], signal.SIGKILL)
    stderr = build.communicate(timeout=120)[1]
    assert build.returncode == 0, stderr
    assert "train: a worker process died or had too little memory, but of no image" in stderr
    assert not (out / "bad_images.jsonl").exists()
    assert not part.exists()

    straight = tmp_path / "straight"
    build_beton("imagefolder", slow_source, straight, canvas=256, workers=2)
    assert built(out) == built(straight)


def workers_of(build: subprocess.Popen) -> list[int]:
    """Return the process ids of the worker processes."""
    children = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    command = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, line in command.items() if "spawn_main" in line]


def test_two_builds_of_the_same_file_are_refused(slow_source, tmp_path):
    build = start_build(tmp_path, slow_source, tmp_path / "out", 0)
    with pytest.raises(UserError, match="Another process is building .*train.beton"):
        build_beton("imagefolder", slow_source, tmp_path / "out", canvas=256)
    build.kill()
    build.communicate(timeout=20)


def test_a_full_disk_is_a_user_error(forty_photos, tmp_path):
    """A limit on the size of files replaces the full disk: the same write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError, match=re.escape(f"{tmp_path} cannot be written")):
            build_beton("imagefolder", forty_photos, tmp_path, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_folder_is_a_user_error(forty_photos, tmp_path):
    source = Path(tempfile.mkdtemp(prefix="fastssl-test-"))  # other users cannot read pytest's own folders
    user = os.geteuid()
    try:
        shutil.copytree(forty_photos, source, dirs_exist_ok=True)
        source.chmod(0o755)
        (source / "cat").chmod(0)
        if user == 0:  # root may read everything, nobody may not
            os.seteuid(65534)
        with pytest.raises(UserError, match="/cat cannot be read: make it readable"):
            build_beton("imagefolder", source, source.with_name(source.name + "-out"))
    finally:
        os.seteuid(user)
        (source / "cat").chmod(0o755)
        shutil.rmtree(source)


# --- the same bytes -----------------------------------------------------------------------------


def test_workers_do_not_change_the_bytes(forty_photos, tmp_path):
    for options in ({"canvas": 32}, {"canvas": 80}, {"max_side": 100}):
        outs = [tmp_path / f"{options}-{workers}" for workers in (1, 3)]
        for out, workers in zip(outs, (1, 3)):
            build_beton("imagefolder", forty_photos, out, workers=workers, **options)
        assert built(outs[0]) == built(outs[1])


def test_order_source_is_the_builders_order_and_limit_is_spread_over_the_classes(forty_photos, tmp_path):
    report = build_beton("imagefolder", forty_photos, tmp_path / "o", canvas=32, order="source").splits[0]
    assert read_metadata(report.path)["index"].tolist() == list(range(40))
    assert read_header(report.path).manifest["order"] == "source"
    report = build_beton("imagefolder", forty_photos, tmp_path / "p", canvas=32, order="source", limit=10).splits[0]
    index = read_metadata(report.path)["index"].tolist()
    assert index == sorted(index) and len(index) == 10
    assert set(read_labels(report.path)) == {0, 1}


def test_a_file_is_built_again_only_if_images_or_options_have_changed(forty_photos, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(forty_photos, source)
    assert not build_beton("imagefolder", source, out, canvas=32).splits[0].up_to_date
    before = built(out)
    again = build_beton("imagefolder", source, out, canvas=32).splits[0]
    assert again.up_to_date and (again.samples, again.bad) == (40, 0)

    (source / "bird" / "03.jpg").write_bytes(jpeg_bytes(photo(77, 60, 60)))
    assert not build_beton("imagefolder", source, out, canvas=32).splits[0].up_to_date  # a file has changed
    assert built(out)["train.beton"] != before["train.beton"]
    assert not build_beton("imagefolder", source, out, canvas=24).splits[0].up_to_date  # an option has changed
    (source / "cat" / "new.jpg").write_bytes(jpeg_bytes(photo(78, 60, 60)))
    assert build_beton("imagefolder", source, out, canvas=24).splits[0].samples == 41
    (out / "train.beton").write_bytes(b"cut off")
    assert not build_beton("imagefolder", source, out, canvas=24).splits[0].up_to_date


def test_a_partial_build_restarts_if_its_sources_have_changed(forty_photos, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(forty_photos, source)

    (source / "cat" / "zz.jpg").write_text("a text")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_build, "write_tables", full_disk)
        build_beton("imagefolder", source, tmp_path / "out", canvas=80)
    part = tmp_path / "out" / "train.beton.part"
    assert len((part / "rows").read_bytes()) == 41 * partial_build.ROW.itemsize
    (source / "bird" / "03.jpg").write_bytes(jpeg_bytes(photo(77, 60, 60)))
    build_beton("imagefolder", source, tmp_path / "out", canvas=80)
    build_beton("imagefolder", source, tmp_path / "straight", canvas=80)
    assert built(tmp_path / "out") == built(tmp_path / "straight")


@pytest.mark.parametrize("make", ["file", "link", "folder"])
def test_a_beton_that_is_not_ours_is_not_overwritten(forty_photos, tmp_path, make):
    """Such as one of FFCV's own writer, which took days."""
    path, other = tmp_path / "train.beton", tmp_path / "other"
    other.write_bytes(b"of the user")
    if make == "file":
        other.rename(path)
    elif make == "link":
        path.symlink_to(other)
    else:
        path.mkdir()
    with pytest.raises(UserError, match="train.beton exists without a manifest, .* move it, or use another --out"):
        build_beton("imagefolder", forty_photos, tmp_path, canvas=32, workers=1)
    assert path.is_dir() or path.read_bytes() == b"of the user"


def test_a_build_killed_between_two_renames_is_finished(forty_photos, tmp_path, monkeypatch):
    """The file has its final name, the manifest has not: the next build moves the file back and finishes it."""
    out = tmp_path / "out"
    moved = []

    def killed(part: Path, final: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(os.replace(part, final))

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_build, "replace_durably", killed)
        patch.setattr(partial_build.PartialBuild, "__exit__", lambda self, *_: self._lock.close())
        build_beton("imagefolder", forty_photos, out, canvas=32)
    assert (out / "train.beton").exists() and not (out / "train.beton.json").exists()
    monkeypatch.setattr("fastssl.beton.pool.encode_all", None)  # nothing is encoded a second time
    assert build_beton("imagefolder", forty_photos, out, canvas=32).splits[0].samples == 40
    build_beton("imagefolder", forty_photos, tmp_path / "straight", canvas=32)
    assert built(out) == built(tmp_path / "straight")


def test_a_save_that_is_interrupted_leaves_each_image_once(forty_photos, tmp_path, monkeypatch):
    """Ctrl-C after the rows were written, and then the save that the interrupt itself causes."""
    forty = tmp_path / "photos"
    shutil.copytree(forty_photos, forty)
    (forty / "bird" / "bad.jpg").write_bytes(b"no image")
    write_at, interrupted = partial_build._write_at, []

    def interrupted_once(path, position, content):
        write_at(path, position, content)
        if path.name == "rows" and content and not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(partial_build, "_write_at", interrupted_once)
    monkeypatch.setattr(partial_build, "SAVE_EVERY", 0.0)
    out, straight = tmp_path / "out", tmp_path / "straight"
    with pytest.raises(KeyboardInterrupt):
        build_beton("imagefolder", forty, out, canvas=32, workers=1)
    rows = np.frombuffer((out / "train.beton.part" / "rows").read_bytes(), partial_build.ROW)
    assert interrupted and len(rows) and len(set(rows["index"].tolist())) == len(rows)
    for folder in (out, straight):
        build_beton("imagefolder", forty, folder, canvas=32, workers=1)
    assert built(out) == built(straight)
    assert (out / "bad_images.jsonl").read_text() == (straight / "bad_images.jsonl").read_text()


def test_the_estimate_is_close_to_what_is_built(forty_photos, tmp_path):
    options = {"canvas": 80, "workers": 1}
    estimate = estimate_build("imagefolder", forty_photos, tmp_path / "o", BuildOptions(**options))
    assert not (tmp_path / "o").exists()
    assert estimate.free_disk > 0 and estimate.free_memory > 0
    split = estimate.splits[0]
    assert (split.images, len(split.classes), split.bad) == (40, 2, 0)
    report = build_beton("imagefolder", forty_photos, tmp_path / "o", **options).splits[0]
    assert split.bytes == report.bytes  # all 40 were sampled
    limited = estimate_build("imagefolder", forty_photos, tmp_path / "o", BuildOptions(limit=10, **options))
    assert limited.splits[0].images == 10


@pytest.mark.parametrize("images, unit", [(40, "MB"), (4_000_000, "GB")])
def test_the_estimate_gives_a_size_in_one_unit_and_says_what_its_time_counts(
    forty_photos, images, unit, tmp_path, fastssl
):
    command = f"build-beton imagefolder --source {forty_photos} --out {tmp_path}/o --canvas 80 --workers 1 --dry-run"
    code, out, err = fastssl(*command.split(), "--images", images)
    assert "Encoding 40 images as a sample." in err
    said = " ".join(out.split())
    size = re.search(r"classes \(bird, cat\), ([\d.]+ [MG]B), as", said)[1]
    assert code == 0 and said.count(f"All {size} ") == 2 and size.endswith(unit)
    assert said.count(", plus the start of the processes") == 2  # as blocks, as JPEGs


def test_a_build_says_what_it_replaces(photos, tmp_path, capsys):
    def said(**options):
        build_beton("imagefolder", photos, tmp_path, workers=1, limit=4, **options)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Replaces")]

    train, val = tmp_path / "train.beton", tmp_path / "val.beton"
    assert said(canvas=32) == said(canvas=32) == []
    assert said(canvas=96, codec="jpeg") == [
        f"Replaces {path} (canvas 32 px, pixels) with canvas 96 px, JPEG quality 90." for path in (train, val)
    ]
    assert said(canvas=96, codec="jpeg", order="source") == [
        f"Replaces {path} (canvas 96 px, JPEG quality 90), whose images or other options have changed."
        for path in (train, val)
    ]
