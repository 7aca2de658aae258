"""A set of shards: built in any order and by any process, and read as the one file that it would be."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import small

from fastssl.beton import (
    BuildOptions,
    beton_file,
    build_beton,
    data_checksum,
    draw_sheet,
    estimate_build,
    has_split,
    partial_build,
    read_header,
    read_index_list,
    read_metadata,
    read_names,
)
from fastssl.beton.format import manifest_path
from fastssl.beton.parts import SPARE_MAPPINGS, map_file
from fastssl.beton.shards import Shard, exists, files_of, is_set, set_manifest_path, split_of
from fastssl.beton.sheet import TITLE_HEIGHT
from fastssl.common.errors import Stopped, UserError
from fastssl.common.system import most_mappings, used_mappings
from fastssl.evaluation.runs import BetonSubset
from fastssl.loading import BetonLoader
from fastssl.loading.order import SampleSelection
from fastssl.loading.samples import Samples
from fastssl.recipe import ViewsConfig, load_recipe
from fastssl.training import train

LAYOUTS = {"canvas": {"canvas": 32}, "jpeg": {"canvas": 40, "codec": "jpeg"}, "full": {"max_side": 500}}
VIEWS = ViewsConfig(size=24)


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory):
    """48 photographs in three classes, a bad one among them, and 12 for validation."""
    root = tmp_path_factory.mktemp("source") / "photos"
    shutil.copytree(photos, root)
    (root / "train/class1/bad.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module", params=LAYOUTS)
def built(request, source, tmp_path_factory):
    """A function of the number of shards: the training set, built once; None for one file."""
    root, options = tmp_path_factory.mktemp("sets"), LAYOUTS[request.param]

    def build(shards):
        out = root / str(shards)
        if not out.exists():
            build_beton("imagefolder", source, out, shards=shards, workers=1, **options)
        return beton_file(out, "train")

    return build


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def batches(path, **options):
    crop = "gpu" if read_header(path).resolution else "cpu"
    loader = BetonLoader(path, 7, crop=crop, views=VIEWS, seed=5, workers=2, **options)
    return loader, [batch.tensors() for batch in loader]


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_batches_are_those_of_one_file(built, shards):
    one, several = built(None), built(shards)
    assert is_set(several) and not is_set(one) and len(files_of(several)) == shards
    for options in ({}, {"shuffle": False}, {"drop_last": False}, {"selection": SampleSelection(limit=20, skip=3)}):
        loader, expected = batches(one, **options)
        other, found = batches(several, **options)
        assert len(found) == len(expected) >= 2
        for mine, theirs in zip(found, expected):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
        # So a run may go on with shards in place of the file.
        loader.set_epoch(3)
        other.load_state_dict(loader.state_dict())
        assert other.epoch == 3


def test_a_resident_set_is_read_from_all_shards(built):
    if not read_header(built(None)).resolution:
        with pytest.raises(UserError, match="holds images of different sizes"):
            BetonLoader(built(3), 7, resident=True)
        return
    _, expected = batches(built(None), resident=True)
    _, found = batches(built(3), resident=True)
    assert all(torch.equal(a, b) for mine, theirs in zip(found, expected) for a, b in zip(mine, theirs))


def test_headers_names_and_lists_are_those_of_one_file(built, tmp_path):
    one, several = built(None), built(3)
    mine, theirs = read_header(several), read_header(one)
    for name in ("num_samples", "fields", "layout", "storage", "channels", "resolution", "max_resolution", "classes"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("samples", "counts", "source_formats", "unlabelled"):
        assert mine.manifest[name] == theirs.manifest[name], name
    assert mine.file_bytes == mine.manifest["bytes"] == sum(file.stat().st_size for file in files_of(several))
    assert read_names(several, range(49)) == read_names(one, range(49))
    assert Samples.read(mine).fingerprint() == Samples.read(theirs).fingerprint()
    for lines in ("class0/000.jpg\ntrain/class2/005\n", "3\n17\n40\n"):
        (tmp_path / "list.txt").write_text(lines)
        assert (
            read_index_list(several, tmp_path / "list.txt").tolist()
            == read_index_list(one, tmp_path / "list.txt").tolist()
        )
    (tmp_path / "list.txt").write_text("49\n")
    with pytest.raises(UserError, match="is no index of"):
        read_index_list(several, tmp_path / "list.txt")


def test_a_set_is_inspected_drawn_and_verified(built, fastssl, tmp_path):
    several = built(3)
    code, out, _ = fastssl("inspect", several, "--verify", "--sheet", tmp_path / "sheet.png")
    assert code == 0 and "in 3 shards" in out and "All 48 samples decode and match their checksums." in out
    draw_sheet(built(None), tmp_path / "one.png")
    mine, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("sheet", "one"))
    assert np.array_equal(mine[TITLE_HEIGHT:], theirs[TITLE_HEIGHT:])  # all but the name of the file


def test_a_pattern_that_the_shell_has_replaced_is_explained(built, fastssl):
    code, _, err = fastssl("inspect", *files_of(built(3)))
    assert code == 2 and "names of several shards" in err and "hint: put the pattern in quotes" in err


def test_damage_is_found_in_its_shard(source, fastssl, tmp_path):
    build_beton("imagefolder", source, tmp_path, canvas=32, shards=3, workers=1)
    path = beton_file(tmp_path, "train")
    part = read_header(path).parts[1]
    row = int(np.searchsorted(Samples.read(read_header(path)).rows.start_B, part.start)) + 2
    samples = Samples.read(read_header(path))
    with open(part.path, "r+b") as file:
        file.seek(int(samples.rows.start_B[row]) - part.start)
        file.write(b"\xff\x00\xff")
    code, out, err = fastssl("inspect", path, "--verify")
    index = samples.rows.index_B[row]
    assert code == 2 and f"train-00001-of-00003.beton: sample 2, index {index}" in out
    assert "damaged: 1 of 48 samples" in err
    assert samples.describe(row).startswith(f"{part.path}: the sample with index {index} (train/class")


def test_each_file_of_a_set_takes_one_range_of_addresses(built):
    path = built(3)
    before = used_mappings()
    whole, parts = map_file(path), read_header(path).parts
    assert used_mappings() - before <= 4
    for part in parts:
        assert np.array_equal(whole[part.start : part.start + part.size], np.fromfile(part.path, np.uint8))
        assert part.start % (1 << 23) == 0


def test_more_files_than_linux_maps_are_refused(built, monkeypatch):
    path = built(3)
    needed = used_mappings() + 3 + SPARE_MAPPINGS
    monkeypatch.setattr("fastssl.beton.parts.most_mappings", lambda: needed + 100)
    assert len(map_file(path))
    monkeypatch.setattr("fastssl.beton.parts.most_mappings", lambda: needed - 100)
    with pytest.raises(UserError, match=r"has 3 files.*sysctl -w vm\.max_map_count=\d+;"):
        map_file(path)


def test_sets_are_mapped_until_linux_refuses_and_the_process_goes_on(built):
    """The same shard is mapped in place of others: opening so many is what takes the time."""
    script = """
