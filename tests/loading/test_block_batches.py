"""The loader on canvases in blocks: batches hold what is stored, and decode to the same pixels everywhere."""

import multiprocessing
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.beton import bc4, build_beton, read_metadata
from fastssl.beton import format as beton_format
from fastssl.beton.format import RAW
from fastssl.beton.parts import file_parts
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader, ImageRows, SampleSelection, estimate_memory, kernels, resident
from fastssl.loading import loader as loader_module
from fastssl.loading.blocks import BlockImages
from fastssl.loading.decoding import Buffers
from fastssl.loading.samples import SampleRows, Samples
from fastssl.recipe import ViewsConfig

SIDE = 48
BYTES = SIDE * SIDE * 3 // 4
VIEWS = ViewsConfig(size=32)


@pytest.fixture(scope="module")
def decoded(canvas_bc4, tmp_path_factory):
    """A file with the same samples, whose images are the pixels that the blocks decode to."""
    loader = BetonLoader(canvas_bc4 / "train.beton", 48, shuffle=False)
    samples, pixels = loader.samples, next(iter(loader)).pixels().numpy()
    rows = np.zeros(48, beton_format.ROW)
    rows["data_ptr"], end = beton_format.allocate([pixels[0].nbytes] * 48, beton_format.data_start(48))
    rows["size"] = pixels[0].nbytes
    rows["mode"] = RAW
    rows["height"] = rows["width"] = SIDE
    for name, column in (
        ("label", "label"),
        ("index", "index"),
        ("source_height", "height"),
        ("source_width", "width"),
    ):
        rows[name] = samples.column(column, np.arange(48))
    path = tmp_path_factory.mktemp("decoded") / "train.beton"
    with open(path, "wb") as file:
        for row, image in zip(rows, pixels):
            file.seek(row["data_ptr"])
            file.write(image.tobytes())
        beton_format.write_tables(file, rows, end)
    return path


