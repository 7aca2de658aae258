"""The loader: right pixels, right order, exact places, no hang, no thread left behind."""

import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.beton import read_metadata
from fastssl.loading import BetonLoader
from fastssl.recipe import Jitter, UserError, ViewOnly, Views
from fastssl.views import PairedViews, clean_view

VIEWS = Views(size=48)


def source_pixels(photos, index):
    """What Pillow sees of a sample: `index` is its place in the builder's order."""
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
            # JPEG at quality 90 with halved colour: a few grey levels on average.
            assert np.abs(batch.image[b].numpy() - want).mean() < 6


def test_cpu_crops_are_the_device_crops(photos, full):
    """The same boxes and the same filter, so the same pixels but for rounding to uint8."""
    plain = Views(
        size=48, flip=0, jitter=Jitter(p=0), gray=0, first=ViewOnly(), second=ViewOnly(), mean=(0, 0, 0), std=(1, 1, 1)
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
                # turbojpeg's fast DCT against Pillow's: single pixels differ by some levels.
                assert (got - want[view][0]).abs().mean() < 2 / 255


def test_whole_images_of_any_size_become_the_clean_view(photos, full):
    clean = clean_view(VIEWS)
    for batch in BetonLoader(full / "train.beton", 16, crop="whole", views=VIEWS, shuffle=False):
        assert batch.image.shape == (16, 48, 48, 3)
        for b in range(16):
            want = clean(torch.from_numpy(source_pixels(photos, int(batch.index[b])))[None])
            assert (clean(batch.image[b : b + 1]) - want).abs().mean() < 2 / 255 / min(VIEWS.std)


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
    want = indices(BetonLoader_at(path, 2)) + indices(BetonLoader_at(path, 3))
    batches = iter(loader)
    got = [next(batches).index.tolist() for _ in range(taken)]
    state = loader.state_dict()
    batches.close()
    resumed = BetonLoader(path, 8, seed=1)
    resumed.load_state_dict(state)
    assert got + indices(resumed) + indices(resumed) == want


def BetonLoader_at(path, epoch):
    loader = BetonLoader(path, 8, seed=1)
    loader.set_epoch(epoch)
    return loader


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
    subsets = [
        sorted(sum(indices(BetonLoader(canvas / "train.beton", 5, seed=s, limit=10)), [])) for s in (0, 1)
    ]
    assert subsets[0] == subsets[1] and len(set(subsets[0])) == 10 and subsets[0] != list(range(10))


def test_leaving_the_loop_early_leaves_no_thread(canvas):
    before = threading.active_count()
    loader = BetonLoader(canvas / "train.beton", 4)
    for _ in range(5):
        for _batch in loader:
            break
    assert threading.active_count() == before


def test_torch_keeps_its_threads(canvas):
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
    with pytest.raises(UserError, match=f"index {index} "):
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


def test_a_batch_larger_than_the_data_is_refused(canvas):
    with pytest.raises(UserError, match="lower train.batch_size"):
        BetonLoader(canvas / "train.beton", 64)


def test_what_is_not_a_beton_is_refused(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="x.beton"):
        BetonLoader(path, 8)
