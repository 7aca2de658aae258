"""The loader: pixels, order, positions, damaged samples, and no thread that hangs or stays."""

import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastssl.beton import read_metadata
from fastssl.cli import app
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader, ImageRows, SampleSelection, estimate_memory, kernels
from fastssl.loading import loader as loader_module
from fastssl.loading.order import WINDOW_PAGES, shuffled_pages
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, eval_transform

VIEWS = ViewsConfig(size=48)


def source_pixels(photos, index):
    """The pixels of a source image as Pillow decodes them; `index` is its position in the builder's order."""
    files = sorted((photos / "train").rglob("*.jpg"))
    return np.array(Image.open(files[index]))


def test_canvas_gives_the_stored_pixels_and_the_source_sizes(photos, canvas):
    seen = []
    for batch in BetonLoader(canvas / "train.beton", 8, shuffle=False):
        assert batch.image.shape == (8, 32, 32, 3) and batch.image.dtype == torch.uint8
        assert batch.valid.all()
        for b in range(8):
            source = source_pixels(photos, int(batch.index[b]))
            assert (int(batch.height[b]), int(batch.width[b])) == source.shape[:2]
            want = np.array(Image.fromarray(source).resize((32, 32), Image.BILINEAR))
            assert np.abs(batch.image[b].numpy().astype(int) - want).max() <= 1
            seen.append(int(batch.index[b]))
    assert sorted(seen) == list(range(48))


def test_canvas_of_jpegs_decodes_each_sample(photos, canvas_jpeg):
    for batch in BetonLoader(canvas_jpeg / "train.beton", 16, shuffle=False):
        for b in range(16):
            source = source_pixels(photos, int(batch.index[b]))
            want = np.array(Image.fromarray(source).resize((96, 96), Image.BILINEAR)).astype(int)
            # JPEG of quality 90 with subsampled color: a few gray levels on average.
            assert np.abs(batch.image[b].numpy() - want).mean() < 6