import sys
from pathlib import Path
from fastssl.beton.parts import SPARE_MAPPINGS, map_file
files = [Path(sys.argv[1])] * 16_384
kept = []
try:
    while True:
        kept.append(map_file(Path("x/train-*-of-16384.beton"), files))
except Exception as error:
    print(len(kept), type(error).__name__, error)
"""
    file = built(3).parent / "train-00000-of-00003.beton"
    run = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True)
    sets = (most_mappings() - SPARE_MAPPINGS) // 16_384
    assert run.stdout.startswith(f"{sets} UserError x/train-*-of-16384.beton has 16,384 files"), run.stdout


def test_a_set_without_manifests_is_evaluated_too(source, tmp_path):
    build_beton("imagefolder", source, tmp_path, canvas=32, shards=3, workers=1)
    path = beton_file(tmp_path, "train")
    with_manifests = BetonSubset(path).describe()
    (tmp_path / "train-of-00003.beton.json").unlink()
    assert BetonSubset(path).describe() == with_manifests
    (tmp_path / "train-00001-of-00003.beton.json").unlink()
    without = BetonSubset(path).describe()
    assert without["images"] == 48 and without["checksum"] != with_manifests["checksum"]


def test_a_split_whose_name_begins_with_another_is_not_mistaken_for_it(source, tmp_path):
    splits = ["train", "train-extra", "test-hard"] * 4
    rows = [f"train/class{number % 3}/{number:03}.jpg,{split}" for number, split in enumerate(splits)]
    (tmp_path / "list.csv").write_text("\n".join(["path,split", *rows]))
    shutil.copytree(source / "train", tmp_path / "train")
    build_beton("csv", tmp_path / "list.csv", tmp_path / "out", canvas=32, shards=2, workers=1)
    assert read_header(beton_file(tmp_path / "out", "train")).num_samples == 4
    assert read_header(beton_file(tmp_path / "out", "train-extra")).num_samples == 4
    assert not has_split(tmp_path / "out", "test") and has_split(tmp_path / "out", "test-hard")
    (tmp_path / "out/train-00001-of-00002.beton").unlink()
    with pytest.raises(UserError, match="1 of the 2 shards"):
        read_header(beton_file(tmp_path / "out", "train"))


def test_the_quasi_random_order_is_that_of_the_pages_so_its_position_is_too(built):
    one, _ = batches(built(None), shuffle="quasi_random")
    other, found = batches(built(3), shuffle="quasi_random")
    assert len(found) == 6
    with pytest.raises(UserError, match="does not hold the images that the run has read so far"):
        other.load_state_dict(one.state_dict())


# -- building -------------------------------------------------------------------------------------


def test_every_image_is_in_one_shard():
    for samples in (8, 9, 1000, 1_281_167):
        for shards in (1, 3, 8):
            bounds = [Shard(number, shards).bounds(samples) for number in range(shards)]
            assert bounds[0].start == 0 and bounds[-1].stop == samples
            assert all(one.stop == other.start for one, other in zip(bounds, bounds[1:]))
            assert max(each.stop - each.start for each in bounds) - min(each.stop - each.start for each in bounds) <= 1


def test_shards_of_separate_builds_are_those_of_one_build(source, tmp_path, fastssl):
    """In any order; what each of them prints accounts for every image."""
    build_beton("imagefolder", source, tmp_path / "together", canvas=32, shards=3, workers=1)
    for number in (2, 0, 1):
        options = ("--canvas", 32, "--shards", 3, "--shard", number, "--workers", 1)
        if number == 1:
            with pytest.raises(UserError, match="1 of the 3 shards of .* are missing: 1"):
                read_header(beton_file(tmp_path / "apart", "train"))
        code, out, _ = fastssl("build-beton", "imagefolder", "--source", source, "--out", tmp_path / "apart", *options)
        assert code == 0 and f"train-0000{number}-of-00003.beton holds" in out
        said = re.search(r"Of 61 images: (\d+) stored,(?: (1) bad,)? (\d+) in other shards\.", out)
        assert sum(int(each or 0) for each in said.groups()) == 61
    assert content(tmp_path / "apart") == content(tmp_path / "together")
    bad = [file for file in content(tmp_path / "apart") if file.startswith("bad_images")]
    assert len(bad) == 1 and json.loads((tmp_path / "apart" / bad[0]).read_text())["name"] == "train/class1/bad.jpg"

    code, out, _ = fastssl("build-beton", "imagefolder", "--source", source, "--out", tmp_path / "apart", *options[:4])
    assert "train-*-of-00003.beton holds 48 images of 3 classes" in out and "(up to date" in out


BUILD = """
import sys
from pathlib import Path
from fastssl.beton import build_beton, partial_build, pool

