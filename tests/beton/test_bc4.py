"""Canvases in BC4: the decoders, the encoder (fastssl.beton.bc4), and files of such canvases."""

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import texture2ddecoder
import torch
from PIL import Image, ImageDraw
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import (
    BuildOptions,
    bc4,
    build_beton,
    draw_sheet,
    estimate,
    estimate_build,
    read_header,
    recorded_plan,
    verify,
)
from fastssl.beton import format as layout
from fastssl.beton.images import encode_image
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader, BlockImages, kernels
from fastssl.loading.image_files import find_conversion
from fastssl.recipe import ViewsConfig

SIDE = 64
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def random_blocks(count: int, side: int) -> np.ndarray:
    """Random bytes: half of the blocks are of each mode."""
    return np.random.default_rng(0).integers(0, 256, (count, layout.bc4_bytes(side)), np.uint8)


def textured(seed: int, side: int = SIDE, noise: float = 12) -> np.ndarray:
    """A photograph with edges and grain."""
    rng = np.random.default_rng(seed)
    image = photo(seed, side, side)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        draw.line(rng.integers(0, side, 4).tolist(), tuple(rng.integers(0, 256, 3).tolist()), 3)
    return np.clip(np.asarray(image) + rng.normal(0, noise, (side, side, 1)), 0, 255).astype(np.uint8)