def test_cpu_crops_equal_the_crops_of_the_views(photos, full):
    """The same boxes and the same filter, so the same pixels up to rounding to uint8."""
    plain = ViewsConfig(
        size=48,
        flip=0,
        jitter=JitterConfig(p=0),
        gray=0,
        first=PerViewConfig(),
        second=PerViewConfig(),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    views = PairedViews(plain, seed=3)
    loader = BetonLoader(full / "train.beton", 16, seed=3, crop="cpu", views=plain)
    loader.set_epoch(5)
    for batch in loader:
        assert batch.image.shape == (16, 2, 48, 48, 3)
        for b in range(16):
            source = torch.from_numpy(source_pixels(photos, int(batch.index[b])))[None]
            want = views(source, batch.index[b : b + 1], 5)
            for view in (0, 1):
                got = batch.image[b, view].permute(2, 0, 1) / 255
                # Rounding to uint8; and Pillow may use another libjpeg.
                assert (got - want[view][0]).abs().mean() < 2 / 255


def test_a_single_crop_equals_the_first_of_two(full):
    loaders = [BetonLoader(full / "train.beton", 16, seed=3, crop="cpu", views=VIEWS, crops=n) for n in (1, 2)]
    for one, two in zip(*loaders, strict=True):
        assert one.image.shape == (16, 1, 48, 48, 3) and torch.equal(one.index, two.index)
        assert torch.equal(one.image[:, 0], two.image[:, 0])
    sizes = [estimate_memory(loader)["5 batches of 16"] for loader in loaders]
    assert sizes[1] == 2 * sizes[0] == 5 * 16 * 2 * 48 * 48 * 3


@pytest.mark.parametrize("kind", ["squash", "center"])
def test_eval_crops_equal_the_evaluation_transform(photos, full, kind):
    views = VIEWS.model_copy(update={"eval": kind})
    transform = eval_transform(views)
    for batch in BetonLoader(full / "train.beton", 16, crop="eval", views=views, shuffle=False):
        assert batch.image.shape == (16, 1, 48, 48, 3)
        for b in range(16):
            want = transform(torch.from_numpy(source_pixels(photos, int(batch.index[b])))[None])
            assert (transform(batch.image[b : b + 1]) - want).abs().mean() < 2 / 255 / min(VIEWS.std)


def indices(loader):
    return [batch.index.tolist() for batch in loader]


def test_order_is_a_function_of_seed_and_epoch(canvas):
    path = canvas / "train.beton"
    first, again, other = (BetonLoader(path, 8, seed=s) for s in (1, 1, 2))
    epochs = [indices(first), indices(first)]
    assert epochs[0] != epochs[1]
    assert sorted(sum(epochs[0], [])) == list(range(48))
    assert indices(again) == epochs[0] != indices(other)
    again.set_epoch(0)
    assert indices(again) == epochs[0]


@pytest.mark.parametrize("taken", [0, 1, 4, 6])
def test_state_continues_with_exactly_the_remaining_batches(canvas, taken):
    path = canvas / "train.beton"
    loader = BetonLoader(path, 8, seed=1)
    loader.set_epoch(2)
    whole = BetonLoader(path, 8, seed=1)
    whole.set_epoch(2)
    want = indices(whole) + indices(whole)
    batches = iter(loader)
    got = [next(batches).index.tolist() for _ in range(taken)]
    state = loader.state_dict()
    batches.close()
    resumed = BetonLoader(path, 8, seed=1)
    resumed.load_state_dict(state)
    assert got + indices(resumed) + indices(resumed) == want


def test_state_of_another_seed_is_refused(canvas):
    loader = BetonLoader(canvas / "train.beton", 8, seed=1)
    with pytest.raises(UserError, match="seed"):
        loader.load_state_dict(BetonLoader(canvas / "train.beton", 8, seed=2).state_dict())


def test_last_batch_is_filled_up_and_masked(canvas):
    loader = BetonLoader(canvas / "train.beton", 20, shuffle=True, drop_last=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 and all(len(b.image) == 20 for b in batches)
    valid = torch.cat([b.index[b.valid] for b in batches])
    assert sorted(valid.tolist()) == list(range(48))
    assert len(BetonLoader(canvas / "train.beton", 20)) == 2


def test_limit_takes_the_same_random_subset_for_every_seed(canvas):
    first, second = (
        sorted(sum(indices(BetonLoader(canvas / "train.beton", 5, seed=s, selection=SampleSelection(limit=10))), []))
        for s in (0, 1)
    )
    assert first == second and len(set(first)) == 10 and first != list(range(10))


def test_skip_continues_where_limit_ends(canvas):
    def taken(**selection):
        return sorted(sum(indices(BetonLoader(canvas / "train.beton", 1, selection=SampleSelection(**selection))), []))

    assert sorted(taken(limit=10) + taken(skip=10)) == list(range(48))
    assert sorted(taken(limit=10) + taken(skip=10, limit=20) + taken(skip=30)) == list(range(48))
    with pytest.raises(UserError, match="0 images"):
        taken(skip=48)


@pytest.fixture
def fourteen(tmp_path):
    """A list of 14 of the 48 images, not in the file's order."""
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{index}\n" for index in range(47, 5, -3)))
    return path


def test_a_subset_is_exactly_the_images_of_its_list(canvas, full, fourteen):
    listed = set(range(47, 5, -3))
    selection = SampleSelection(fourteen)
    of_canvas = BetonLoader(canvas / "train.beton", 7, selection=selection)
    of_full = BetonLoader(full / "train.beton", 7, selection=selection, crop="cpu", views=VIEWS)
    for loader in (of_canvas, of_full, BetonLoader(canvas / "train.beton", 7, selection=selection, resident=True)):
        for _ in range(2):
            assert sorted(sum(indices(loader), [])) == sorted(listed)
    whole = {int(i): image for b in BetonLoader(canvas / "train.beton", 8) for i, image in zip(b.index, b.image)}
    for batch in of_canvas:
        assert all(torch.equal(image, whole[int(index)]) for index, image in zip(batch.index, batch.image))


def test_a_selection_counts_its_samples(canvas, fourteen):
    """Without a loader, for every combination of subset, limit and skip."""
    path = canvas / "train.beton"
    for subset in (None, fourteen):
        for limit in (None, 9, 99):
            for skip in (0, 5, 13):
                selection = SampleSelection(subset, limit, skip)
                assert selection.count(path) == len(BetonLoader(path, 1, selection=selection))
    assert SampleSelection(fourteen, skip=20).count(path) == 0


def test_limit_and_skip_draw_from_the_subset(canvas, fourteen):
    def taken(limit=None, skip=0, seed=0):
        selection = SampleSelection(fourteen, limit, skip)
        return sum(indices(BetonLoader(canvas / "train.beton", 1, seed=seed, selection=selection)), [])

    assert len(taken(limit=6)) == 6 and sorted(taken(limit=6) + taken(skip=6)) == list(range(8, 48, 3))
    assert sorted(taken(limit=99)) == list(range(8, 48, 3)) and set(taken(limit=6, seed=1)) == set(taken(limit=6))


def test_a_position_in_another_subset_is_refused(canvas, fourteen, tmp_path):
    def loader(subset):
        return BetonLoader(canvas / "train.beton", 7, selection=SampleSelection(subset))

    state = loader(fourteen).state_dict()
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text("# the same images\n" + fourteen.read_text())
    other.write_text(fourteen.read_text().replace("47", "46"))
    loader(moved).load_state_dict(state)
    for subset in (other, None):
        with pytest.raises(UserError, match="does not hold the images"):
            loader(subset).load_state_dict(state)


def test_leaving_the_loop_early_ends_all_threads(canvas):
    before = threading.active_count()
    loader = BetonLoader(canvas / "train.beton", 4)
    for _ in range(5):
        for _batch in loader:
            break
    assert threading.active_count() == before


def test_the_number_of_torch_threads_does_not_change(canvas):
    before = torch.get_num_threads()
    list(BetonLoader(canvas / "train.beton", 8, workers=1))
    assert torch.get_num_threads() == before


def damaged_copy(path, tmp_path, row, damage):
    """A copy of a .beton with `damage` applied to the bytes of one row's JPEG."""
    copy = tmp_path / "damaged.beton"
    shutil.copy(path, copy)
    start = int(read_metadata(copy)["image"]["data_ptr"][row])
    data = np.memmap(copy, np.uint8, mode="r+")
    damage(data[start:])
    data.flush()
    return copy


def garbage(data):
    data[:200] = 7


def other_size(data):
    """Rewrite the JPEG's own header to half the height."""
    bytes_ = data[:2000].tobytes()
    at = next(i for i in range(len(bytes_)) if bytes_[i] == 0xFF and bytes_[i + 1] in (0xC0, 0xC2))
    data[at + 5 : at + 7] = [0, 30]


@pytest.mark.parametrize("damage", [garbage, other_size])
@pytest.mark.parametrize("crop", ["gpu", "cpu"])
def test_a_damaged_sample_is_an_error_that_names_its_index(canvas_jpeg, full, tmp_path, damage, crop):
    source = (canvas_jpeg if crop == "gpu" else full) / "train.beton"
    path = damaged_copy(source, tmp_path, 7, damage)
    index = int(read_metadata(path)["index"][7])
    with pytest.raises(UserError, match=rf"index {index}\b.*at byte"):
        list(BetonLoader(path, 8, crop=crop, views=VIEWS))


def test_a_file_of_stock_ffcv_gets_derived_ids_and_sizes(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rows = [(np.full((24, 16, 3), n, np.uint8), n % 3) for n in range(12)]
    path = tmp_path / "stock.beton"
    DatasetWriter(str(path), {"image": RGBImageField("raw"), "label": IntField()}, num_workers=1).from_indexed_dataset(
        rows
    )
    for batch in BetonLoader(path, 4):
        assert (batch.image.amax(dim=(1, 2, 3)) == batch.index).all() and (batch.label == batch.index % 3).all()
        assert (batch.height == 24).all() and (batch.width == 16).all()


def test_variable_sizes_are_refused_for_crops_on_the_device(full):
    with pytest.raises(UserError, match="data.crop=cpu"):
        BetonLoader(full / "train.beton", 8)


def test_an_unknown_order_is_refused(canvas):
    with pytest.raises(ValueError, match="quasi_random"):
        BetonLoader(canvas / "train.beton", 8, shuffle="quasi-random")


def test_a_batch_larger_than_the_data_is_refused(canvas):
    with pytest.raises(UserError, match="lower train.batch_size"):
        BetonLoader(canvas / "train.beton", 64)


def test_a_file_that_is_no_beton_is_refused(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="x.beton"):
        BetonLoader(path, 8)


@pytest.mark.parametrize("shuffle", [True, "quasi_random", False])
def test_ranks_share_one_order(canvas, shuffle):
    """Global batch b holds the same samples for 1, 2 and 4 processes; each rank has a disjoint equal part."""
    alone = indices(BetonLoader(canvas / "train.beton", 8, seed=4, shuffle=shuffle))
    for world in (2, 4):
        shares = []
        for rank in range(world):
            loader = BetonLoader(canvas / "train.beton", 8 // world, seed=4, shuffle=shuffle)
            loader.rank, loader.world = rank, world
            shares.append(indices(loader))
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone


def test_state_continues_with_another_number_of_processes(canvas):
    want = sum(indices(BetonLoader(canvas / "train.beton", 8, seed=4)), [])
    loader = BetonLoader(canvas / "train.beton", 8, seed=4)
    batches = iter(loader)
    got = [index for _ in range(2) for index in next(batches).index.tolist()]
    shares = []
    for rank in range(2):
        other = BetonLoader(canvas / "train.beton", 8, seed=4)
        other.rank, other.world = rank, 2
        other.load_state_dict(loader.state_dict())
        shares.append(indices(other))
    got += [index for parts in zip(*shares, strict=True) for part in parts for index in part]
    assert got == want


def test_quasi_random_reads_windows_of_pages_and_mixes_them():
    page_N = np.repeat(np.arange(200), 50)
    first, again, other = (shuffled_pages(1, epoch, page_N) for epoch in (0, 0, 1))
    assert sorted(first) == list(range(10_000))
    assert (first == again).all() and (first != other).any()
    window = WINDOW_PAGES * 50
    pages = [set(page_N[first[at : at + window]]) for at in range(0, 10_000, window)]
    assert [len(some) for some in pages] == [32] * 6 + [8] and len(set.union(*pages)) == 200
    # A batch mixes the samples of many pages: 64 samples miss few of the window's 32 pages.
    assert len(set(page_N[first[:64]])) > 20
    assert np.abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.2


@pytest.mark.parametrize(
    "options", [{}, {"drop_last": False}, {"selection": SampleSelection(limit=20)}, {"shuffle": False}]
)
def test_resident_gives_the_same_batches(canvas, options):
    """With gather=False, as rows of all images."""
    kinds = ({}, {"resident": True}, {"resident": True, "gather": False})
    loaders = [BetonLoader(canvas / "train.beton", 7, seed=2, **kind, **options) for kind in kinds]
    for _ in range(2):
        for streamed, resident, in_place in zip(*loaders, strict=True):
            assert isinstance(in_place.image, ImageRows) and in_place.image.images is loaders[2]._whole_file.image
            for a, b, c in zip(streamed, resident, in_place.tensors(), strict=True):
                assert torch.equal(a, b) and torch.equal(a, c)
    state = {**loaders[0].state_dict(), "position": 14}
    for loader in loaders:
        loader.load_state_dict(state)
    rest = [indices(loader) for loader in loaders]
    assert rest[0] == rest[1] == rest[2] and len(rest[0]) == len(loaders[0]) - 2


def test_skip_replaces_a_damaged_sample_by_the_next_of_its_batch(canvas_jpeg, tmp_path):
    path = damaged_copy(canvas_jpeg / "train.beton", tmp_path, 7, garbage)
    sound = list(BetonLoader(canvas_jpeg / "train.beton", 16, shuffle=False))
    loader = BetonLoader(path, 16, shuffle=False, on_bad_sample="skip")
    for _ in range(2):
        for got, want in zip(loader, sound, strict=True):
            replaced = got.index != want.index
            assert torch.equal(got.image[~replaced], want.image[~replaced])
            if replaced.any():
                assert replaced.nonzero().flatten().tolist() == [7]
                for of_got, of_want in zip(got, want):
                    assert torch.equal(of_got[7], of_want[8])
    assert loader.bad_samples == 2


def test_a_batch_without_a_sound_sample_is_an_error(canvas_jpeg, tmp_path):
    path = damaged_copy(canvas_jpeg / "train.beton", tmp_path, 7, garbage)
    with pytest.raises(UserError, match="cannot be decoded"):
        list(BetonLoader(path, 1, on_bad_sample="skip"))


def test_a_sample_with_a_decoder_warning_is_used_and_counted(canvas_jpeg, tmp_path):
    """turbojpeg warns about data that end early, and fills the rest with gray, never with another image."""

    def cut_off(data):
        end = data[:100_000].tobytes().index(b"\xff\xd9")
        data[end - 300 : end] = 0
        data[end - 300 : end - 298] = [0xFF, 0xD9]

    path = damaged_copy(canvas_jpeg / "train.beton", tmp_path, 7, cut_off)
    loader = BetonLoader(path, 8, shuffle=False)
    first, again = list(loader), list(loader)
    assert loader.decoder_warnings == 2 and loader.bad_samples == 0
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again))


def test_an_exception_in_a_thread_reaches_the_caller(canvas, monkeypatch):
    loader = BetonLoader(canvas / "train.beton", 8)
    list(loader)
    monkeypatch.setattr(kernels, "copy_images", lambda *_: 1 / 0)
    start, threads = time.monotonic(), threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(loader)
    assert time.monotonic() - start < 1 and threading.active_count() == threads


def test_batches_in_use_are_never_overwritten(canvas_jpeg):
    """Some batches are kept and most are dropped, in turns: buffers are reused, but not those in use."""
    want = {}
    for batch in BetonLoader(canvas_jpeg / "train.beton", 1, shuffle=False):
        want[int(batch.index)] = batch.image[0].clone()
    loader, kept = BetonLoader(canvas_jpeg / "train.beton", 4, workers=4), []
    for epoch in range(20):
        for number, batch in enumerate(loader):
            if number % 3 == epoch % 3:
                kept.append((batch.index, batch.image[1:]))  # a view of the buffer
        kept = kept[-10:]
        assert all(torch.equal(i, want[int(n)]) for index, rest in kept for n, i in zip(index[1:], rest))


def test_buffers_are_reused(canvas_jpeg):
    """Also in the next epoch: 48 batches use five buffers."""
    loader, seen = BetonLoader(canvas_jpeg / "train.beton", 2), set()
    for _ in range(2):
        for batch in loader:
            seen.add(batch.image.data_ptr())
            del batch
    assert len(seen) <= 5


def test_memory_does_not_grow_over_a_hundred_epochs(canvas_jpeg):
    loader = BetonLoader(canvas_jpeg / "train.beton", 8)
    process = psutil.Process()
    for epoch in range(110):
        for _batch in loader:
            pass
        if epoch == 9:
            before = process.memory_info().rss, threading.active_count()
    # A leak of one batch per epoch would be 22 MB.
    assert process.memory_info().rss - before[0] < 10e6
    assert threading.active_count() == before[1]


def test_two_loaders_and_a_dataloader_run_in_parallel(canvas, canvas_jpeg, full):
    def two_loaders():
        yield BetonLoader(canvas_jpeg / "train.beton", 4)
        yield BetonLoader(full / "train.beton", 4, crop="cpu", views=VIEWS)

    alone = [indices(loader) for loader in two_loaders()]
    data = torch.utils.data.DataLoader(range(12), num_workers=1, multiprocessing_context="spawn")
    one, two = two_loaders()
    together = [(a.index.tolist(), b.index.tolist()) for a, b, _ in zip(one, two, data, strict=True)]
    assert [list(part) for part in zip(*together)] == alone


def test_batches_of_one(canvas_jpeg):
    assert sorted(sum(indices(BetonLoader(canvas_jpeg / "train.beton", 1, workers=4)), [])) == list(range(48))


def test_ctrl_c_ends_the_loop_and_its_threads(canvas_jpeg):
    """A process that is interrupted in the middle of an epoch ends within seconds."""
    script = (
        "import itertools, signal\n"
        "from fastssl.loading import BetonLoader\n"
        # A shell starts background jobs with Ctrl-C ignored, and tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"loader = BetonLoader({str(canvas_jpeg / 'train.beton')!r}, 4)\n"
        "try:\n"
        "    for n in itertools.count():\n"
        "        for batch in loader:\n"
        "            if n == 1: print('running', flush=True)\n"
        "except KeyboardInterrupt:\n"
        # If it came while the loop waited for its threads, they end by themselves, soon.
        "    import threading, time\n"
        "    until = time.monotonic() + 5\n"
        "    while threading.active_count() > 1 and time.monotonic() < until: time.sleep(0.01)\n"
        "    print(threading.active_count(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=10)
        finally:
            process.kill()  # otherwise leaving the block would wait forever
    assert out.split()[-1] == "1" and process.returncode == 0


def test_a_file_larger_than_memory_causes_a_warning(canvas, monkeypatch):
    monkeypatch.setattr(loader_module, "free_memory", lambda: 1000)
    with pytest.warns(UserWarning, match="data.order=quasi_random"):
        BetonLoader(canvas / "train.beton", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BetonLoader(canvas / "train.beton", 8, shuffle="quasi_random")


def test_the_memory_estimate_equals_the_memory_used(canvas_jpeg, full):
    """Batches and scratch memory by arithmetic; and a run allocates no more batches than estimated."""
    estimate = estimate_memory(BetonLoader(full / "train.beton", 16, crop="cpu", views=VIEWS, workers=3))
    assert estimate["5 batches of 16"] == 5 * 16 * 2 * 48 * 48 * 3
    assert 3 * 88 * 90 * 3 < estimate["scratch of 3 threads"] < 3 * (91 * 93 * 3 + 20_000)
    loader, seen = BetonLoader(canvas_jpeg / "train.beton", 4), set()
    for batch in loader:
        seen.add(batch.image.data_ptr())
        del batch
    assert len(seen) * 4 * 96 * 96 * 3 <= estimate_memory(loader)["5 batches of 4"]


def test_inspect_prints_the_memory_estimate(canvas_jpeg, full):
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(canvas_jpeg / "train.beton"), "--batch-size", "16"]).output
    assert "5 batches of 16" in shown and f"{5 * 16 * 96 * 96 * 3 / 1e6:.1f} MB" in shown
    shown = runner.invoke(app, ["inspect", str(full / "train.beton"), "--batch-size", "16"]).output
    assert "crops on the CPU" in shown and "scratch of" in shown
