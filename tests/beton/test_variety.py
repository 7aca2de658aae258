"""Every kind of image file is stored as Pillow shows it, or is bad if Pillow does not show it."""

import io
import re
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from varied_images import in_mode, saved, varied_images

from fastssl.beton import build_beton, jpeg, read_header
from fastssl.beton.format import RAW
from fastssl.beton.images import Case, Encoded, StoragePlan, encode_all
from fastssl.beton.ranges import parse_range
from fastssl.common.errors import UserError

PLANS = {
    "canvas of pixels": StoragePlan("canvas", 32, 90),
    "canvas of JPEGs": StoragePlan("canvas", 72, 95, codec="jpeg"),
    "full": StoragePlan("full", 500, 95),
}
# Mean difference in grey levels. Pixels: a picture is turned before it is resized here, there afterwards. JPEG at
# quality 95 changes the smooth pictures by less than 3, and those of transparency, of one bit or of blocks by up to 8.
TOLERANCE = {"canvas of pixels": 0.5, "canvas of JPEGs": 9.0, "full": 9.0}


def as_shown(content: bytes) -> Image.Image | None:
    """Return what Pillow shows, over white; None if it shows nothing, or pixels without an agreed range."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.format == "EPS":
            return None
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError):
        return None
    if image.mode == "F":
        return None
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def stored_pixels(encoded: Encoded) -> np.ndarray:
    if encoded.mode == RAW:
        return np.frombuffer(encoded.payload, np.uint8).reshape(encoded.height, encoded.width, 3)
    return np.asarray(Image.open(io.BytesIO(encoded.payload)).convert("RGB"))


@pytest.mark.parametrize("layout", PLANS)
def test_each_file_is_stored_as_pillow_shows_it(layout):
    plan, files = PLANS[layout], list(varied_images())
    assert len(files) >= 190
    assert len({file.name for file in files}) == len(files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata
        results = encode_all([file.content for file in files], plan)
        wanted = [as_shown(file.shown) for file in files]
    wrong = []
    for file, result, image in zip(files, results, wanted):
        if image is None or isinstance(result, str):
            if image is not None or not isinstance(result, str):
                wrong.append(f"{file.name}: {result if image else 'stored, and Pillow shows nothing'}"[:160])
            continue
        size = (result.source_width, result.source_height)
        resized = image.resize((result.width, result.height), Image.Resampling.BILINEAR)
        difference = np.abs(stored_pixels(result).astype(int) - np.asarray(resized).astype(int)).mean()
        if size != image.size or difference > TOLERANCE[layout]:
            wrong.append(f"{file.name}: {size}, Pillow {image.size}; mean difference {difference:.2f}")
    assert not wrong, "\n".join(wrong)
    assert sum(image is not None for image in wanted) > 170


def test_what_the_loaders_decoder_refuses_is_never_stored_unchanged():
    odd = [file.content for file in varied_images() if "sampling factors" in file.name]
    refused = 0
    for content, result in zip(odd, encode_all(odd, PLANS["full"])):
        try:
            jpeg.check(content)
            assert result.case == Case.PASSED_THROUGH
        except ValueError:
            assert result.case == Case.DECODER_REFUSED
            refused += 1
    assert refused >= 5


# --- ranges ------------------------------------------------------------------------------------


def ramp(highest: int | float, dtype: type) -> np.ndarray:
    return np.linspace(0, highest, 32 * 32).reshape(32, 32).astype(dtype)


@pytest.mark.parametrize(
    ("pixels", "kind", "value_range", "highest"),
    [
        (ramp(65535, np.uint16), "PNG", "full", 255),
        (ramp(4095, np.uint16), "PNG", "full", 15),
        (ramp(4095, np.uint16), "PNG", "auto", 255),
        (ramp(4095, np.uint16), "TIFF", "auto", 255),
        (ramp(1000, np.uint16), "PNG", "auto", 250),
        (ramp(4095, np.uint16), "PNG", "0,4095", 255),
        (ramp(8190, np.uint16), "TIFF", "0,4095", 255),
        (ramp(255, np.int32), "TIFF", "auto", 255),
        (ramp(1, np.float32), "TIFF", "auto", 255),
        (ramp(10, np.float32), "TIFF", "0,20", 128),
        (ramp(255, np.uint8), "PNG", "0,4095", 255),
    ],
)
def test_the_range_says_which_value_is_white(pixels, kind, value_range, highest):
    content = saved(Image.fromarray(pixels), kind)
    (result,) = encode_all([content], StoragePlan("canvas", 32, 90, parse_range(value_range)))
    stored = stored_pixels(result)
    assert stored.min() == 0
    assert stored.max() == highest
    assert result.is_nearly_black == (highest < 32)


@pytest.mark.parametrize(
    ("pixels", "value_range", "reason"),
    [
        (ramp(70000, np.int32), "full", "outside 0 to 65,535; --range LOW,HIGH"),
        (ramp(4095, np.int32) - 9, "auto", "has values from -9 to 4086"),
        (ramp(1, np.float32), "full", "--range auto or --range LOW,HIGH reads them"),
        (np.full((32, 32), np.nan, np.float32), "auto", "infinite or not a number"),
        (np.full((32, 32), np.inf, np.float32), "0,1", "infinite or not a number"),
    ],
)
def test_pixels_outside_of_the_range_make_an_image_bad(pixels, value_range, reason):
    content = saved(Image.fromarray(pixels), "TIFF")
    (result,) = encode_all([content], StoragePlan("canvas", 32, 90, parse_range(value_range)))
    assert reason in result


@pytest.mark.parametrize("text", ["", "5", "4095,0", "1,1", "0,nan", "0,inf", "0,1,2", "low"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--range (is|must be)"):
        parse_range(text)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore:Image size")
def test_larger_images_than_the_option_allows_are_bad(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # encode_all sets it
    content = saved(Image.new("RGB", (1100, 1000), "white"), kind)
    plans = [StoragePlan("canvas", 32, 90, "full", megapixels) for megapixels in (1, 2)]
    refused, read = (encode_all([content], plan)[0] for plan in plans)
    assert refused == "ValueError: has more than 1 megapixels; --max-megapixels sets the limit"
    assert stored_pixels(read).min() == 255


@pytest.mark.parametrize(("canvas", "is_said"), [(16, False), (17, True)])
def test_a_canvas_of_more_than_twice_the_images_side_is_said(canvas, is_said, tmp_path, fastssl):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6 + number), (90, number, 0)).save(tmp_path / "photos" / f"{number}.png")
    command = f"build-beton imagefolder --source {tmp_path}/photos --out {tmp_path}/out --canvas {canvas} --workers 1"
    for more in ([], ["--dry-run"]):
        code, out, _ = fastssl(*command.split(), *more)
        said = " ".join(out.split())
        assert code == 0
        assert (
            "100% of the images of" in said and "a smaller --canvas, such as their own side, takes less space" in said
        ) == is_said


def test_a_build_names_the_first_images_that_are_nearly_black(fastssl, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(25):
        Image.fromarray(ramp(9 if number else 255, np.uint8)).save(photos / f"{number:02}.png")
    names = [f"{number:02}.png" for number in range(1, 25)]
    for shards in (1, 2):
        more = ("--shards", shards) if shards > 1 else ()
        out = tmp_path / str(shards)
        code, said, _ = fastssl("build-beton", "imagefolder", "--source", photos, "--out", out, "--canvas", 32, *more)
        said = " ".join(said.split())
        listed = re.search(r"range: 24 images of \S+ \(([^)]*), \.\.\.\)\. If such files", said)
        assert code == 0 and listed
        named = listed[1].split(", ")
        assert len(set(named)) == 20 and set(named) < set(names) and (shards > 1 or named == names[:20])


def test_a_build_counts_images_that_are_nearly_black(tmp_path):
    """Whatever their bit depth and layout, and the range is recorded."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(ramp(4095, np.uint16)).save(photos / "12_bits.png")
    Image.fromarray(ramp(9, np.uint8)).save(photos / "mask.png")
    in_mode("RGB").save(photos / "photo.png")
    for options, black in (
        ({"canvas": 32}, 2),
        ({"canvas": 128}, 2),
        ({"max_side": 99}, 2),
        ({"canvas": 32, "value_range": (0.0, 4095.0)}, 1),
    ):
        out = tmp_path / "-".join(options)
        for up_to_date in (False, True):
            (report,) = build_beton("imagefolder", photos, out, workers=1, **options).splits
            assert (report.nearly_black, report.up_to_date) == (black, up_to_date)
            assert report.nearly_black_names == ["12_bits.png", "mask.png"][-black:]
        manifest = read_header(report.path).manifest
        assert manifest["nearly_black"] == black
        assert manifest.get("range") == ("0,4095" if "value_range" in options else None)
