"""The .beton format: stock FFCV reads our files, we read its files, and damaged files are refused."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import ffcv.types
import numpy as np
import pytest
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl.beton import build_beton, format, read_header, read_labels, read_metadata
from fastssl.beton.images import Case, StoragePlan, encode_image
from fastssl.common.errors import UserError

# numba complains, harmlessly, when one of FFCV's many short-lived pipelines is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SCALARS = ("label", "index", "height", "width")


def payloads(path: Path) -> list[bytes]:
    """Return the stored bytes of each sample, found through the allocation table."""
    content, reader = path.read_bytes(), Reader(str(path))
    table = {row["sample_id"]: row for row in reader.alloc_table}
    rows = [table[sample] for sample in range(reader.num_samples)]
    return [content[row["ptr"] : row["ptr"] + row["size"]] for row in rows]


@pytest.fixture(scope="module")
def betons(forty_photos, tmp_path_factory) -> dict[str, Path]:
    """The photographs, stored in each way."""
    out = tmp_path_factory.mktemp("betons")
    ways = {"raw": {"canvas": 32}, "jpg": {"canvas": 80, "codec": "jpeg"}, "full": {"max_side": 100}}
    for way, options in ways.items():
        build_beton("imagefolder", forty_photos, out / way, workers=2, **options)
    return {way: out / way / "train.beton" for way in ways}


# --- the format is FFCV's -----------------------------------------------------------------------


def test_the_dtypes_are_those_of_ffcv():
    assert format.VERSION == ffcv.types.CURRENT_VERSION
    assert format.HEADER == ffcv.types.HeaderType
    assert format.FIELD == ffcv.types.FieldDescType
    assert format.ALLOCATION == ffcv.types.ALLOC_TABLE_TYPE
    for type_id, (name, dtype) in format.FIELD_TYPES.items():
        field = ffcv.types.TYPE_ID_HANDLER[type_id]
        assert field.__name__ == name
        assert field.metadata_type.fget(None) == dtype  # no field's type depends on its arguments


def stock_loader(path: Path, decoder, os_cache: bool) -> dict[str, np.ndarray]:
    """Read every sample with FFCV's own Loader, in the order of the file."""
    pipelines = {"image": [decoder], **{name: [IntDecoder()] for name in SCALARS}}
    loader = Loader(
        str(path),
        batch_size=16,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines=pipelines,
    )
    batches = [[np.array(column) for column in batch] for batch in loader]
    columns = [np.concatenate(column) for column in zip(*batches, strict=True)]
    return dict(zip(pipelines, columns, strict=True))


@pytest.mark.parametrize("way, tolerance, os_cache", [("raw", 0, True), ("jpg", 30, False)])
def test_stock_ffcv_reads_a_canvas_file(forty_photos, betons, way, tolerance, os_cache):
    side = {"raw": 32, "jpg": 80}[way]
    got = stock_loader(betons[way], SimpleRGBImageDecoder(), os_cache)
    paths = sorted(forty_photos.glob("*/*.jpg"))
    assert sorted(got["index"][:, 0]) == list(range(len(paths)))
    assert got["index"][:, 0].tolist() != list(range(len(paths)))  # shuffled
    for row, index in enumerate(got["index"][:, 0]):
        image = Image.open(paths[index])
        expected = image.resize((side, side), Image.Resampling.BILINEAR)
        error = np.abs(got["image"][row].astype(int) - np.asarray(expected))
        assert error.max() <= tolerance and error.mean() <= tolerance / 10
        assert (got["width"][row, 0], got["height"][row, 0]) == image.size
        assert got["label"][row, 0] == index // 20


def test_stock_ffcv_reads_a_full_file(betons):
    got = stock_loader(betons["full"], CenterCropRGBImageDecoder((32, 32), 1.0), True)
    assert got["image"].shape == (40, 32, 32, 3)
    assert (got["image"].std(axis=(1, 2, 3)) > 5).all()


def test_the_full_layout_stores_the_bytes_of_a_jpeg_that_fits(forty_photos, betons):
    paths = sorted(forty_photos.glob("*/*.jpg"))
    metadata = read_metadata(betons["full"])
    unchanged = 0
    for row, stored in zip(metadata, payloads(betons["full"]), strict=True):
        path = paths[row["index"]]
        size = Image.open(path).size
        assert (row["width"], row["height"]) == size
        stored_size = Image.open(io.BytesIO(stored)).size
        assert stored_size == (row["image"]["width"], row["image"]["height"])
        if max(size) <= 100:
            unchanged += 1
            assert stored == path.read_bytes()
        else:
            assert max(stored_size) == 100
    manifest = json.loads(betons["full"].with_name("train.beton.json").read_text())
    assert 0 < unchanged < 40
    assert manifest["counts"] == {
        "passed_through": unchanged,
        "encoded": 40 - unchanged,
        "raw": 0,
        "bad": 0,
    }