def assert_equal(batch, other):
    for a, b in zip(batch.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_batch_holds_the_stored_bytes_and_decodes_to_the_image(photos, canvas_bc4):
    path = canvas_bc4 / "train.beton"
    stored = np.fromfile(path, np.uint8)
    rows = {int(row["index"]): row["image"] for row in read_metadata(path)}
    files = sorted((photos / "train").rglob("*.jpg"))
    seen = []
    for batch in BetonLoader(path, 16, seed=3):
        assert isinstance(batch.image, BlockImages) and batch.image.shape == (16, SIDE, SIDE, 3)
        pixels = batch.pixels()
        assert pixels.shape == (16, SIDE, SIDE, 3) and pixels.dtype == torch.uint8
        for b, index in enumerate(batch.index.tolist()):
            start = int(rows[index]["data_ptr"])
            assert (batch.image.blocks[b].numpy() == stored[start : start + BYTES]).all()
            np.testing.assert_array_equal(pixels[b], bc4.decode(stored[start : start + BYTES], SIDE))
            source = Image.open(files[index])
            assert (int(batch.width[b]), int(batch.height[b])) == source.size
            want = np.array(source.resize((SIDE, SIDE), Image.BILINEAR)).astype(int)
            assert np.abs(pixels[b].numpy() - want).mean() < 6
            seen.append(index)
    assert sorted(seen) == list(range(48))


def test_the_cpu_cuts_boxes_of_the_evaluation_from_the_decoded_pixels(canvas_bc4, decoded):
    paths = canvas_bc4 / "train.beton", decoded
    loaders = [BetonLoader(path, 16, seed=3, crop="eval", views=VIEWS) for path in paths]
    assert not loaders[0].decodes_in_reader  # it decodes first
    for batch, want in zip(*loaders, strict=True):
        assert batch.image.shape == (16, 1, 32, 32, 3)
        assert_equal(batch, want)


def test_threads_and_the_reader_give_the_same_batches(canvas_bc4, decoded, monkeypatch):
    """Small batches are copied in the reader thread."""
    loader = BetonLoader(canvas_bc4 / "train.beton", 8, seed=3)
    assert loader.decodes_in_reader
    small = list(loader)
    monkeypatch.setattr("fastssl.loading.decoding.SMALL_BATCH", 0)
    loader.set_epoch(0)
    assert not loader.decodes_in_reader
    for batch, other, pixels in zip(small, loader, BetonLoader(decoded, 8, seed=3), strict=True):
        assert_equal(batch, other)
        assert torch.equal(batch.pixels(), pixels.image)


@pytest.mark.parametrize(
    "options", [{}, {"drop_last": False}, {"selection": SampleSelection(limit=20)}, {"shuffle": False}]
)
def test_resident_gives_the_same_batches(canvas_bc4, options, monkeypatch):
    """With gather=False, as rows of all images. They are loaded in several pieces."""
    monkeypatch.setattr(resident, "PIECE", 9 * BYTES)
    kinds = ({}, {"resident": True}, {"resident": True, "gather": False})
    loaders = [BetonLoader(canvas_bc4 / "train.beton", 7, seed=2, **kind, **options) for kind in kinds]
    for _ in range(2):
        for streamed, gathered, in_place in zip(*loaders, strict=True):
            assert isinstance(gathered.image, BlockImages) and isinstance(in_place.image, ImageRows)
            assert in_place.image.images is loaders[2].load_resident().image
            assert_equal(streamed, gathered)
            assert_equal(streamed, in_place)
            assert torch.equal(streamed.pixels(), in_place.pixels())
    assert len(loaders[2].load_resident().image) == len(loaders[0].rows)


def test_a_long_loading_of_a_resident_set_shows_progress(canvas_bc4, monkeypatch, capsys):
    loader = BetonLoader(canvas_bc4 / "train.beton", 7, resident=True)
    loader.load_resident()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(loader_module, "LONG_LOADING", 48 * BYTES)
    monkeypatch.setattr("fastssl.common.terminal.SHORT", 0.0)
    BetonLoader(canvas_bc4 / "train.beton", 7, resident=True).load_resident()
    assert f"Loading {loader.path}: 48 images in under 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("crop", ["gpu", "eval"])
def test_a_resident_set_holds_what_batches_hold(canvas_bc4, crop):
    path = canvas_bc4 / "train.beton"
    kinds = ({}, {"resident": True})
    loaders = [BetonLoader(path, 7, crop=crop, views=VIEWS, shuffle=False, **kind) for kind in kinds]
    for streamed, from_set in zip(*loaders, strict=True):
        assert isinstance(from_set.image, BlockImages) == (crop == "gpu")
        assert_equal(streamed, from_set)


def test_a_state_of_pixels_is_refused_by_blocks_of_as_many_bytes(photos, tmp_path):
    """A canvas of 32 px as pixels and one of 64 px in blocks both take 3,072 bytes."""
    for name, options in (("pixels", {"canvas": 32}), ("blocks", {"canvas": 64, "codec": "bc4"})):
        build_beton("imagefolder", photos, tmp_path / name, workers=1, **options)
    pixels, blocks = (BetonLoader(tmp_path / name / "train.beton", 8) for name in ("pixels", "blocks"))
    with pytest.raises(UserError, match="does not hold the images that the run has read so far"):
        blocks.load_state_dict(pixels.state_dict())


def test_pixels_are_decoded_in_a_forked_process_too(canvas_bc4):
    """Whose parent has decoded some: threads do not come along."""
    batch = next(iter(BetonLoader(canvas_bc4 / "train.beton", 4)))
    batch.pixels()
    process = multiprocessing.get_context("fork").Process(target=batch.pixels, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_images_that_lie_anywhere_in_the_file_are_loaded(tmp_path):
    """In pieces that several threads read, each in runs of neighbors."""
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    path = tmp_path / "x"
    content.tofile(path)
    start_N = np.array([0, 100, 200, 4900, 300, 400, 2000, 1900, 1800, 500, 600])
    rows = SampleRows(start_N, *[None] * 7)
    samples = Samples(path, content, rows, len(start_N), 3, "raw", None, 1 << 23, file_parts(path))
    row_N = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9, 10])
    pieces = list(resident.read_pieces(samples, row_N, (5, 20), 2, Buffers(pinned=False)))
    assert np.concatenate([piece.row_B for piece in pieces]).tolist() == row_N.tolist()
    want = np.stack([content[start : start + 100] for start in start_N[row_N]])
    np.testing.assert_array_equal(torch.cat([piece.image for piece in pieces]).flatten(1), want)