def written(seed: int) -> np.ndarray:
    """Black letters on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).text((1, 1), "\n".join(["Wave 0123", "qjg %&@ MN"] * 3)[seed:], "black")
    return np.asarray(image)


def luma(pixels: np.ndarray) -> np.ndarray:
    half = np.empty((len(pixels) // 2, len(pixels) // 2), np.uint8)
    y = np.empty(pixels.shape[:2], np.uint8)
    bc4._to_planes(pixels, y, half, half.copy())
    return y


def psnr(decoded: np.ndarray, pixels: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(decoded.astype(float) - pixels).mean()))


def decoded_plane(blocks: np.ndarray) -> np.ndarray:
    side = int((2 * len(blocks)) ** 0.5)
    plane = np.empty((side, side), np.uint8)
    bc4.decode_plane(bc4.read_only(blocks), plane)
    return plane


# --- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "encoded"])
def test_a_plane_decodes_as_by_pillow_and_by_texture2ddecoder(kind: str) -> None:
    luma_bytes = SIDE * SIDE // 2
    blocks = (random_blocks(1, SIDE)[0] if kind == "random" else bc4.encode(textured(1)))[:luma_bytes]
    modes = blocks.reshape(-1, 8)[:, 0] > blocks.reshape(-1, 8)[:, 1]
    assert modes.all() if kind == "encoded" else 0 < modes.sum() < len(modes)
    plane = decoded_plane(blocks)

    size = struct.pack("<7I", 124, 0x1007, SIDE, SIDE, luma_bytes, 0, 0)
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"ATI1", 0, 0, 0, 0, 0)
    header = b"DDS " + size + bytes(44) + pixel_format + struct.pack("<5I", 0x1000, 0, 0, 0, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(header + blocks.tobytes()))), plane)
    bgra = np.frombuffer(texture2ddecoder.decode_bc4(blocks.tobytes(), SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(bgra.reshape(SIDE, SIDE, 4)[..., 2], plane)


def test_a_transposed_window_is_a_part_of_a_plane() -> None:
    blocks = random_blocks(1, SIDE)[0, : SIDE * SIDE // 2]
    window_XY = np.empty((20, 12), np.uint8)
    bc4.decode_transposed(blocks, 3, 5, window_XY)
    np.testing.assert_array_equal(window_XY.T, decoded_plane(blocks)[12:24, 20:40])


def test_functions_are_compiled_for_one_type_of_blocks(beton) -> None:
    """Two types would share one name in the cache of compiled functions (common/compiled.py)."""
    views = ViewsConfig(size=32)
    for crop in ("gpu", "cpu", "eval"):
        loader = BetonLoader(beton, 4, crop=crop, views=views, workers=1)
        assert not loader.samples.file.flags.writeable
        for batch in loader:
            batch.pixels()
    blocks = random_blocks(2, SIDE)
    BlockImages(torch.from_numpy(blocks), SIDE).pixels()
    bc4.decode(blocks[0], SIDE)
    assert not bc4.read_only(blocks).flags.writeable and blocks.flags.writeable
    for function in (bc4.decode_into, bc4.decode_plane, kernels.decode_blocks, kernels._decode):
        assert len(function.signatures) <= 1  # none if a cached function contains it


@pytest.mark.parametrize("side", [8, 24, 64])
def test_torch_and_numba_decode_any_bytes_to_the_same_pixels(side: int) -> None:
    blocks = random_blocks(3, side)
    images = BlockImages(torch.from_numpy(blocks), side)
    want = np.stack([bc4.decode(row, side) for row in blocks])
    assert images.shape == want.shape
    np.testing.assert_array_equal(images.pixels().numpy(), want)
    y_BHW1, c_BHW2 = images.planes()
    np.testing.assert_array_equal(y_BHW1[0, ..., 0].numpy(), decoded_plane(blocks[0, : side * side // 2]))
    assert c_BHW2.shape == (3, side // 2, side // 2, 2)


def test_chroma_is_interpolated_and_colors_are_those_of_jfif() -> None:
    """The pixels by the formulas of ITU-T T.871 in float64."""
    blocks = random_blocks(1, SIDE)
    y_BHW1, c_BHW2 = BlockImages(torch.from_numpy(blocks), SIDE).planes()
    chroma = torch.nn.functional.interpolate(c_BHW2.double().permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
    y, (cb, cr) = y_BHW1[0, ..., 0].double(), chroma[0] - 128
    want = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], dim=2).clamp(0, 255)
    assert np.abs(bc4.decode(blocks[0], SIDE) - want.numpy()).max() <= 0.51  # rounded, with weights of 16 bits


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="3,071 bytes are not a canvas of 64 px"):
        bc4.decode(np.zeros(3071, np.uint8), 64)


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["photograph", "text", "noise", "contrast"])
def test_the_search_is_within_0_3_db_of_an_exhaustive_one(kind: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from codec_quality import smallest_error

    if kind == "photograph":
        planes = [luma(textured(seed)) for seed in range(4)]
    elif kind == "text":
        planes = [luma(written(seed)) for seed in range(4)]
    else:  # noise of a small and of the full range
        high = 40 if kind == "noise" else 256
        planes = [np.random.default_rng(seed).integers(0, high, (SIDE, SIDE)).astype(np.uint8) for seed in range(4)]
    plane = np.concatenate(planes, axis=1)[:SIDE]
    found = np.concatenate([decoded_plane(encoded_plane(part)) for part in planes], axis=1)
    tiles, found_tiles = (
        x.astype(np.int64).reshape(SIDE // 4, 4, -1, 4).transpose(0, 2, 1, 3).reshape(-1, 16) for x in (plane, found)
    )
    sampled = np.random.default_rng(0).permutation(len(tiles))[:100]
    best = np.array([smallest_error(tile) for tile in tiles[sampled]])
    errors = np.square(found_tiles - tiles)[sampled].sum(axis=1)
    assert (errors >= best).all()
    assert (errors[best == 0] == 0).all()
    assert 10 * np.log10(errors.sum() / best.sum()) < 0.3
    assert (errors <= 2.5 * best + 4).all()  # no single block is far off: at most 4 dB


def encoded_plane(plane: np.ndarray) -> np.ndarray:
    blocks = np.empty(plane.size // 2, np.uint8)
    bc4._encode_plane(plane, bc4.FINE_LUMA, blocks)
    return blocks


def test_up_to_eight_neighboring_gray_values_are_stored_exactly() -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 249, (SIDE // 4, SIDE // 4)).repeat(4, axis=0).repeat(4, axis=1)
    plane = (low + rng.integers(0, 8, (SIDE, SIDE))).astype(np.uint8)
    plane[:4, :4], plane[:4, 4:8] = 0, 255
    np.testing.assert_array_equal(decoded_plane(encoded_plane(plane)), plane)


def test_a_block_does_not_depend_on_the_others() -> None:
    """Blocks are searched 64 at a time; a plane of 25 of them fills none of these groups."""
    plane = luma(textured(2, 160))
    whole = encoded_plane(plane).reshape(40, 40, 8)
    for first in (0, 20):
        part = np.ascontiguousarray(plane[4 * first :, 4 * first :][:20, :20])
        alone = encoded_plane(part).reshape(5, 5, 8)
        np.testing.assert_array_equal(alone, whole[first : first + 5, first : first + 5])


@pytest.mark.parametrize(
    ("pixels", "least"),
    [(textured(3, noise=0), 44), (textured(3), 40), (written(0), 36), (textured(3, noise=60), 30)],
    ids=["drawn", "photograph", "text", "noise"],
)
def test_psnr_of_luma_for_a_kind_of_picture(pixels: np.ndarray, least: float) -> None:
    plane = luma(pixels)
    assert psnr(decoded_plane(encoded_plane(plane)), plane) > least


def test_more_noise_costs_more() -> None:
    planes = [luma(textured(4, noise=noise)) for noise in (0, 4, 8, 16, 32, 64)]
    of_noise = [psnr(decoded_plane(encoded_plane(plane)), plane) for plane in planes]
    assert of_noise == sorted(of_noise, reverse=True)


def test_one_color_stays_itself() -> None:
    for color in np.random.default_rng(0).integers(0, 256, (50, 3), np.uint8):
        pixels = np.broadcast_to(color, (8, 8, 3)).copy()
        decoded = bc4.decode(bc4.encode(pixels), 8)
        assert (decoded == decoded[0, 0]).all()
        assert np.abs(decoded.astype(int) - pixels).max() <= 2  # rounding of Y, Cb and Cr


def test_planes_are_those_of_jfif() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    pixels[:8] = (0, 0, 255)  # the largest Cb and Cr round to 255
    pixels[8:16] = (255, 0, 0)
    y, cb, cr = (np.empty((side, side), np.uint8) for side in (SIDE, SIDE // 2, SIDE // 2))
    bc4._to_planes(pixels, y, cb, cr)
    weights = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    want = pixels.astype(float) @ weights.T
    chroma = want[..., 1:].reshape(SIDE // 2, 2, SIDE // 2, 2, 2).mean(axis=(1, 3)) + 128
    assert np.abs(y - want[..., 0]).max() <= 0.501
    assert np.abs(np.stack([cb, cr], axis=2) - chroma.clip(0, 255)).max() <= 0.501


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        (folder / str(number % 3)).mkdir(exist_ok=True)
        photo(number, 90 + number, 70).save(folder / str(number % 3) / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def beton(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    build_beton("imagefolder", source, out, canvas=SIDE, codec="bc4", workers=1)
    return out / "train.beton"


def test_a_file_is_described_verified_and_drawn(beton, tmp_path):
    info = read_header(beton)
    assert (info.storage, info.channels, info.resolution) == ("bc4", 3, (SIDE, SIDE))
    assert info.fields["image"] == "NDArrayField" and info.manifest["storage"] == "bc4"
    assert recorded_plan(info.manifest).storage == "bc4"
    assert verify(beton, workers=1).verdict() == "All 12 samples decode and match their checksums."
    assert draw_sheet(beton, tmp_path / "sheet.png") == 12
    thumbnails = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert thumbnails.std() > 20

    content = bytearray(beton.read_bytes())
    content[layout.data_start(12) + 100] ^= 1
    (tmp_path / "x.beton").write_bytes(content)
    (tmp_path / "x.beton.json").write_text(beton.with_name("train.beton.json").read_text())
    (fault,) = verify(tmp_path / "x.beton", workers=1).faults
    assert "does not match its checksum, but decodes" in str(fault)


def test_pixels_are_those_of_the_resized_source(beton, source):
    """Each canvas is resized once from the source: nearer to it than the JPEG canvas is."""
    names = beton.with_name("train.beton.names.txt").read_text().splitlines()
    content = np.fromfile(beton, np.uint8)
    metadata, _ = layout_rows(beton)
    for row in metadata:
        path = source / names[row["index"]]
        want = np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        blocks = content[row["image"]["data_ptr"] :][: layout.bc4_bytes(SIDE)]
        jpeg = encode_image(path.read_bytes(), BuildOptions(canvas=SIDE, codec="jpeg").plan(SIDE)).payload
        assert psnr(bc4.decode(blocks, SIDE), want) > max(36, psnr(np.asarray(Image.open(io.BytesIO(jpeg))), want))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(149, 111), (64, 64), (1203, 901), (9, 300)])
def test_planes_of_a_jpeg_are_resized_as_its_pixels(subsampling, size):
    """Odd sizes end within a pixel of chroma; the largest image is decoded at an eighth of its size."""
    content = jpeg_bytes(photo(5, *size), subsampling=subsampling)
    plan = BuildOptions(canvas=SIDE, codec="bc4").plan(SIDE)
    encoded = encode_image(content, plan)
    want = np.asarray(Image.open(io.BytesIO(content)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    decoded = bc4.decode(np.frombuffer(encoded.payload, np.uint8), SIDE)
    assert (encoded.source_height, encoded.source_width) == size[::-1]
    assert psnr(decoded, want) > (36 if min(size) > 9 else 33)  # colors change within one pixel of 9
    assert np.abs(decoded.astype(int).mean(axis=(0, 1)) - want.mean(axis=(0, 1))).max() < 1


def test_a_jpeg_of_other_colors_or_turned_by_exif_goes_through_rgb():
    plan = BuildOptions(canvas=SIDE, codec="bc4").plan(SIDE)
    image = photo(6, 149, 111)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for content, shown in (
        (jpeg_bytes(image.convert("L")), image.convert("L").convert("RGB")),
        (jpeg_bytes(image.convert("CMYK")), image),
        (jpeg_bytes(image, exif=exif), image.rotate(180)),
    ):
        decoded = bc4.decode(np.frombuffer(encode_image(content, plan).payload, np.uint8), SIDE)
        assert psnr(decoded, np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.BILINEAR))) > 34


def test_a_dark_jpeg_is_nearly_black():
    plan = BuildOptions(canvas=SIDE, codec="bc4").plan(SIDE)
    dark, blue = (np.full((80, 80, 3), color, np.uint8) for color in ((20, 20, 20), (0, 0, 200)))
    assert encode_image(jpeg_bytes(Image.fromarray(dark)), plan).is_nearly_black
    assert not encode_image(jpeg_bytes(Image.fromarray(blue)), plan).is_nearly_black  # its luma is 23


def layout_rows(beton):
    from fastssl.beton import read_samples

    return read_samples(beton)


def test_stock_ffcv_reads_the_blocks(beton):
    """And the lines of docs/files.md make pixels of them."""
    from ffcv.loader import Loader, OrderOption

    loader = Loader(str(beton), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True)
    blocks = np.concatenate([np.array(batch[0]) for batch in loader])
    metadata, _ = layout_rows(beton)
    content = np.fromfile(beton, np.uint8)
    want = [content[row["image"]["data_ptr"] :][: layout.bc4_bytes(SIDE)] for row in metadata]
    np.testing.assert_array_equal(blocks, np.stack(want))
    pixels = BlockImages(torch.from_numpy(blocks), SIDE).pixels()
    np.testing.assert_array_equal(pixels[0].numpy(), bc4.decode(want[0], SIDE))


def test_the_number_of_workers_does_not_change_a_byte(beton, source, tmp_path):
    build_beton("imagefolder", source, tmp_path / "out", canvas=SIDE, codec="bc4", workers=3)
    assert (tmp_path / "out" / "train.beton").read_bytes() == beton.read_bytes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"canvas": 100}, "multiple of 8 px and at most 3344 px, not of 100 px: use --canvas 96"),
        ({"canvas": 4000}, "not of 4000 px: use --canvas 3344"),
        ({"canvas": 4}, "not of 4 px: use --canvas 8"),
        ({"canvas": 64, "codec": "BC4"}, "--codec must be jpeg or bc4, got 'BC4'"),
        ({"max_side": 500}, "stores squares: use --canvas in place of --max-side"),
        ({"canvas": 64, "channels": 1}, "--channels 1 stores pixels"),
        ({"canvas": 64, "quality": 90}, "--quality is of JPEGs, and a canvas of 64 px is stored as BC4 blocks"),
    ],
)
def test_impossible_options_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        BuildOptions(**{"codec": "bc4", **options}).plan(256)


def test_an_estimate_compares_the_codecs(source, tmp_path):
    found = estimate_build("imagefolder", source, tmp_path / "o", BuildOptions(canvas=SIDE, codec="bc4", workers=1))
    (blocks,) = found.splits
    assert blocks.stored == "BC4 blocks" and blocks.bytes > 12 * layout.bc4_bytes(SIDE)
    ((jpeg,),) = found.others
    assert jpeg.stored == "JPEG quality 90" and jpeg.bytes < blocks.bytes and jpeg.seconds > 0
    of_whole = estimate_build("imagefolder", source, tmp_path / "o", BuildOptions(max_side=80, workers=1))
    assert of_whole.others == []


def test_an_estimate_counts_what_is_empty_at_the_ends_of_pages(tmp_path):
    """Of canvases of 2,400 px, one fits into a page of 8 MB."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        photo(number, 20, 20).save(source / f"{number}.png")
    options = {"canvas": 2400, "codec": "bc4", "workers": 1}
    found = estimate_build("imagefolder", source, tmp_path / "o", BuildOptions(**options))
    build_beton("imagefolder", source, tmp_path / "o", **options)
    assert found.splits[0].bytes == (tmp_path / "o" / "train.beton").stat().st_size