def test_samples_do_not_cross_pages(tmp_path):
    """600 images of noise, 26 KB each, fill two pages."""
    for number in range(600):
        noise = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        (tmp_path / f"{number:03}.jpg").write_bytes(jpeg_bytes(Image.fromarray(noise), quality=98))
    build_beton("imagefolder", tmp_path, tmp_path.with_name(tmp_path.name + "-out"), max_side=128)
    path = tmp_path.with_name(tmp_path.name + "-out") / "train.beton"
    table = Reader(str(path)).alloc_table
    first, last = table["ptr"], table["ptr"] + table["size"] - 1
    assert (first // format.PAGE_SIZE == last // format.PAGE_SIZE).all()
    assert len(np.unique(first // format.PAGE_SIZE)) == 2
    assert read_header(path).num_samples == 600
    got = stock_loader(path, SimpleRGBImageDecoder(), os_cache=False)
    for row in (0, 299, 599):
        expected = np.asarray(Image.open(tmp_path / f"{got['index'][row, 0]:03}.jpg"))
        assert np.abs(got["image"][row].astype(int) - expected).mean() < 3


def test_read_header(betons):
    raw, jpg, full = (read_header(betons[way]) for way in ("raw", "jpg", "full"))
    assert list(raw.fields) == ["image", *SCALARS]
    assert (raw.layout, raw.storage, raw.resolution) == ("canvas", "raw", (32, 32))
    assert (jpg.layout, jpg.storage, jpg.resolution) == ("canvas", "jpg", (80, 80))
    assert (full.layout, full.storage, full.resolution) == ("full", "jpg", None)
    assert full.max_resolution == (99, 100)
    assert raw.num_samples == 40
    assert raw.classes == ["bird", "cat"]
    assert np.bincount(read_labels(betons["raw"])).tolist() == [20, 20]


def test_a_stock_ffcv_file_is_read(tmp_path):
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rows = [(np.full((24, 16, 3), n, np.uint8), n % 3, n / 2) for n in range(30)]
    fields = {"image": RGBImageField("raw"), "label": IntField(), "weight": FloatField()}
    path = tmp_path / "stock.beton"
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(rows)
    info = read_header(path)
    assert info.fields == {"image": "RGBImageField", "label": "IntField", "weight": "FloatField"}
    assert (info.num_samples, info.resolution, info.storage) == (30, (24, 16), "raw")
    assert info.manifest is None and info.classes is None
    assert read_labels(path).tolist() == [n % 3 for n in range(30)]


# --- one image ----------------------------------------------------------------------------------


def canvas_of(image: bytes | np.ndarray, side: int = 32) -> np.ndarray:
    encoded = encode_image(image, StoragePlan("canvas", side, 90))
    return np.frombuffer(encoded.payload, np.uint8).reshape(side, side, 3)


def file_bytes(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_grey_cmyk_palette_and_16_bit_become_rgb():
    original = photo(0, 32, 32)
    rgb = np.asarray(original).astype(int)
    grey = np.asarray(original.convert("L"))
    assert (canvas_of(file_bytes(original, "PNG")) == rgb).all()
    assert (canvas_of(file_bytes(original.convert("L"), "PNG")) == grey[..., None]).all()
    assert (canvas_of(np.asarray(original)) == rgb).all()
    assert (canvas_of(grey) == grey[..., None]).all()
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 99)
    assert (canvas_of(file_bytes(deep, "PNG")) == grey[..., None]).all()
    cmyk = canvas_of(jpeg_bytes(original.convert("CMYK")))
    assert np.abs(cmyk - rgb).mean() < 4
    palette = original.quantize(64)
    assert (canvas_of(file_bytes(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()


def test_transparency_is_composited_over_white():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (200, 0, 0, 255)
    got = canvas_of(file_bytes(Image.fromarray(pixels), "PNG"))
    assert (got[:16] == (200, 0, 0)).all() and (got[16:] == 255).all()
    palette = Image.fromarray(np.zeros((32, 32), np.uint8)).convert("P")
    assert (canvas_of(file_bytes(palette, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("layout", ["canvas", "full"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, layout):
    """Expected: Pillow's own exif_transpose."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = jpeg_bytes(photo(3, 60, 40), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    encoded = encode_image(stored, StoragePlan(layout, 64, 95))
    assert (encoded.source_width, encoded.source_height) == upright.size
    assert (encoded.case == Case.PASSED_THROUGH) == (layout == "full" and orientation == 1)
    if layout == "canvas":
        got = np.frombuffer(encoded.payload, np.uint8).reshape(64, 64, 3)
        expected = np.asarray(upright.resize((64, 64), Image.Resampling.BILINEAR))
        assert np.abs(got.astype(int) - expected).max() <= 1  # resized before it is rotated
    else:
        assert (encoded.width, encoded.height) == upright.size
        got = np.asarray(Image.open(io.BytesIO(encoded.payload)))
        assert np.abs(got.astype(int) - np.asarray(upright)).mean() < 4


def test_a_large_photograph_is_shrunk_as_by_torchvision():
    from torchvision.transforms import v2

    original = photo(4, 1200, 900)
    got = canvas_of(jpeg_bytes(original, quality=98), 64)
    decoded = np.array(Image.open(io.BytesIO(jpeg_bytes(original, quality=98))))
    expected = v2.functional.resize(v2.functional.to_image(decoded), [64, 64], antialias=True)
    expected = expected.permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected).max() <= 3


def test_a_photograph_with_damaged_exif_is_not_bad():
    stored = jpeg_bytes(photo(5, 40, 40), exif=b"Exif\0\0rubbish that is no TIFF")
    assert encode_image(stored, StoragePlan("canvas", 32, 90)).source_width == 40


# --- files that are refused -------------------------------------------------------------------


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_header(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.beton"
    with pytest.raises(UserError, match="x.beton: make it with `fastssl build-beton imagefolder"):
        read_header(path)
    with pytest.raises(UserError, match="is a folder, not a .beton file"):
        read_header(tmp_path)
    refused(path, b"", "not a .beton file: the header would end at byte 24 of 0")
    refused(path, b"\2\0", "not a .beton file: the header would end")
    refused(path, b"an image of a cat, an image of a dog", "not a .beton file")
    for seed in range(20):
        noise = np.random.default_rng(seed).bytes(20_000)
        refused(path, noise, "not a .beton file")
        refused(path, b"\2\0" + noise, "not a .beton file")


@pytest.mark.parametrize("keep", [10, 1000, 6000, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(betons, tmp_path, keep):
    content = betons["full"].read_bytes()
    keep = keep if isinstance(keep, int) else int(keep * len(content))
    refused(tmp_path / "x.beton", content[:keep], "not a .beton file")


HUGE = np.iinfo(np.uint64).max


@pytest.mark.parametrize(
    "match, part, column, value",
    [
        ("outside of the file", "table", "ptr", HUGE),
        ("outside of the file", "table", "ptr", 0),
        ("outside of the file", "table", "size", HUGE - 5),
        ("outside of the file", "table", "size", format.PAGE_SIZE),
        ("crosses the end of a page", "table", "ptr", format.PAGE_SIZE - 100),
        ("samples that it does not have", "table", "sample_id", 40),
        ("not theirs", "table", "sample_id", 4),
        ("not theirs", "image", "data_ptr", 77),
        ("not theirs", "image", "data_ptr", HUGE),
        ("does not fit", "image", "width", 33),
        ("without pixels", "image", "height", 0),
        ("neither", "image", "mode", 2),
        ("page size", "header", "page_size", 3 << 21),
        ("no samples", "header", "num_samples", 0),
        ("would end", "header", "num_samples", 1 << 60),
        ("fields", "header", "num_fields", 0),
        ("cut off", "header", "alloc_table_ptr", 8),
        ("cut off", "header", "alloc_table_ptr", HUGE),
    ],
)
def test_wrong_pointers_and_sizes_are_refused(betons, tmp_path, match, part, column, value):
    """One value of a sound file is changed, in the rows of sample 3 or in the header."""
    content = bytearray(betons["raw"].read_bytes())
    start = format.HEADER.itemsize + len(format.OUR_FIELDS) * format.FIELD.itemsize
    header = np.frombuffer(content, format.HEADER, 1)
    metadata = np.frombuffer(content, format.metadata_type(format.OUR_FIELDS), 40, start)
    table = np.frombuffer(content, format.ALLOCATION, 40, int(header["alloc_table_ptr"][0]))
    changed = {"header": header, "image": metadata["image"], "table": table}[part]
    changed[column][0 if part == "header" else 3] = value
    refused(tmp_path / "x.beton", bytes(content), match)


def test_a_manifest_that_is_damaged_or_belongs_to_another_file(betons, tmp_path):
    path = shutil.copy(betons["raw"], tmp_path / "x.beton")
    manifest = tmp_path / "x.beton.json"
    manifest.write_text("{")
    with pytest.raises(UserError, match="x.beton.json is damaged"):
        read_header(path)
    manifest.write_text('{"samples": 3, "classes": [], "layout": "canvas"}')
    with pytest.raises(UserError, match="does not belong"):
        read_header(path)


def test_a_million_samples_are_checked_in_a_second(tmp_path):
    """A file without image data: a million images of 2x2 px. The limit leaves room for a slow machine."""
    count = 1_000_000
    start = format.data_start(count)
    per_page = format.PAGE_SIZE // 12
    position = np.arange(count)
    rows = np.zeros(count, format.ROW)
    rows["mode"], rows["width"], rows["height"], rows["size"] = format.RAW, 2, 2, 12
    rows["index"], rows["source_height"], rows["source_width"] = position[::-1], 2, 2
    rows["data_ptr"] = start + position // per_page * format.PAGE_SIZE + position % per_page * 12
    with open(tmp_path / "large.beton", "wb") as file:
        format.write_tables(file, rows, int(rows["data_ptr"][-1]) + 12)
    began = time.process_time()
    assert read_header(tmp_path / "large.beton").num_samples == count
    assert time.process_time() - began < 3