@pytest.mark.parametrize("change", ["cut off", "gone", "longer", "replaced", "a pipe"])
def test_a_file_that_has_changed_is_not_loaded(canvas_bc4, tmp_path, change):
    path = tmp_path / "train.beton"
    shutil.copy(canvas_bc4 / "train.beton", path)
    loader = BetonLoader(path, 8, resident=True)
    path.rename(tmp_path / "other")  # which keeps its number, so that no other file gets it
    if change == "a pipe":
        os.mkfifo(path)
    elif change != "gone":
        shutil.copy(canvas_bc4 / "train.beton", path)
        os.truncate(path, len(loader.samples.file) + {"longer": 8, "replaced": 0, "cut off": -8}[change])
    message = "cannot be read" if change in ("gone", "a pipe") else "has changed since it was opened"
    with pytest.raises(UserError, match=rf"train.beton {message}"):
        loader.load_resident()


def test_a_batch_moves_as_a_whole(canvas_bc4):
    batch = next(iter(BetonLoader(canvas_bc4 / "train.beton", 8, resident=True, gather=False)))
    moved = batch.map(lambda tensor: tensor.clone())
    assert isinstance(moved.image, BlockImages) and moved.image.side == SIDE
    assert_equal(batch, moved)


def test_batches_in_use_are_never_overwritten(canvas_bc4, monkeypatch):
    monkeypatch.setattr("fastssl.loading.decoding.SMALL_BATCH", 0)
    want = {int(batch.index): batch.image.blocks[0].clone() for batch in BetonLoader(canvas_bc4 / "train.beton", 1)}
    loader, kept = BetonLoader(canvas_bc4 / "train.beton", 4, workers=4), []
    for epoch in range(10):
        kept += [batch for number, batch in enumerate(loader) if number % 3 == epoch % 3]
        kept = kept[-10:]
        for batch in kept:
            assert all(torch.equal(blocks, want[int(i)]) for i, blocks in zip(batch.index, batch.image.blocks))


def test_an_error_in_a_thread_reaches_the_caller(canvas_bc4, monkeypatch):
    monkeypatch.setattr("fastssl.loading.decoding.SMALL_BATCH", 0)
    monkeypatch.setattr(kernels, "copy_images", lambda *_: 1 / 0)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(BetonLoader(canvas_bc4 / "train.beton", 8))
    assert threading.active_count() == threads


@pytest.mark.parametrize("kernel", ["copy_images", "decode_images"])
def test_images_that_reach_over_the_end_of_the_file_fail(kernel):
    """`read_header` refuses such files; the kernels do not rely on it."""
    out = np.full((3, 8, 8, 3), 7, np.uint8)
    file = np.arange(500, dtype=np.uint16).astype(np.uint8)
    file.flags.writeable = False  # as a mapped file: functions are compiled for one type only
    arrays = kernels.DecodeArrays(
        file=file, start_B=np.array([0, 400, 10**12]), size_B=np.full(3, 192), mode_B=np.full(3, RAW, np.uint8),
        shape_B2=np.full((3, 2), 8), box_BV4=np.empty((3, 0, 4)), flip_BV=np.empty((3, 0), bool), out=out,
        status_B=np.full(3, kernels.WARNED, np.int8), counter=np.zeros(1, np.int64),
    )  # fmt: skip
    getattr(kernels, kernel)(arrays)
    assert arrays.status_B.tolist() == [kernels.DECODED, kernels.FAILED, kernels.FAILED]
    assert (out[0].reshape(-1) == file[:192]).all() and (out[1:] == 7).all()


def test_the_memory_estimate_counts_blocks(canvas_bc4):
    loader = BetonLoader(canvas_bc4 / "train.beton", 16, resident=True)
    assert loader.image_bytes == BYTES and loader.batch_bytes_on_host == 16 * BYTES
    estimate = estimate_memory(loader)
    assert estimate["5 batches of 16"] == 5 * 16 * BYTES and estimate["all images, device"] == 48 * BYTES
    assert estimate["pieces, while all images are loaded"] == 48 * BYTES
    assert resident.pieces_bytes(16, 10**10) == 6 * resident.PIECE
    loader = BetonLoader(canvas_bc4 / "train.beton", 16, crop="eval", views=VIEWS, workers=3)
    image, row = 3 * (SIDE + 3) ** 2, 3 * 4 * SIDE
    assert 3 * (image + row) < estimate_memory(loader)["scratch of 3 threads"] < 3 * (image + row) + 100_000
