"""`fastssl inspect`: its tables, every kind of damage that --verify finds, and its sheet."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl import cli
from fastssl.beton import build_beton, draw_sheet, format, read_samples, verify
from fastssl.common.errors import UserError


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Run `fastssl inspect` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastssl", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def folders(forty_photos, tmp_path_factory) -> dict[str, Path]:
    """The photographs as pixels and as JPEGs of several sizes: folders with train.beton."""
    out = tmp_path_factory.mktemp("inspected")
    for way, options in {"raw": {"canvas": 32}, "jpg": {"max_side": 100}}.items():
        build_beton("imagefolder", forty_photos, out / way, workers=1, **options)
    return {way: out / way for way in ("raw", "jpg")}


@pytest.fixture
def copied(folders, tmp_path):
    """Copy one of these folders, to damage it; returns the path of its train.beton."""

    def copy(way: str) -> Path:
        return Path(shutil.copytree(folders[way], tmp_path / way)) / "train.beton"

    return copy


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, Path]:
    """Files of FFCV's own writer: JPEGs with labels, and pixels without any other field."""
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    folder = tmp_path_factory.mktemp("stock")
    images = [np.asarray(photo(n, 24, 16)) for n in range(30)]
    labelled = {"image": RGBImageField("jpg"), "label": IntField(), "weight": FloatField()}
    alone = {"image": RGBImageField("raw")}
    rows = {"labelled": [(image, n % 3 - 1, 0.5) for n, image in enumerate(images)]}
    rows["alone"] = [(image,) for image in images]
    for name, fields in {"labelled": labelled, "alone": alone}.items():
        writer = DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1)
        writer.from_indexed_dataset(rows[name])
    return {name: folder / f"{name}.beton" for name in rows}


def row_of(out: str, name: str) -> str:
    """Return the line of a table that begins with this name, with single blanks."""
    line = next(line for line in out.splitlines() if line.strip().startswith(name))
    return re.sub(r"\s+", " ", line).strip()


# --- tables ------------------------------------------------------------------------------


def test_the_tables(inspect, forty_photos, folders):
    code, out, _ = inspect(folders["jpg"] / "train.beton")
    manifest = json.loads((folders["jpg"] / "train.beton.json").read_text())
    assert code == 0
    assert row_of(out, "samples") == "samples 40"
    assert "image (RGBImageField), label (IntField)" in row_of(out, "fields")
    assert row_of(out, "layout") == "layout full" and row_of(out, "images stored as") == "images stored as JPEG"
    assert row_of(out, "height x width") == "height x width 99 x 100 px at most"
    assert row_of(out, "checksums") == "checksums for every sample"
    assert len(row_of(out, "bytes per image").split()) == 3 + 7
    sizes = np.array([Image.open(path).size for path in forty_photos.glob("*/*.jpg")])
    for side, columns in (("source width, px", sizes[:, 0]), ("source height, px", sizes[:, 1])):
        low, quarter, median, three_quarters, most, high = np.quantile(columns, (0, 0.25, 0.5, 0.75, 0.95, 1))
        values = low, quarter, median, columns.mean(), three_quarters, most, high
        assert row_of(out, side) == " ".join([side, *(f"{value:.0f}" for value in values)])
    # min, 25 %, median, mean, 75 %, 95 %, max
    assert row_of(out, "source height, px") == "source height, px 70 80 89 89 98 106 108"
    assert row_of(out, "stored height, px").endswith(" 99") and row_of(out, "stored width, px").endswith(" 100")
    assert "names.txt" in row_of(out, "names")
    assert row_of(out, "largest side") == "largest side, px 100"
    assert row_of(out, "order") == "order shuffled with seed 0"
    assert row_of(out, "source formats") == "source formats JPEG 40"
    assert row_of(out, "stored unchanged") == f"stored unchanged {manifest['counts']['passed_through']} images"
    assert "larger than max side" in row_of(out, "encoded again")
    assert row_of(out, "bird") == f"bird 20 {'█' * 30}"
    assert "2 classes, samples per class: min 20, median 20, max 20" in out

    code, out, _ = inspect(folders["raw"] / "train.beton")
    assert "32 x 32 px, all images" in row_of(out, "height x width") and row_of(out, "canvas") == "canvas, px 32"
    assert row_of(out, "stored as pixels") == "stored as pixels 40 images" and "stored height" not in out


