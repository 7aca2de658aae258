"""Very large sets of shards: with a lowered threshold, small ones are read as sets of a billion samples are."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import small

from fastssl.beton import beton_file, build_beton, mapped, read_header
from fastssl.beton.format import ALLOCATION, HEADER
from fastssl.beton.mapped import MappedTables
from fastssl.beton.shards import set_manifest_path
from fastssl.beton.tables import read_file_header
from fastssl.common.errors import Stopped, UserError
from fastssl.loading import BetonLoader, SampleSelection, estimate_memory
from fastssl.loading.order import Count, Drawn, epoch_order
from fastssl.loading.samples import Samples
from fastssl.recipe import ViewsConfig, load_recipe
from fastssl.training import train

LAYOUTS = {
    "raw": {"canvas": 32},
    "jpeg": {"canvas": 40, "codec": "jpeg"},
    "bc4": {"canvas": 96},
    "full": {"max_side": 500},
}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VIEWS = ViewsConfig(size=24)
THRESHOLD = 10


@pytest.fixture(scope="module", params=LAYOUTS)
def built(request, photos, tmp_path_factory):
    """48 photographs in five shards."""
    out = tmp_path_factory.mktemp("mapped")
    build_beton("imagefolder", photos, out, shards=5, workers=1, **LAYOUTS[request.param])
    return beton_file(out, "train")


@pytest.fixture(scope="module")
def raw(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("mapped_raw")
    build_beton("imagefolder", photos, out, shards=5, workers=1, canvas=32)
    return beton_file(out, "train")


@pytest.fixture
def lowered(monkeypatch):
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loader_of(path, **options):
    crop = "gpu" if read_header(path).resolution else "cpu"
    return BetonLoader(path, 7, crop=crop, views=VIEWS, seed=5, workers=2, **options)


def assert_same_batches(one, other):
    mine, theirs = ([batch.tensors() for batch in loader] for loader in (one, other))
    assert len(mine) == len(theirs) >= 2
    assert all(torch.equal(a, b) for batches in zip(mine, theirs) for a, b in zip(*batches))


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": False}, {"shuffle": "quasi_random", "drop_last": False}, {"selection": SampleSelection(limit=30)}],
)
def test_batches_are_those_of_arrays(built, monkeypatch, options):
    """In the same order: the loader that holds arrays makes its order after the threshold is lowered."""
    with_arrays = loader_of(built, **{**options, "selection": SampleSelection()})
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)
    from_files = loader_of(built, **options)
    assert from_files.samples.is_mapped and not with_arrays.samples.is_mapped
    with_arrays.rows = options.get("selection", SampleSelection()).rows(with_arrays.samples)
    assert type(from_files.rows) is (Drawn if "selection" in options else Count)
    assert_same_batches(with_arrays, from_files)
    estimates = [estimate_memory(loader)["table of samples"] for loader in (with_arrays, from_files)]
    assert estimates == [48 * 65, 0]


def test_headers_are_those_of_arrays(built, monkeypatch):
    with_arrays = read_header(built)
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)
    from_files = read_header(built)
    assert isinstance(from_files.tables, MappedTables)
    names = "path parts num_samples page_size fields layout storage channels resolution classes metadata_bytes manifest"
    for name in names.split():
        assert getattr(from_files, name) == getattr(with_arrays, name), name
    assert from_files.max_resolution >= with_arrays.max_resolution


def test_a_set_without_its_manifest_is_read_at_once(raw, lowered, tmp_path):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    set_manifest_path(path).unlink()
    with pytest.warns(UserWarning, match="has 48 images, whose tables take .*train-of-00005.beton.json is missing"):
        loader = loader_of(path)
    assert not loader.samples.is_mapped
    assert_same_batches(loader, loader_of(raw))
    with pytest.raises(UserError, match="in their order and, above 10 images, in the same shards with the manifest"):
        loader_of(raw).load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match="has 19 images, whose tables take .*name the whole set"):
        read_header(path.with_name("train-0000[12]*.beton"))


def test_selections_are_those_of_arrays(raw, monkeypatch, tmp_path):
    """Where few are selected; of many, `limit` takes the first of another draw, and `skip` the others."""
    index_N = Samples.read(read_header(raw)).rows.index_B
    (tmp_path / "list.txt").write_text("\n".join(map(str, index_N[[3, 40, 7, 21, 22, 23, 30]])))
    subset = SampleSelection(subset=tmp_path / "list.txt")
    with_arrays = loader_of(raw, selection=subset)
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)
    from_files = loader_of(raw, selection=subset)
    assert from_files.samples.is_mapped and from_files.rows.tolist() == with_arrays.rows.tolist()
    for path_labels in (subset.labels(raw), SampleSelection(limit=30).labels(raw)):
        assert set(path_labels.tolist()) <= {0, 1, 2} and len(path_labels) in (7, 30)

    samples = from_files.samples
    first, rest = (SampleSelection(**each).rows(samples) for each in ({"limit": 20}, {"skip": 20}))
    rows = [rows[np.arange(len(rows))].tolist() for rows in (first, rest)]
    assert sorted(rows[0] + rows[1]) == list(range(48)) and [len(each) for each in rows] == [20, 28]
    few = SampleSelection(limit=5).rows(samples)
    assert few.tolist() == sorted(rows[0][:5])
    assert SampleSelection(limit=20).count(raw) == 20
    for order in (False, "quasi_random"):
        with pytest.raises(UserError, match="data.limit leaves 20 images .*order depends: leave out data.limit"):
            loader_of(raw, selection=SampleSelection(limit=20), shuffle=order)
    assert len(loader_of(raw, selection=SampleSelection(limit=8), shuffle=False)) == 1


def test_a_resident_set_is_the_same(raw, monkeypatch):
    with_arrays = loader_of(raw, resident=True)
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)
    assert_same_batches(with_arrays, loader_of(raw, resident=True))


def test_a_position_is_restored_and_other_files_are_refused(raw, lowered, tmp_path, photos):
    for order in (True, "quasi_random"):
        loader, other = (loader_of(raw, shuffle=order) for _ in range(2))
        batches = [batch.index.tolist() for batch in loader]
        loader.set_epoch(0)
        iterator = iter(loader)
        first = [next(iterator).index.tolist() for _ in range(2)]
        other.load_state_dict(loader.state_dict())
        assert first + [batch.index.tolist() for batch in other] == batches
    build_beton("imagefolder", photos, tmp_path, shards=5, workers=1, canvas=40)
    with pytest.raises(UserError, match="does not hold the images that the run has read so far"):
        loader_of(beton_file(tmp_path, "train"), shuffle="quasi_random").load_state_dict(loader.state_dict())


def in_one_line(text):
    """Lines wrap where the path of a temporary folder is long."""
    return " ".join(text.split())


def test_a_list_names_samples_and_inspect_says_what_it_does_not_show(raw, monkeypatch, tmp_path, fastssl):
    (tmp_path / "list.txt").write_text("3\n17\n40\n")
    (tmp_path / "wrong.txt").write_text("3\n1000\n")
    shown = in_one_line(fastssl("inspect", raw, "--subset", tmp_path / "list.txt")[1])
    monkeypatch.setattr(mapped, "MOST_IN_MEMORY", THRESHOLD)
    code, out, _ = fastssl("inspect", raw, "--subset", tmp_path / "list.txt")
    out = in_one_line(out)
    names = "list.txt names 3 of 48 images"
    assert code == 0 and out[out.index(names) :] == shown[shown.index(names) :]
    assert "Sizes and classes are not shown" in out and "samples per class: " not in out[: out.index(names)]
    code, _, err = fastssl("inspect", raw, "--subset", tmp_path / "wrong.txt")
    assert code == 2 and "is no index of" in err
    code, out, _ = fastssl("inspect", raw, "--verify", "--batch-size", 8)
    assert code == 0 and "All 48 samples decode" in out


@pytest.mark.filterwarnings("ignore:.*GB of memory are free")
def test_seventeen_million_samples_are_opened_without_reading_their_tables(tmp_path):
    """Files with holes, of 54 GB: only rows of the first batches are in them, so that reading others would fail."""
    billion = load_script("billion_samples")
    path = billion.fabricate(tmp_path / "data", 17_000_000)
    for order in (True, "quasi_random"):
        loader = BetonLoader(path, billion.BATCH, seed=0, shuffle=order)
        assert loader.samples.is_mapped and len(loader) == 17_000_000 // billion.BATCH
        row_B = loader.rows[epoch_order(loader.order, 0, 0, loader.samples, loader.rows)[np.arange(billion.BATCH)]]
        batch = next(iter(loader))
        assert batch.index.tolist() == row_B.tolist() and len(set(row_B // 1_000_000)) > 5
        assert batch.label.tolist() == (row_B % billion.CLASSES).tolist() and not batch.image.any()
        with pytest.raises(UserError, match="is damaged at its sample"):
            loader.samples.at(np.array([8_000_000]))


# -- damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "a pointer outside of the file": ("image.data_ptr", 1 << 40, "points at data that is not its own"),
    "the data of another sample": ("image.data_ptr", None, "points at data that is not its own"),
    "both pointers outside": ("ptr", 1 << 40, "points at data outside of the file"),
    "both pointers at the tables": ("ptr", 0, "points at data outside of the file"),
    "an allocation of another sample": ("sample_id", 3, "points at data that is not its own"),
    "another size": ("size", 3000, "does not fit their height and width"),
    "an enormous size": ("size", 1 << 63, "points at data outside of the file"),
    "no bytes": ("size", 0, "images without pixels"),
    "a larger side": ("image.height", 60_000, "has another size than its manifest says"),
    "another mode": ("image.mode", 0, "not stored as its manifest says"),
    "an unknown label": ("label", 3, "its label is that of no class"),
    "a negative index": ("index", -1, "its index is negative"),
    "a source without pixels": ("height", 0, ": its source cannot have a height of 0 px"),
}


def change_row(file, row, name, value):
    """Change a value in the metadata or the allocation of a sample."""
    header = read_file_header(file)
    content = np.memmap(file, np.uint8, mode="r+")
    metadata = content[header.metadata_start : header.metadata_end].view(mapped.metadata_type(header.field_types))
    allocations = content[header.table_start :].view(ALLOCATION)
    if name == "ptr":
        allocations["ptr"][row] = metadata["image"]["data_ptr"][row] = value
    elif name in ("sample_id", "size"):
        allocations[name][row] = value
    elif name.startswith("image."):
        column = metadata["image"][name.removeprefix("image.")]
        column[row] = column[row + 1] if value is None else value
    else:
        metadata[name][row] = value
    content.flush()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_refused_when_its_batch_is_read(raw, lowered, tmp_path, damage):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    name, value, message = DAMAGE[damage]
    change_row(path.with_name("train-00002-of-00005.beton"), 4, name, value)
    loader = loader_of(path, shuffle=False)
    batches = []
    with pytest.raises(UserError, match=rf"train-00002-of-00005.beton is damaged at its sample 4.*{message}"):
        for batch in loader:
            batches.append(batch)
    assert len(batches) == 2  # of seven samples: the row is in the fourth one, which is started before the third ends


@pytest.mark.parametrize("kind", ["cut off", "header", "other fields", "empty", "gone", "longer"])
def test_a_damaged_file_is_refused_when_the_set_is_opened(raw, lowered, tmp_path, kind):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    file = path.with_name("train-00002-of-00005.beton")
    if kind == "cut off":
        os.truncate(file, file.stat().st_size - 24)
    elif kind == "longer":
        with open(file, "ab") as out:
            out.write(bytes(24))
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "gone":
        file.unlink()
    else:
        with open(file, "r+b") as out:
            out.seek(0 if kind == "header" else HEADER.itemsize)
            out.write(b"\x09\x09")
    with pytest.raises(UserError, match="train-00002-of-00005.beton|1 of the 5 shards"):
        read_header(path)


@pytest.mark.parametrize(
    "key, value",
    [("canvas", 16), ("canvas", 0), ("canvas", None), ("canvas", 1 << 40), ("storage", "bc4"), ("storage", None),
     ("classes", ["a"]), ("layout", "full"), ("samples", 47), ("files", [])],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(raw, lowered, tmp_path, key, value):
    """When the set is opened, or by the first batch: what it says decides over memory."""
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    where = set_manifest_path(path)
    where.write_text(json.dumps({**json.loads(where.read_text()), key: value}))
    with pytest.raises(UserError, match="train-of-00005.beton.json|manifest"):
        next(iter(loader_of(path)))


def test_a_file_that_was_replaced_is_refused(raw, lowered, tmp_path):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    info = read_header(path)
    os.utime(path.with_name("train-00002-of-00005.beton"))
    with pytest.raises(UserError, match="has changed since it was opened"):
        Samples.read(info)


@pytest.mark.parametrize("kind", ["shorter", "gone", "of another build"])
def test_a_file_that_was_replaced_is_not_read_for_a_list(raw, lowered, tmp_path, kind):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    loader = loader_of(path)
    file = path.with_name("train-00001-of-00005.beton")
    file.unlink()
    if kind != "gone":
        file.write_bytes(b"" if kind == "shorter" else path.with_name("train-00002-of-00005.beton").read_bytes())
    with pytest.raises(UserError, match="train-00001-of-00005.beton has changed since it was opened"):
        list(loader.samples.index_pieces())


def test_a_broken_link_among_shards_is_explained(raw, tmp_path, fastssl):
    shutil.copytree(raw.parent, tmp_path / "data")
    path = beton_file(tmp_path / "data", "train")
    file = path.with_name("train-00002-of-00005.beton")
    file.rename(tmp_path / "elsewhere.beton")
    file.symlink_to(tmp_path / "away.beton")
    code, _, err = fastssl("inspect", path)
    assert code == 2 and "train-00002-of-00005.beton cannot be read (No such file or directory)" in err


# -- training -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_a_run_that_was_stopped_goes_on_with_the_same_weights(raw, lowered, tmp_path, at_step, order):
    def run(name, resume=None):
        settings = small(raw.parent, tmp_path / name, f"data.train={raw.parent}", "data.val=null")
        train(load_recipe("zprob_barlow", [*settings, "train.epochs=3", f"data.order={order}"]), resume=resume)

    run("whole")
    at_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        run("stopped")
    at_step(-1, None)
    run("stopped", resume="auto")
    saved = [torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert saved[0]["step"] == saved[1]["step"] == 9
    assert all(torch.equal(saved[0]["model"][name], x) for name, x in saved[1]["model"].items())


def test_labels_are_checked_for_a_classifier(raw, lowered, tmp_path):
    settings = small(raw.parent, tmp_path / "run", f"data.train={raw.parent}", "data.val=null", "train.epochs=1")
    train(load_recipe("supervised", [*settings, "objective.classes=3"]))
    with pytest.raises(UserError, match="objective.classes=2, but .* holds labels from 0 to 2"):
        train(load_recipe("supervised", [*settings, "objective.classes=2", f"run.dir={tmp_path}/other"]))