def test_another_codec_that_does_not_work_is_left_out_of_an_estimate(source, tmp_path, monkeypatch):
    def estimate_split(split, out, plan, pool, options, factor):
        if plan.storage != "raw":
            raise UserError("numba does not work on this machine")
        return estimate_one(split, out, plan, pool, options, factor)

    estimate_one = estimate._estimate_split
    monkeypatch.setattr(estimate, "_estimate_split", estimate_split)
    found = estimate_build("imagefolder", source, tmp_path / "o", BuildOptions(canvas=32, workers=1))
    assert found.splits[0].stored == "pixels" and found.others == []


def test_a_manifest_that_contradicts_its_file_is_not_believed(beton, tmp_path):
    shutil.copy(beton, tmp_path / "train.beton")
    manifest = json.loads(beton.with_name("train.beton.json").read_text())
    for storage in ("raw", "jpg", None, "bc4"):
        changed = {**manifest, "storage": storage, "quality": 90 if storage == "jpg" else None}
        (tmp_path / "train.beton.json").write_text(json.dumps(changed))
        conversion = find_conversion(tmp_path / "train.beton", ViewsConfig(size=56))
        assert conversion.is_recorded == (storage == "bc4")
        assert storage == "bc4" or "the file holds other images" in conversion.reason


@pytest.mark.parametrize("side", [32, 128])
def test_a_manifest_records_the_codec(side):
    for codec in ("jpeg", "bc4"):
        plan = BuildOptions(canvas=side, codec=codec).plan(side)
        quality = 90 if codec == "jpeg" else None
        manifest = {"layout": "canvas", "canvas": side, "storage": plan.storage, "quality": quality}
        assert recorded_plan(manifest) == plan


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header: header["shape"].__setitem__((0, 0), 3000), "3,000 bytes are not a square in BC4"),
        (lambda header: header["shape"].__setitem__((0, 0), 0), "0 bytes are not a square in BC4"),
        (lambda header: header["shape"].__setitem__((0, 0), 1 << 62), "are not a square in BC4"),
        (lambda header: header["shape"].__setitem__((0, 1), 1), "are not a square in BC4"),
        (lambda header: header["shape"].__setitem__((0, 0), layout.bc4_bytes(72)), "does not fit their height"),
        (lambda header: header["shape"].__setitem__((0, 0), layout.bc4_bytes(26_760)), "are not a square in BC4"),
    ],
)
def test_files_with_wrong_sizes_are_refused(beton, tmp_path, change, match):
    content = bytearray(beton.read_bytes())
    descriptors = np.frombuffer(content, layout.FIELD, 1, layout.HEADER.itemsize)
    header = np.frombuffer(descriptors["arguments"], layout.ARRAY, 1)
    change(header)
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_header(path)


