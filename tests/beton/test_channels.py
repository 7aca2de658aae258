"""Images of one channel or of many: what is read, what is refused with a reason, and the file of arrays."""

import io
import itertools
import json
import struct
import sys

import numpy as np
import pytest
from many_channels import bands, npy, stack, values
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import build_beton, draw_sheet, read_header, read_samples, verify
from fastssl.beton import format as layout
from fastssl.beton.images import Encoded, StoragePlan, encode_all
from fastssl.beton.options import recorded_plan
from fastssl.cli import main
from fastssl.common.errors import UserError
from fastssl.loading import BetonLoader

SIDE = 16


def encode(content, channels, value_range="full", side=SIDE, megapixels=179) -> Encoded | str:
    (result,) = encode_all([content], StoragePlan("canvas", side, 90, value_range, megapixels, channels))
    return result


def pixels_of(result: Encoded | str, channels: int) -> np.ndarray:
    assert not isinstance(result, str), result
    assert result.mode == layout.RAW
    return np.frombuffer(result.payload, np.uint8).reshape(result.height, result.width, channels)


def resized(pixels_HWN: np.ndarray, side: int = SIDE) -> np.ndarray:
    """By Pillow, channel by channel."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels_HWN, 2, 0)]
    return np.stack([np.asarray(plane.resize((side, side), Image.Resampling.BILINEAR)) for plane in planes], 2)


# --- what is read ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
@pytest.mark.parametrize("kind", ["npy first", "npy last", "npy fortran", "stack", "bands", "tiles"])
def test_eight_bits_are_stored_as_they_are(kind, channels):
    image = values(channels, (30, 22, channels))
    content = {
        "npy first": npy(np.moveaxis(image, 2, 0)),
        "npy last": npy(image),
        "npy fortran": npy(np.asfortranarray(image)),
        "stack": stack(list(np.moveaxis(image, 2, 0))),
        "bands": bands(image),
        "tiles": bands(image, tile=16),
    }[kind]
    result = encode(content, channels)
    np.testing.assert_array_equal(pixels_of(result, channels), resized(image))
    assert (result.source_height, result.source_width) == (30, 22)
    assert result.source_format == ("NPY" if "npy" in kind else "TIFF")


@pytest.mark.parametrize("planar, deflate, rows, tile, differences", list(itertools.product(*[[False, True]] * 5)))
@pytest.mark.parametrize("dtype, order", [("u1", "<"), ("u2", ">"), ("f4", "<")])
def test_bands_in_every_arrangement(planar, deflate, rows, tile, differences, dtype, order):
    image = values(3, (21, 18, 5), dtype)
    options = {"planar": planar, "deflate": deflate, "differences": differences and dtype != "f4", "order": order}
    content = bands(image, rows=4 if rows else None, tile=16 if tile else None, **options)
    value_range = "auto" if dtype == "f4" else "full"
    got = pixels_of(encode(content, 5, value_range), 5)
    np.testing.assert_array_equal(got, pixels_of(encode(npy(image), 5, value_range), 5))


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", "u4", "i8"])
def test_more_than_eight_bits_become_the_upper_ones(dtype):
    image = values(1, (20, 20, 5), "u2")
    got = pixels_of(encode(npy(image.astype(dtype)), 5), 5)
    np.testing.assert_array_equal(got, resized((image >> 8).astype(np.uint8)))


def test_a_range_holds_for_all_channels_together():
    image = values(1, (20, 20, 4), "u2") % 4096
    image[..., 1] //= 100
    image[0, 0, 0] = 4095
    want = (image >> 4).astype(np.uint8)  # 12 bits, of the darker channel too
    np.testing.assert_array_equal(pixels_of(encode(npy(image), 4, "auto"), 4), resized(want))
    scaled = np.clip(np.rint((image.astype(float) - 100) * 255 / 900), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels_of(encode(npy(image), 4, (100, 1000)), 4), resized(scaled))
    floats = values(2, (20, 20, 4), "f8")
    want = np.rint(floats * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels_of(encode(npy(floats), 4, "auto"), 4), resized(want))


def test_one_channel_is_the_gray_value():
    image = photo(4, 40, 30)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    want = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))[..., None]
    for content in (buffer.getvalue(), np.asarray(image)):
        np.testing.assert_array_equal(pixels_of(encode(content, 1), 1), want)
    gray = np.asarray(image.convert("L"))
    tiff = io.BytesIO()
    Image.fromarray(gray.astype(np.uint16) << 8).save(tiff, "TIFF")
    deep = npy(gray.astype(np.uint16)[None] << 8)
    for content in (gray, npy(gray), npy(gray[..., None]), tiff.getvalue(), deep):
        np.testing.assert_array_equal(pixels_of(encode(content, 1), 1), resized(gray[..., None]))
    turned = encode(jpeg_bytes(image, exif=Image.Exif()), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(jpeg_bytes(image, exif=exif), 1)
    assert (rotated.source_height, rotated.source_width) == (40, 30)
    np.testing.assert_array_equal(pixels_of(rotated, 1), np.rot90(pixels_of(turned, 1), -1))


def test_pages_of_another_size_are_thumbnails_of_a_gray_image():
    large, small = values(0, (20, 20)), values(1, (5, 5))
    np.testing.assert_array_equal(pixels_of(encode(stack([large, small]), 1), 1), resized(large[..., None]))


def test_pixels_in_memory_may_have_the_channels():
    image = values(0, (20, 24, 5))
    np.testing.assert_array_equal(pixels_of(encode(image, 5), 5), resized(image))


# --- what is refused ---------------------------------------------------------------------

SQUARE = values(0, (5, 8, 5))


@pytest.mark.parametrize(
    "channels, content, reason",
    [
        (5, npy(values(0, (4, 8, 8))), "array (4, 8, 8), which --channels 5 does not take: it must be (5, H, W)"),
        (5, npy(SQUARE), "of which the first or the last axis may be --channels 5"),
        (5, npy(values(0, (8, 8))), "which --channels 5 does not take"),
        (1, npy(values(0, (5, 8, 8))), "which --channels 1 does not take: it must be (1, H, W) or (H, W, 1) or (H, W)"),
        (2, npy(values(0, (2, 8, 8, 1))), "which --channels 2 does not take"),
        (5, npy(np.zeros((5, 8, 0))), "is an array (5, 8, 0)"),
        (5, npy(np.ones((5, 8, 8), bool)), "is an array of bool, not of integers or floats"),
        (5, npy(np.ones((5, 8, 8), complex)), "is an array of complex128"),
        (5, npy(np.full((5, 8, 8), "x")), "is an array of <U1"),
        (5, npy(np.full((5, 8, 8), -1)), "has values from -1 to -1, outside 0 to 65,535; --range LOW,HIGH"),
        (5, npy(np.full((5, 8, 8), 70000)), "outside 0 to 65,535"),
        (5, npy(np.full((5, 8, 8), 0.5)), "floating-point pixels have no full range; --range auto"),
        (5, npy(np.full((5, 8, 8), np.nan)), "infinite or not a number"),
        (5, npy(values(0, (5, 8, 8)))[:-1], "which its 319 bytes are not"),
        (5, stack([values(0, (8, 8))] * 4), "has 4 pages, and --channels 5 takes TIFF files with 5 pages or bands"),
        (5, stack([values(0, (8, 8))] * 6), "has 6 pages"),
        (5, stack([values(0, (8, 8))] * 4 + [values(0, (8, 9))]), "has pages of 8x8 and of 9x8 px"),
        (5, stack([values(0, (8, 8))] * 4 + [values(0, (8, 8), "u2")]), "pages of different types, uint8 and uint16"),
        (2, stack([values(0, (8, 8, 3))] * 2), "has pages of several channels or colors (RGB)"),
        (5, bands(values(0, (8, 8, 4))), "has 4 channels, and --channels 5"),
        (2, stack([values(0, (8, 8))]), "has 1 channel, and --channels 2"),
        (5, jpeg_bytes(photo(0, 20, 20)), "is no TIFF, and --channels 5"),
        (5, b"", "the file is empty"),
        (5, values(0, (8, 8, 3)), "pixels must be uint8 (H, W, 5), not uint8 (8, 8, 3)"),
        (1, stack([values(0, (8, 8))] * 5), "has 5 pages, and --channels 1 takes one"),
        (1, bands(values(0, (8, 8, 5))), "a TIFF of 5 channels, which --channels 5 reads"),
        (3, bands(values(0, (8, 8, 5))), "a TIFF of 5 channels, which --channels 5 reads"),
        (1, bands(values(0, (8, 8, 5)), more={284: 2}), "has 5 channels, and --channels 1"),
        (3, npy(values(0, (3, 8, 8))), "is an array in a .npy file, which --channels reads for other numbers"),
    ],
)
def test_files_of_other_channels_are_bad_images(channels, content, reason):
    result = encode(content, channels)
    assert isinstance(result, str) and reason in result


class Harmful:
    def __reduce__(self):
        return sys.exit, (9,)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Harmful()] * 5, object), allow_pickle=True)
    return buffer.getvalue()


def claim(shape: str) -> bytes:
    """An array of a few bytes that states another shape."""
    content = npy(values(0, (5, 8, 8)))
    header = content[10:128].replace(b"(5, 8, 8)", shape.encode())
    return content[:10] + header.rstrip().ljust(117)[:117] + b"\n" + content[128:]


@pytest.mark.parametrize(
    "content",
    [
        pickled(),
        claim("(5, 99999999, 99999999)"),
        claim("(5, -8, -8)"),
        claim("(5, 8, 8.0)"),
        claim("'x'"),
        npy(values(0, (5, 8, 8)))[:20],
        b"\x93NUMPY\x09\x00" + bytes(200),
        bands(SQUARE, more={256: 0}),
        bands(SQUARE, more={256: 1 << 31, 257: 1 << 31}),
        bands(SQUARE, more={259: 5}),
        bands(SQUARE, more={259: 8}),
        bands(SQUARE, more={274: 6}),
        bands(SQUARE, more={317: 3}),
        bands(SQUARE, more={278: 1}),
        bands(SQUARE, more={258: 12}),
        bands(SQUARE, more={339: 6}),
        bands(SQUARE, tile=16, more={322: 0}),
        bands(SQUARE, tile=16, more={322: 1 << 30, 323: 1 << 30}),
        bands(SQUARE)[:-1],
        bands(SQUARE, deflate=True)[:-20],
        bands(SQUARE)[:40],
        b"II*\0\xff\xff\xff\xff",
        b"MM\0+" + bytes(12),
    ],
    ids=lambda content: f"{len(content)} bytes",
)  # fmt: skip
def test_damaged_and_hostile_files_are_bad_images_too(content):
    assert isinstance(encode(content, 5), str)


def chained(first: bytes, second: bytes) -> bytes:
    """A TIFF with the pages of both files; `first` has one page."""
    shift = len(first) + len(first) % 2
    count = struct.unpack_from("<H", second, 8)[0]
    moved = bytearray(second)
    inline = {3: 2, 4: 1}  # values that fit into an entry
    for entry in range(10, 10 + 12 * count, 12):
        tag, type_, number = struct.unpack_from("<HHI", moved, entry)
        if number > inline[type_] or tag in (273, 324):
            struct.pack_into("<I", moved, entry + 8, struct.unpack_from("<I", moved, entry + 8)[0] + shift)
    pages = struct.unpack_from("<H", first, 8)[0]
    whole = bytearray(first.ljust(shift, b"\0") + moved)
    struct.pack_into("<I", whole, 10 + 12 * pages, shift + 8)
    return bytes(whole)


def test_overviews_are_no_channels():
    """As in cloud-optimized GeoTIFFs."""
    image, small = values(0, (24, 20, 5)), values(1, (12, 10, 5))
    np.testing.assert_array_equal(pixels_of(encode(chained(bands(image), bands(small)), 5), 5), resized(image))
    assert "has several pages of 5 bands" in encode(chained(bands(image), bands(image)), 5)
    loop = bytearray(bands(image))
    struct.pack_into("<I", loop, 10 + 12 * struct.unpack_from("<H", loop, 8)[0], 8)
    assert "has several pages of 5 bands" in encode(bytes(loop), 5)
    assert "white as 0" in encode(bands(image, more={262: 0}), 5)


def test_a_missing_tag_is_named():
    content = bands(SQUARE)
    entry = struct.pack("<HH", 273, 4)  # StripOffsets
    assert content.count(entry) == 1
    assert "is a TIFF that lacks the tag 273" in encode(content.replace(entry, struct.pack("<HH", 272, 4)), 5)


def test_a_deflate_bomb_takes_no_more_memory_than_the_image():
    large = bands(np.zeros((4000, 4000, 5), np.uint8), deflate=True)
    assert "--max-megapixels sets the limit" in encode(large, 5, megapixels=20)
    assert not isinstance(encode(large, 5, megapixels=30), str)
    assert "--max-megapixels" in encode(npy(np.zeros((5, 4000, 4000), np.uint8)), 5, megapixels=20)
    assert "--max-megapixels" in encode(stack([np.zeros((2000, 2000), np.uint8)] * 5), 5, megapixels=6)


# --- the file ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        path = folder / f"c{number % 2}" / f"{number:02}"
        path.parent.mkdir(exist_ok=True)
        image = values(number, (20 + number, 24, 5))
        if number % 3:
            path.with_suffix(".tif").write_bytes(stack(list(np.moveaxis(image, 2, 0))))
        else:
            path.with_suffix(".NPY").write_bytes(npy(image))
    return folder


@pytest.fixture(scope="module")
def beton(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    build_beton("imagefolder", source, out, canvas=SIDE, workers=1, order="source", channels=5)
    return out / "train.beton"


def test_every_file_is_accounted_for(source, tmp_path):
    report = build_beton("imagefolder", source, tmp_path, canvas=SIDE, workers=1, channels=5)
    assert "Of 12 files in" in report.account and ": 12 read." in report.account and "12 stored" in report.account
    manifest = json.loads((tmp_path / "train.beton.json").read_text())
    assert manifest["channels"] == 5 and manifest["storage"] == "raw" and manifest["source_formats"]["NPY"] == 4
    assert recorded_plan(manifest) == StoragePlan("canvas", SIDE, 90, channels=5)
    again = build_beton("imagefolder", source, tmp_path, canvas=SIDE, workers=1, channels=5)
    assert again.splits[0].up_to_date
    other = build_beton("imagefolder", source, tmp_path / "rgb", canvas=SIDE, workers=1)
    assert "4 not images by their suffix (.npy 4)" in other.account
    assert "channels" not in json.loads((tmp_path / "rgb" / "train.beton.json").read_text())


def test_the_field_is_that_of_ffcv(beton):
    from ffcv.fields import NDArrayField

    content = np.fromfile(beton, np.uint8)
    descriptor = content[layout.HEADER.itemsize :][: layout.FIELD.itemsize].view(layout.FIELD)[0]
    ours = descriptor["arguments"]
    assert np.array_equal(ours, NDArrayField(np.dtype("uint8"), (SIDE, SIDE, 5)).to_binary()["f0"])
    field = NDArrayField.from_binary(ours)
    assert field.shape == (SIDE, SIDE, 5) and field.dtype == np.uint8
    assert layout.read_array_images(ours) == (SIDE, SIDE, 5, layout.RAW)


def test_stock_ffcv_reads_the_file(beton):
    from ffcv.loader import Loader, OrderOption

    loader = Loader(str(beton), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True)
    theirs = np.concatenate([np.array(batch[0]) for batch in loader])
    ours = BetonLoader(beton, 4, shuffle=False)
    np.testing.assert_array_equal(theirs, np.concatenate([batch.image.numpy() for batch in ours]))


def test_stock_ffcv_writes_what_is_read(tmp_path):
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    images = values(0, (6, 9, 7, 4))
    fields = {"label": IntField(), "image": NDArrayField(np.dtype("uint8"), (9, 7, 4))}
    path = tmp_path / "stock.beton"
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset([(i, images[i]) for i in range(6)])
    info = read_header(path)
    assert (info.channels, info.resolution, info.layout, info.storage) == (4, (9, 7), "canvas", "raw")
    (batch,) = BetonLoader(path, 6, shuffle=False)
    np.testing.assert_array_equal(batch.image.numpy(), images)
    assert batch.label.tolist() == list(range(6)) and batch.height.tolist() == [9] * 6


def test_the_loader_gives_the_pixels(beton, source):
    want = [
        resized(values(number, (20 + number, 24, 5))) for label in (0, 1) for number in range(12) if number % 2 == label
    ]
    loaders = BetonLoader(beton, 12, shuffle=False), BetonLoader(beton, 12, shuffle=False, resident=True)
    for loader in loaders:
        (batch,) = loader
        np.testing.assert_array_equal(batch.image.numpy(), np.stack(want))
        assert loader.image_bytes == SIDE * SIDE * 5
    for crop in ("cpu", "eval"):
        with pytest.raises(UserError, match=f"images of 5 channels, and data.crop={crop} cuts RGB images only"):
            from fastssl.recipe import ViewsConfig

            BetonLoader(beton, 4, crop=crop, views=ViewsConfig())


def test_it_is_inspected_verified_and_drawn(beton, tmp_path, monkeypatch, capsys):
    info = read_header(beton)
    assert (info.channels, info.resolution, info.fields["image"]) == (5, (SIDE, SIDE), "NDArrayField")
    monkeypatch.setattr("sys.argv", ["fastssl", "inspect", str(beton), "--verify", "--workers", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr().out
    assert end.value.code == 0 and "channels" in out and "All 12 samples decode and match their checksums." in out
    assert draw_sheet(beton, tmp_path / "sheet.png") == 12
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


@pytest.mark.parametrize("place", ["pixels", "label", "pointer"])
def test_one_wrong_bit_is_found(beton, tmp_path, place):
    content = bytearray(beton.read_bytes())
    metadata, sizes = read_samples(beton)
    row = layout.metadata_type(layout.OUR_ARRAY_FIELDS)
    table = layout.HEADER.itemsize + len(layout.OUR_ARRAY_FIELDS) * layout.FIELD.itemsize
    position = {
        "pixels": int(metadata["image"]["data_ptr"][5]) + int(sizes[5]) - 1,
        "label": table + 5 * row.itemsize + row.fields["label"][1],
        "pointer": table + 5 * row.itemsize,
    }[place]
    content[position] ^= 1
    copy = tmp_path / "train.beton"
    copy.write_bytes(content)
    (tmp_path / "train.beton.json").write_bytes((beton.parent / "train.beton.json").read_bytes())
    if place == "pointer":
        with pytest.raises(UserError, match="its images point at data that is not theirs"):
            read_header(copy)
        return
    with pytest.raises(UserError, match="is damaged"):
        verify(copy, workers=1).verdict()


@pytest.mark.parametrize(
    "shape, type_, match",
    [
        ((SIDE, SIDE, 4), layout.UINT8, "does not fit their height and width"),
        ((SIDE, 2 * SIDE, 5), layout.UINT8, "does not fit their height and width"),
        ((SIDE, SIDE), layout.UINT8, r"arrays of shape \[16, 16\], not"),
        ((SIDE, SIDE, 5, 1), layout.UINT8, "arrays of shape"),
        ((0, SIDE, 5), layout.UINT8, "arrays of shape"),
        ((SIDE, SIDE, 65), layout.UINT8, "1 to 64 channels"),
        ((1 << 63, 2, 5), layout.UINT8, "arrays of shape"),
        ((1 << 16, SIDE, 5), layout.UINT8, "arrays of shape"),
        ((SIDE, SIDE, 5), b'[["", "<f4"]]', "arrays of another type than uint8"),
        ((SIDE, SIDE, 5), b'[["", "|u1"], ["", "|u1"]]', "arrays of another type"),
        ((SIDE, SIDE, 5), b"", "arrays of another type"),
        ((SIDE, SIDE, 5), b"[" * 700, "arrays of another type"),
    ],
)
def test_hostile_arguments_are_refused(beton, tmp_path, shape, type_, match):
    content = bytearray(beton.read_bytes())
    descriptors = np.frombuffer(content, layout.FIELD, 1, layout.HEADER.itemsize)
    header = np.zeros(1, layout.ARRAY)
    header["shape"][0, : len(shape)] = shape
    header["type_length"] = len(type_)
    arguments = np.zeros(1024, np.uint8)
    packed = np.frombuffer(header.tobytes() + type_, np.uint8)
    arguments[: len(packed)] = packed
    descriptors["arguments"][0] = arguments
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_header(path)


def test_a_length_of_the_type_beyond_the_arguments_is_refused(beton, tmp_path):
    content = bytearray(beton.read_bytes())
    descriptors = np.frombuffer(content, layout.FIELD, 1, layout.HEADER.itemsize)
    descriptors["arguments"][0][256:264] = 255
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(UserError, match="arrays of another type"):
        read_header(tmp_path / "x.beton")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"channels": 0}, "--channels must be from 1 to 64, got 0"),
        ({"channels": 65}, "--channels must be from 1 to 64, got 65"),
        ({"channels": 5, "max_side": 100}, "--channels 5 stores squares of pixels: use --canvas"),
        ({"channels": 64, "canvas": 512}, "take more than a page of 8,388,608 bytes: use --canvas 362 or less"),
    ],
)
def test_options_that_cannot_be(source, tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        build_beton("imagefolder", source, tmp_path, **options)


def test_a_large_canvas_of_one_channel_is_stored_as_pixels(tmp_path):
    folder = tmp_path / "source" / "c"
    folder.mkdir(parents=True)
    for number in range(3):
        photo(number, 120, 90).save(folder / f"{number}.jpg")
    report = build_beton("imagefolder", folder.parent, tmp_path / "out", canvas=100, workers=1, channels=1)
    info = read_header(report.splits[0].path)
    assert (info.channels, info.storage, info.resolution) == (1, "raw", (100, 100))
    (batch,) = BetonLoader(info.path, 3)
    assert batch.image.shape == (3, 100, 100, 1)


def test_csv_lists_arrays_by_their_path(source, tmp_path):
    lines = ["path,label", *(f"{path},{path.parent.name}" for path in sorted(source.rglob("*.*")))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    report = build_beton("csv", tmp_path / "list.csv", tmp_path / "out", canvas=SIDE, workers=1, channels=5)
    assert report.splits[0].samples == 12 and report.splits[0].bad == 0