def test_the_tables_of_a_stock_ffcv_file(inspect, stock):
    code, out, _ = inspect(stock["labelled"])
    assert code == 0 and row_of(out, "manifest").startswith("manifest none")
    assert "weight (FloatField)" in row_of(out, "fields") and "16 x 24 px" in row_of(out, "height x width")
    assert "10 without a label" in out and "source" not in out
    code, out, _ = inspect(stock["alone"])
    assert code == 0 and row_of(out, "images stored as") == "images stored as pixels" and "classes" not in out


def test_with_many_classes_only_the_largest_and_the_smallest_are_shown(inspect, folders, copied):
    """50 classes, 48 of them without samples; names that a terminal must not take for commands."""
    path = copied("raw")
    manifest = json.loads((folders["raw"] / "train.beton.json").read_text())
    manifest["classes"] += [f"empty{n}" for n in range(45)] + ["[bold]", ":cat:", "a\tb \x1b[2J"]
    path.with_name("train.beton.json").write_text(json.dumps(manifest))
    code, out, _ = inspect(path)
    assert code == 0 and "50 classes, samples per class: min 0, median 0, max 20" in out
    assert row_of(out, "… 30 more") == "… 30 more 0 to 0"
    assert row_of(out, "cat") == f"cat 20 {'█' * 30}" and row_of(out, "[bold]") == "[bold] 0"
    assert ":cat:" in out and r"a\tb \x1b[2J" in out and "empty8" not in out


# --- verification ------------------------------------------------------------------------


def overwrite(path: Path, position: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)


def change_byte(path: Path, position: int) -> None:
    overwrite(path, position, bytes([path.read_bytes()[position] ^ 0x10]))


def table_position(sample: int, column: str) -> int:
    """Return the position of the lowest byte of a sample's metadata, such as "image.height"."""
    row = format.metadata_type(format.OUR_FIELDS)
    start = format.HEADER.itemsize + len(format.OUR_FIELDS) * format.FIELD.itemsize
    outer, _, inner = column.partition(".")
    within = row.fields[outer][1] + (row[outer].fields[inner][1] if inner else 0)
    return start + sample * row.itemsize + within


@pytest.mark.parametrize("way", ["raw", "jpg"])
def test_a_sound_file(inspect, folders, way):
    code, out, _ = inspect(folders[way] / "train.beton", "--verify", "--workers", 1)
    assert code == 0 and out.endswith("\nAll 40 samples decode and match their checksums.\n")
    assert "\nsample" not in out