def test_an_image_field_cannot_claim_to_be_blocks(tmp_path, source):
    """The mode of blocks is in memory only: in FFCV's image field it is neither pixels nor JPEG."""
    build_beton("imagefolder", source, tmp_path, canvas=16, workers=1)
    content = bytearray((tmp_path / "train.beton").read_bytes())
    rows = np.frombuffer(
        content, layout.metadata_type(layout.OUR_FIELDS), 12, layout.HEADER.itemsize + 5 * layout.FIELD.itemsize
    )
    rows["image"]["mode"][3] = layout.BC4
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(UserError, match="stored neither as pixels nor as JPEG"):
        read_header(tmp_path / "x.beton")


def test_a_build_with_another_codec_is_a_new_one(beton, source, tmp_path):
    out = tmp_path / "out"
    build_beton("imagefolder", source, out, canvas=SIDE, workers=1)
    (report,) = build_beton("imagefolder", source, out, canvas=SIDE, codec="bc4", workers=1).splits
    assert not report.up_to_date and (out / "train.beton").read_bytes() == beton.read_bytes()
    assert json.loads((out / "train.beton.json").read_text())["quality"] is None
    (report,) = build_beton("imagefolder", source, out, canvas=SIDE, codec="bc4", workers=1).splits
    assert report.up_to_date