partial_build.SAVE_EVERY = 0.0
pool.TASKS_PER_WORKER = 2
if __name__ == "__main__":
    source, out, shard = sys.argv[1:]
    build_beton("imagefolder", Path(source), Path(out), canvas=192, shards=3, shard=int(shard), workers=1)
"""


def test_shards_built_concurrently_killed_and_repeated_are_those_built_in_turn(forty_photos, tmp_path):
    out, script = tmp_path / "out", tmp_path / "build.py"
    script.write_text(BUILD)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(12):
        for photo in sorted(forty_photos.glob("*/*.jpg")):
            os.link(photo, many / f"{number}-{photo.parent.name}-{photo.name}")

    def start(shard):
        return subprocess.Popen([sys.executable, script, many, out, str(shard)], start_new_session=True)

    builds = [start(shard) for shard in range(3)]
    rows = out / "train-00001-of-00003.beton.part" / "rows"
    deadline = time.time() + 120
    while builds[1].poll() is None and not (rows.exists() and rows.stat().st_size):
        assert time.time() < deadline
        time.sleep(0.02)
    assert builds[1].poll() is None  # it has work left
    os.killpg(builds[1].pid, signal.SIGKILL)
    builds[1].wait()
    assert not (out / "train-00001-of-00003.beton").exists()
    builds.append(start(1))
    assert [build.wait(120) for build in builds] == [0, -signal.SIGKILL, 0, 0]
    build_beton("imagefolder", many, tmp_path / "in_turn", canvas=192, shards=3, workers=2)
    lists = [content(tmp_path / name / "list-of-00003") for name in ("out", "in_turn")]
    assert lists[0] == lists[1] and lists[0]["train.jsonl"].count(b"\n") == 480  # they shared one list
    assert content(out) == content(tmp_path / "in_turn")


def test_another_machine_may_have_the_source_elsewhere(source, tmp_path, fastssl):
    (tmp_path / "mount").symlink_to(source)
    for number, where in enumerate((source, tmp_path / "mount")):
        build_beton("imagefolder", where, tmp_path / "out", canvas=32, shards=2, shard=number, workers=1)
    assert read_header(beton_file(tmp_path / "out", "train")).num_samples == 48
    report = build_beton("imagefolder", source, tmp_path / "out", canvas=32, shards=2, workers=1)
    assert all(split.up_to_date for split in report.splits)


def test_a_shard_of_bad_images_alone_is_named(source, tmp_path):
    with pytest.raises(UserError) as error:
        build_beton("imagefolder", source / "train", tmp_path, canvas=32, shards=49, workers=1)
    assert re.match("None of the 1 images of the shard train-000..-of-00049 could be read", error.value.message)
    assert "bad_images-000" in error.value.hint and error.value.hint.endswith("or use fewer --shards")


def test_an_estimate_is_of_the_shards(source, tmp_path):
    def estimate(**options):
        return estimate_build("imagefolder", source, tmp_path, BuildOptions(canvas=32, workers=1, **options)).splits[0]

    one, all_of_them, third = estimate(), estimate(shards=3), estimate(shards=3, shard=2)
    assert all_of_them.path.name == "train-*-of-00003.beton" and third.path.name == "train-00002-of-00003.beton"
    assert (one.images, all_of_them.images, third.images) == (49, 49, 17)
    build_beton("imagefolder", source, tmp_path, canvas=32, shards=3, workers=1)
    real = read_header(beton_file(tmp_path, "train")).file_bytes
    assert all_of_them.bytes == pytest.approx(real, rel=0.02) and third.bytes < one.bytes
    options = BuildOptions(canvas=32, workers=1, shards=300)
    many = estimate_build("imagefolder", source, tmp_path / "x", options, images=61_000_000).splits[0]
    assert many.images == 49_000_000  # 49 of 61 are for training
    assert many.bytes == pytest.approx(49e6 * (32 * 32 * 3 + 48 + 24), rel=0.02) and many.seconds > 1000 * one.seconds
    with pytest.raises(UserError, match="--shards 300 are more than"):
        estimate_build("imagefolder", source, tmp_path / "x", BuildOptions(canvas=32, workers=1, shards=300))


def test_a_folder_holds_a_split_once(source, tmp_path):
    build_beton("imagefolder", source, tmp_path / "one", canvas=32, workers=1)
    with pytest.raises(UserError, match="train.beton exists, and a folder holds the split 'train' once"):
        build_beton("imagefolder", source, tmp_path / "one", canvas=32, shards=3, workers=1)
    build_beton("imagefolder", source, tmp_path / "three", canvas=32, shards=3, workers=1)
    for shards in (None, 2):
        with pytest.raises(UserError, match=r"train-\*-of-00003.beton exists"):
            build_beton("imagefolder", source, tmp_path / "three", canvas=32, shards=shards, workers=1)
    shutil.copy(tmp_path / "one/train.beton", tmp_path / "three/train.beton")
    with pytest.raises(UserError, match=r"holds train.beton and train-\*-of-00003.beton"):
        beton_file(tmp_path / "three", "train")


def test_shards_in_several_folders_are_named_by_a_list(built, fastssl, tmp_path):
    pattern, listed = built(3), tmp_path / "photos.shards"
    (tmp_path / "disk2").mkdir()
    for file in pattern.parent.glob("train-00001-*"):
        shutil.copy(file, tmp_path / "disk2")
    first, _, third = files_of(pattern)
    listed.write_text(f"# shards\n{first}\n\n disk2/train-00001-of-00003.beton\r\n{third}")
    assert is_set(listed) and exists(listed) and split_of(listed) == "photos"
    _, expected = batches(pattern)
    _, found = batches(listed)
    assert all(torch.equal(a, b) for mine, theirs in zip(found, expected) for a, b in zip(mine, theirs))
    assert Samples.read(read_header(listed)).fingerprint() == Samples.read(read_header(pattern)).fingerprint()
    assert data_checksum(read_header(listed)) == data_checksum(read_header(pattern))
    assert read_names(listed, range(49)) == read_names(pattern, range(49))
    code, out, _ = fastssl("inspect", listed, "--verify", "--workers", 1)
    assert code == 0 and "in 3 shards" in out and "All 48 samples decode and match" in out


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "names no files"),
        (b"# none\n", "names no files"),
        (b"\xff", "it is no UTF-8 text"),
        (b"a.beton\n/etc/passwd", "Line 2 of .*, '/etc/passwd', is not the path of a .beton"),
        (b"a\0.beton", "is not the path of a .beton"),
        (b"missing.beton", "No file .*missing.beton"),
        (b"~nosuchuser/x.beton", "No file .*~nosuchuser/x.beton"),
    ],
)
def test_a_wrong_list_of_shards_is_refused(content, message, tmp_path):
    listed = tmp_path / "x.shards"
    with pytest.raises(UserError, match="No file .*x.shards"):
        read_header(listed)
    listed.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(listed)


def test_an_index_that_a_limit_left_out_has_that_reason(source, tmp_path):
    for name, shards in (("one", None), ("three", 3)):
        build_beton("imagefolder", source, tmp_path / name, canvas=32, limit=11, shards=shards, workers=1)
    index_N = read_metadata(beton_file(tmp_path / "one", "train"))["index"]
    absent = next(index for index in range(48, -1, -1) if index not in index_N)
    said = []
    for name in ("one", "three"):
        (tmp_path / "list.txt").write_text(f"{absent}\n")
        with pytest.raises(UserError, match="it was left out by --limit 11, or bad"):
            read_index_list(beton_file(tmp_path / name, "train"), tmp_path / "list.txt")
        (tmp_path / "list.txt").write_text("49\n")
        with pytest.raises(UserError, match="is no index of .*") as error:
            read_index_list(beton_file(tmp_path / name, "train"), tmp_path / "list.txt")
        said.append(error.value.hint)
    assert said == ["write indices from 0 to 48"] * 2


def test_inspect_takes_a_folder(built, fastssl):
    for shards in (None, 3):
        code, out, _ = fastssl("inspect", built(shards).parent)
        assert code == 0 and built(shards).name in out


def test_files_that_do_not_belong_together_are_refused(source, forty_photos, tmp_path):
    for name, images, canvas in (("a", source, 32), ("b", source, 40), ("c", forty_photos, 32)):
        build_beton("imagefolder", images, tmp_path / name, canvas=canvas, shards=3, workers=1)
    for other, what in (("b", "canvas"), ("c", "classes")):
        mixed = tmp_path / f"mixed-{other}"
        shutil.copytree(tmp_path / "a", mixed)
        (mixed / "train-of-00003.beton.json").unlink()
        for file in (tmp_path / other).glob("train-00002-*"):
            shutil.copy(file, mixed)
        if other == "b":  # the same images
            with pytest.raises(UserError, match=f"are of different builds: they have another {what}"):
                read_header(beton_file(mixed, "train"))
        else:
            with pytest.raises(UserError, match="hold an image with the index|of different builds"):
                read_header(beton_file(mixed, "train"))
    (tmp_path / "a/train-of-00003.beton.json").unlink()
    shutil.copy(tmp_path / "a/train-00000-of-00003.beton", tmp_path / "a/train-00002-of-00003.beton")
    with pytest.raises(UserError, match="Two files of .* hold an image with the index"):
        read_header(beton_file(tmp_path / "a", "train"))
    (tmp_path / "a/train-00002-of-00003.beton").unlink()
    with pytest.raises(UserError, match="1 of the 3 shards of .* are missing: 2"):
        read_header(beton_file(tmp_path / "a", "train"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shards": 0}, "--shards must be from 1"),
        ({"shard": 0}, "--shard needs --shards"),
        ({"shards": 3, "shard": 3}, "--shard must be from 0 to 2, got 3"),
        ({"shards": 30}, "--shards 30 are more than the 12 images of the split 'val'"),
    ],
)
def test_impossible_options_are_refused(source, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build_beton("imagefolder", source, tmp_path, canvas=32, workers=1, **options)


def test_patterns(tmp_path):
    (tmp_path / "train*.beton").touch()
    assert not is_set(tmp_path / "train*.beton") and is_set(tmp_path / "t*.beton")
    assert exists(tmp_path / "t*.beton") and not exists(tmp_path / "x*.beton")
    names = ("train.beton", "train-00001-of-00004.beton", "train-*-of-00004.beton")
    assert {split_of(tmp_path / name) for name in names} == {"train"}
    with pytest.raises(UserError, match="No file matches"):
        files_of(tmp_path / "x*.beton")


def test_a_file_that_changes_between_its_tables_and_its_pixels_is_refused(source, tmp_path, monkeypatch):
    build_beton("imagefolder", source, tmp_path, canvas=32, shards=2, workers=1)
    path = beton_file(tmp_path, "train")
    info = read_header(path)
    os.utime(files_of(path)[1])
    with pytest.raises(UserError, match="has changed since it was opened"):
        Samples.read(info)


# -- the manifest of a set ------------------------------------------------------------------------


@pytest.fixture
def three(source, tmp_path):
    """Three shards, the pattern that names them, and their manifest."""
    build_beton("imagefolder", source, tmp_path / "three", canvas=32, shards=3, workers=1)
    path = beton_file(tmp_path / "three", "train")
    return path, set_manifest_path(path)


def test_the_manifest_of_a_set_tells_what_those_of_its_shards_do(three, fastssl):
    path, manifest = three
    assert manifest.name == "train-of-00003.beton.json" and '"crc32"' not in manifest.read_text()
    info = read_header(path)
    assert [file["name"] for file in info.manifest["files"]] == [file.name for file in files_of(path)]
    for file, described in zip(files_of(path), info.manifest["files"]):
        shard = read_header(file)
        assert described["bytes"] == shard.file_bytes and described["samples"] == shard.num_samples
        assert described["checksum"] == data_checksum(shard)
    assert "train-of-00003.beton.json" in fastssl("inspect", path)[1]
    for shard in files_of(path):
        manifest_path(shard).rename(shard.with_suffix(".moved"))
    assert read_header(path).manifest == info.manifest  # no other manifest is read
    for shard in files_of(path):
        shard.with_suffix(".moved").rename(manifest_path(shard))
    manifest.unlink()
    assert read_header(path) == info and data_checksum(read_header(path)) == data_checksum(info)
    assert "of each shard" in fastssl("inspect", path)[1]
    one = read_header(path.with_name("train-0000*-of-00003.beton"))  # a pattern of one's own for the same files
    assert data_checksum(one) == data_checksum(info)


def test_the_last_shard_to_be_built_writes_the_manifest_of_the_set(three, source, tmp_path):
    path, manifest = three
    whole = manifest.read_bytes()
    out = tmp_path / "apart"
    for number in (1, 2, 0):
        assert not (out / manifest.name).exists()
        build_beton("imagefolder", source, out, canvas=32, shards=3, shard=number, workers=1)
    assert (out / manifest.name).read_bytes() == whole
    (out / manifest.name).unlink()
    build_beton("imagefolder", source, out, canvas=32, shards=3, shard=1, workers=1)  # up to date
    assert (out / manifest.name).read_bytes() == whole


def test_the_manifest_of_a_set_goes_before_a_shard_is_replaced(three, source, monkeypatch):
    path, manifest = three
    seen, replace = [], partial_build.replace_durably

    def watched(part, final):
        seen.append(manifest.exists() and final.name.startswith("train"))
        replace(part, final)

    monkeypatch.setattr(partial_build, "replace_durably", watched)
    for number in (0, 1):
        build_beton("imagefolder", source, path.parent, canvas=40, shards=3, shard=number, workers=1)
        assert seen and not any(seen)
        assert not manifest.exists()  # the other shards are of another build
        with pytest.raises(UserError, match="of different builds: they have another canvas"):
            read_header(path)
    build_beton("imagefolder", source, path.parent, canvas=40, shards=3, shard=2, workers=1)
    assert manifest.exists() and read_header(path).resolution == (40, 40)


def test_a_manifest_of_other_shards_is_refused(three):
    path, manifest = three
    content = json.loads(manifest.read_text())

    def refuses(match, **changes):
        manifest.write_text(json.dumps({**content, **changes}))
        with pytest.raises(UserError, match=match) as error:
            read_header(path)
        assert "delete" in error.value.hint and manifest.name in str(error.value)

    files = content["files"]
    refuses("by it, train-00001-of-00003.beton has 5 bytes", files=[files[0], {**files[1], "bytes": 5}, files[2]])
    refuses("and 17 samples, but", files=[files[0], {**files[1], "samples": 17}, files[2]])
    refuses("or their names differ", files=[files[1], files[0], files[2]])
    refuses("names 2 files with 48 samples, and there are 3", files=files[:2])
    refuses("names 3 files with 47 samples, and there are 3 with 48", samples=47)
    for damage in ({"files": None}, {"files": [{**files[0], "checksum": "x"}]}, {"files": [{**files[0], "bytes": -1}]}):
        refuses("is damaged", **damage)
    for text in ("", "[]", "{}", "[" * 100_000):
        manifest.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_header(path)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(UserError, match="is damaged"):
        read_header(path)


def test_a_shard_of_the_same_size_from_another_build_is_found_by_verify(three, source, tmp_path, fastssl):
    path, _ = three
    shutil.copytree(source, tmp_path / "other")
    for photo in (tmp_path / "other/train").glob("*/*.jpg"):
        if photo.name != "bad.jpg":
            Image.open(photo).rotate(180).save(photo)
    build_beton("imagefolder", tmp_path / "other", tmp_path / "b", canvas=32, shards=3, workers=1)
    for file in (tmp_path / "b").glob("train-00002-*"):
        shutil.copy(file, path.parent)
    assert read_header(path).num_samples == 48
    code, out, err = fastssl("inspect", path, "--verify", "--workers", 1)
    assert code == 2 and "train-00002-of-00003.beton: has other checksums than train-of-00003.beton.json" in out
    assert "is damaged: 1 shard of another build" in err


def test_a_shard_with_other_labels_is_refused(three, source, tmp_path):
    """Files of pixels of one size have the same size, whatever they show."""
    path, manifest = three
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other/train/class0").rename(tmp_path / "other/train/a")
    (tmp_path / "other/train/class2").rename(tmp_path / "other/train/class0")
    (tmp_path / "other/train/a").rename(tmp_path / "other/train/class2")
    build_beton("imagefolder", tmp_path / "other", tmp_path / "b", canvas=32, shards=3, workers=1)
    name = "train-00002-of-00003.beton"
    assert (tmp_path / "b" / name).stat().st_size == (path.parent / name).stat().st_size
    shutil.copy(tmp_path / "b" / name, path.parent)
    with pytest.raises(UserError, match=f"{name} is not the shard that {manifest} names: it has other labels"):
        read_header(path)


@pytest.mark.parametrize("damage", [lambda text: "{", lambda text: text.replace('"class0"', '"classX"')])
def test_a_manifest_of_a_set_that_is_not_true_is_written_again(damage, three, source):
    path, manifest = three
    whole = manifest.read_text()
    manifest.write_text(damage(whole))
    assert manifest.read_text() != whole
    report = build_beton("imagefolder", source, path.parent, canvas=32, shards=3, workers=1)
    assert all(split.up_to_date for split in report.splits) and manifest.read_text() == whole
    at = manifest.stat().st_mtime_ns
    build_beton("imagefolder", source, path.parent, canvas=32, shards=3, workers=1)
    assert manifest.stat().st_mtime_ns == at


# -- training -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("default_signals")
def test_a_run_on_shards_has_the_weights_of_one_on_the_file_and_resumes_on_either(source, tmp_path, at_step):
    """21 steps on one file, on shards, and with a stop after which the shards take the place of the file."""
    for shards in (None, 3):
        build_beton("imagefolder", source, tmp_path / f"data-{shards}", canvas=32, shards=shards, workers=1)

    def run(name, shards, *more, resume=None):
        data = tmp_path / f"data-{shards}"
        settings = small(data, tmp_path / name, f"data.train={data}", f"data.val={data}", "train.epochs=7", *more)
        train(load_recipe("zprob_barlow", settings), resume=resume)

    run("one", None)
    run("three", 3)
    at_step(9, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        run("moved", None)
    at_step(-1, None)
    (tmp_path / "data-None").rename(tmp_path / "gone")
    (tmp_path / "data-3").rename(tmp_path / "data-None")  # what the run calls data.train
    run("moved", None, resume="auto")
    saved = [torch.load(tmp_path / run / "checkpoints/last.pt", weights_only=True) for run in ("one", "three", "moved")]
    assert [each["step"] for each in saved] == [21, 21, 21]
    for other in saved[1:]:
        assert all(torch.equal(saved[0]["model"][name], x) for name, x in other["model"].items())


def test_a_position_goes_on_in_other_files_and_other_numbers_of_processes(built):
    """From one file to shards, from shards to shards and back, each time with one process and with two."""

    def loaders(shards, world):
        path = built(shards)
        crop = "gpu" if read_header(path).resolution else "cpu"
        made = [BetonLoader(path, 8 // world, crop=crop, views=VIEWS, seed=5, workers=1) for _ in range(world)]
        for rank, loader in enumerate(made):
            loader.rank, loader.world = rank, world
        return made

    def take(loaders, state, count):
        """The indices of the next global batches, and the state after them."""
        shares = []
        for loader in loaders:
            loader.load_state_dict(state) if state else None
            shares.append([batch.index.tolist() for batch in itertools.islice(loader, count)])
        return [sum(parts, []) for parts in zip(*shares, strict=True)], loaders[0].state_dict()

    straight, _ = take(loaders(None, 1), None, 6)
    found, state = [], None
    for shards, world in ((None, 1), (3, 2), (8, 1), (None, 2), (3, 1)):
        batches, state = take(loaders(shards, world), state, 1)
        found += batches
    assert found == straight[:5] and state["position"] == 40