def test_each_damaged_image_is_named_with_its_problem(inspect, copied):
    path = copied("jpg")
    metadata, sizes = read_samples(path)
    start = metadata["image"]["data_ptr"].astype(int)
    names = path.with_name("train.beton.names.txt").read_text().splitlines()

    change_byte(path, start[0] + sizes[0] // 2)  # one bit of the compressed pixels
    overwrite(path, start[7], b"rubbish")
    overwrite(path, start[9], jpeg_bytes(photo(0, 16, 8), quality=50))  # a sound one of another size
    overwrite(path, start[39] + sizes[39] // 2, bytes(int(sizes[39]) - int(sizes[39]) // 2))
    change_byte(path, table_position(20, "image.height"))

    code, out, err = inspect(path, "--verify", "--workers", 2)
    assert code == 2 and f"error: {path} is damaged: " in err
    assert "damaged: its metadata table and 5 of 40 samples\nhint: copy it again" in err
    said = dict(
        re.fullmatch(r"sample (\d+), (index \d+, .*?): (.*)", line).groups()[::2]
        for line in out.splitlines()
        if line.startswith("sample ")
    )
    assert list(said) == ["0", "7", "9", "20", "39"]
    for position in map(int, said):
        index = metadata["index"][position]
        assert f"sample {position}, index {index}, {names[index]}: " in out
    assert said["0"].startswith("does not match its checksum, ")
    assert said["7"].startswith("does not match its checksum, and does not decode: Not a JPEG")
    height, width = (metadata["image"][side][9] for side in ("height", "width"))
    assert said["9"].endswith(f"and is 8 x 16 px, by its metadata {height} x {width} px")
    assert "checksum" not in said["20"] and "by its metadata" in said["20"]
    assert re.search("does not match its checksum, and (does not decode|decodes with a warning)", said["39"])
    assert "\nmetadata table: does not match its checksum" in out


def test_one_wrong_bit_is_found_in_a_pixel_a_checksum_and_the_table(copied):
    path = copied("raw")
    metadata, _ = read_samples(path)
    change_byte(path, int(metadata["image"]["data_ptr"][11]) + 1000)
    manifest_path = path.with_name("train.beton.json")
    manifest = json.loads(manifest_path.read_text())
    samples = manifest["checksums"]["samples"]
    digit = 8 * 25 + 7
    manifest["checksums"]["samples"] = samples[:digit] + f"{int(samples[digit], 16) ^ 1:x}" + samples[digit + 1 :]
    manifest_path.write_text(json.dumps(manifest))
    found = verify(path, workers=1)
    assert [(fault.position, fault.problem) for fault in found.faults] == [
        (11, "does not match its checksum, but decodes"),
        (25, "does not match its checksum, but decodes"),
    ]
    assert [fault.index for fault in found.faults] == metadata["index"][[11, 25]].tolist()
    assert not found.damaged_tables

    change_byte(path, table_position(3, "height"))
    path.with_name("train.beton.names.txt").unlink()
    found = verify(path, workers=1)
    assert found.damaged_tables and len(found.faults) == 2 and found.faults[0].name == ""
    with pytest.raises(UserError, match="damaged: its metadata table and 2 of 40 samples: copy"):
        found.verdict()
    with pytest.raises(UserError, match="damaged: its metadata table: copy"):
        found._replace(faults=[]).verdict()


def test_without_checksums_images_are_only_decoded(inspect, copied, stock):
    path = copied("jpg")
    manifest_path = path.with_name("train.beton.json")
    manifest = json.loads(manifest_path.read_text())
    del manifest["checksums"]
    manifest_path.write_text(json.dumps(manifest))
    overwrite(path, int(read_samples(path)[0]["image"]["data_ptr"][5]), b"rubbish")
    code, out, err = inspect(path, "--verify", "--workers", 1)
    assert code == 2 and "1 of 40 samples" in err
    assert "\nsample 5, index" in out and "There are no checksums for" in out

    code, out, _ = inspect(stock["labelled"], "--verify", "--workers", 1)
    assert code == 0 and "There are no checksums for" in out
    assert out.endswith("\nAll 30 samples decode.\n")


@pytest.mark.parametrize(
    "damage",
    [
        lambda sums: sums.update(samples=sums["samples"][:-1]),
        lambda sums: sums.update(samples=sums["samples"][:-8]),
        lambda sums: sums.update(samples=sums["samples"][:-8] + "nonsense"),
        lambda sums: sums.update(samples=sums["samples"][:-8] + "00  0000"),
        lambda sums: sums.update(samples=17),
        lambda sums: sums.update(metadata=""),
        lambda sums: sums.update(algorithm="md5"),
        lambda sums: sums.pop("metadata"),
    ],
)
def test_damaged_checksums_are_a_user_error(copied, damage):
    path = copied("raw")
    manifest_path = path.with_name("train.beton.json")
    manifest = json.loads(manifest_path.read_text())
    damage(manifest["checksums"])
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train.beton.json (is|are) damaged.*checksums"):
        verify(path, workers=1)


def test_mistakes_are_user_errors(inspect, folders, copied, tmp_path):
    sound = folders["raw"] / "train.beton"
    cut_off = copied("raw")
    cut_off.write_bytes(cut_off.read_bytes()[:-1000])
    (tmp_path / "file").write_text("")
    for arguments, says in (
        ([tmp_path / "none.beton"], "none.beton\nhint: make it with"),
        ([cut_off, "--verify"], "not a .beton file"),
        ([sound, "--verify", "--workers", 0], "--workers must be 1 or more, got 0"),
        ([sound, "--sheet", tmp_path / "sheet.jpg"], "is not a PNG file"),
        ([sound, "--sheet", tmp_path / "file" / "sheet.png"], "sheet.png cannot be written"),
        ([sound, "--subset", tmp_path / "no list"], "No file"),
    ):
        code, _, err = inspect(*arguments)
        assert (
            code == 2 and says in err and [line.partition(": ")[0] for line in err.splitlines()] == ["error", "hint"]
        ), err


# --- the sheet -------------------------------------------------------------------------

CELL_WIDTH, CELL_HEIGHT = 160 + 14, 160 + 2 * 18 + 14
FIRST_ROW = 14 + 18 + 14


def cells(sheet: Path, count: int) -> list[np.ndarray]:
    """Return the part of the sheet for each thumbnail, uint8 (160, 160, 3), row by row."""
    pixels = np.asarray(Image.open(sheet))
    corners = [(FIRST_ROW + n // 6 * CELL_HEIGHT, 14 + n % 6 * CELL_WIDTH) for n in range(count)]
    return [pixels[top : top + 160, left : left + 160] for top, left in corners]


def test_the_sheet_shows_every_sample_upright_and_in_order(inspect, folders, tmp_path):
    """All 40 samples of the file: each cell is compared with the stored image."""
    path, sheet = folders["raw"] / "train.beton", tmp_path / "new" / "sheet.png"
    code, out, _ = inspect(path, "--sheet", sheet)
    assert code == 0 and f"{sheet} shows 40 samples." in out
    drawn = Image.open(sheet)
    assert drawn.format == "PNG" and drawn.size == (14 + 6 * CELL_WIDTH, FIRST_ROW + 7 * CELL_HEIGHT)
    content, metadata = path.read_bytes(), read_samples(path)[0]
    for cell, row in zip(cells(sheet, 40), metadata, strict=True):
        start = int(row["image"]["data_ptr"])
        stored = np.frombuffer(content[start : start + 32 * 32 * 3], np.uint8).reshape(32, 32, 3)
        assert (cell == stored.repeat(5, 0).repeat(5, 1)).all()
    assert [entry.name for entry in sheet.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_with_unusual_names_and_sizes_and_a_damaged_image(tmp_path):
    """Nothing is drawn outside of its cell, whatever the name; an image that does not decode is a crossed box."""
    names = ["кошка, которая гуляет сама по себе", "x" * 250, "naïve", "a\nb", "猫", "[b]"]
    for n, name in enumerate(names):
        (tmp_path / "source" / name).mkdir(parents=True)
        size = [(300, 90), (400, 3), (20, 14), (90, 700), (1500, 900), (161, 161)][n]
        photo(n, *size).save(tmp_path / "source" / name / "0.jpg", quality=95)
    path = build_beton("imagefolder", tmp_path / "source", tmp_path, max_side=2000, workers=1).splits[0].path
    metadata, _ = read_samples(path)
    damaged = int(np.argmax(metadata["image"]["width"] == 300))
    overwrite(path, int(metadata["image"]["data_ptr"][damaged]), b"rubbish")
    assert draw_sheet(path, tmp_path / "sheet.png") == 6
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (14 + 6 * CELL_WIDTH, FIRST_ROW + CELL_HEIGHT)
    page = sheet.getpixel((0, 0))
    for position, cell in enumerate(cells(tmp_path / "sheet.png", 6)):
        drawn = (cell != page).any(axis=2)
        width, height = (int(metadata["image"][side][position]) for side in ("width", "height"))
        if position == damaged:
            edges = (cell[0], cell[-1], cell[:, 0], cell[:, -1])
            assert all((edge == cell[0, 0]).all() for edge in edges) and cell[0, 0].max() < 128
            continue
        scale = 160 / max(width, height) if max(width, height) > 160 else 160 // max(width, height)
        assert drawn.any(1).sum() == pytest.approx(max(1, height * scale), abs=1)
        assert drawn.any(0).sum() == pytest.approx(max(1, width * scale), abs=1)
        assert cell[drawn].std() > 10
    pixels = np.asarray(sheet)
    for column in range(7):  # the gaps between the columns, captions included
        gap = pixels[FIRST_ROW:, column * CELL_WIDTH : column * CELL_WIDTH + 14]
        assert (gap == page).all()
    captions = pixels[FIRST_ROW + 160 : FIRST_ROW + CELL_HEIGHT, :]
    assert all((captions[:, 14 + n * CELL_WIDTH :][:, :160] < 60).any() for n in range(6))


def test_a_sheet_of_a_stock_file(stock, tmp_path):
    for name, path in stock.items():
        assert draw_sheet(path, tmp_path / f"{name}.png") == 30
    same = np.asarray(Image.open(tmp_path / "alone.png"))
    assert all(cell.std() > 10 for cell in cells(tmp_path / "alone.png", 30))
    draw_sheet(stock["alone"], tmp_path / "again.png")
    assert (np.asarray(Image.open(tmp_path / "again.png")) == same).all()
