"""`fastssl embed`: a folder, a list or a .beton to one file, with the pixels of build-beton and the scores of eval."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import make_run

from fastssl.beton import build_beton
from fastssl.beton.sheet import draw_cells
from fastssl.common.errors import UserError
from fastssl.evaluation import cached_features, load_run_encoder
from fastssl.evaluation.embed import embed, embed_images, load_embedder, output, score, strangest
from fastssl.evaluation.ood import DETECTORS, LABEL_BASED, LABEL_FREE
from fastssl.evaluation.ood.evaluate import detector_arrays, embedding_prior, linear_head, shared_arrays
from fastssl.evaluation.ood.layers import cached_layers
from fastssl.evaluation.runs import BetonSubset
from fastssl.export import export_run


def run_of(folder: Path, betons: Path, **sections) -> Path:
    data = {"train": str(betons / "train.beton"), "val": str(betons / "val.beton")}
    make_run(folder, data, **{"embedding": {"stochastic": "z"}, **sections})
    return folder


@pytest.fixture(scope="module")
def run(canvas, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "run", canvas)


@pytest.fixture
def encoder(run):
    return load_run_encoder(run, device="cpu")


@pytest.fixture
def library(photos, tmp_path):
    """A photo library: nested folders, sidecars, litter of other programs, three bad images."""
    root = tmp_path / "library"
    shutil.copytree(photos / "val", root / "2019" / "summer")
    shutil.copy(photos / "train/class0/000.jpg", root / "zebra.JPG")
    for name in ("2019/notes.txt", "2019/summer/a.xmp", ".DS_Store", "2019/Thumbs.db"):
        (root / name).write_text("x")
    (root / "2019/@eaDir").mkdir()
    shutil.copy(root / "zebra.JPG", root / "2019/@eaDir/thumb.jpg")
    (root / "2019/empty.jpg").touch()
    (root / "2019/text.png").write_text("no image")
    whole = (root / "zebra.JPG").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:  # allow_pickle is False
        return dict(file)


def by_name(found: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    return {name: {key: x[i] for key, x in found.items() if key != "name"} for i, name in enumerate(found["name"])}


def assert_same_rows(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bit for bit, whatever their order."""
    a, b = by_name(one), by_name(other)
    assert a.keys() == b.keys() and one.keys() == other.keys()
    for name, row in a.items():
        for key, x in row.items():
            assert np.array_equal(x, b[name][key]), (name, key)


# -- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["canvas", "canvas_jpeg", "canvas_bc4", "full"])
@pytest.mark.parametrize("view", ["squash", "center"])
def test_a_folder_gives_what_its_beton_gives(kind, view, photos, request, tmp_path):
    betons = request.getfixturevalue(kind)
    encoder = load_embedder(run_of(tmp_path / "run", betons, views={"size": 24}), view, "cpu")
    options = {"score": "views_disagreement"}  # a function of the training views of each image
    embed_images(encoder, photos / "val", tmp_path / "folder.npz", workers=1, **options)
    embed_images(encoder, betons / "val.beton", tmp_path / "beton.npz", **options)
    folder, beton = read(tmp_path / "folder.npz"), read(tmp_path / "beton.npz")
    beton["name"] = np.array([name.removeprefix("val/") for name in beton["name"]])
    assert_same_rows(folder, beton)
    assert len(folder["name"]) == 12 and list(folder["name"]) == sorted(folder["name"])
    assert {key: x.dtype.str for key, x in folder.items()} == {
        "name": "<U14", "score": "<f8", "h": "<f4", "mu": "<f4", "sigma": "<f4"
    }  # fmt: skip
    assert not np.array_equal(folder["h"][0], folder["h"][1])


def test_options_of_the_build_are_followed(tmp_path):
    """--range, --quality and --max-megapixels of the training file, on 16-bit pixels and JPEG canvases."""
    root, rng = tmp_path / "scans", np.random.default_rng(0)
    root.mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 4095, (80, 90), dtype=np.uint16)).save(root / f"{number}.png")
    Image.fromarray(rng.integers(0, 4095, (1200, 1000), dtype=np.uint16)).save(root / "large.png")
    build = {"canvas": 72, "codec": "jpeg", "quality": 40, "value_range": (0.0, 4095.0), "max_megapixels": 1}
    build_beton("imagefolder", root, tmp_path / "data", workers=1, **build)
    encoder = load_run_encoder(run_of(tmp_path / "run", tmp_path / "data"), device="cpu")
    report = embed_images(encoder, root, tmp_path / "folder.npz", workers=1)
    embed_images(encoder, tmp_path / "data/train.beton", tmp_path / "beton.npz")
    folder, beton = by_name(read(tmp_path / "folder.npz")), by_name(read(tmp_path / "beton.npz"))
    for name, row in folder.items():
        for key, x in row.items():
            # To the rounding of matrix products: the bad image makes the batch of the folder larger by one row.
            np.testing.assert_allclose(x, beton[name][key], rtol=1e-5, atol=1e-6)
    assert folder.keys() == beton.keys()
    assert report.conversion.is_recorded and "canvas of 72 x 72 px, JPEG quality 40" in report.conversion.reason
    assert [image.name for image in report.bad] == ["large.png"] and "1 megapixels" in report.bad[0].reason


@pytest.mark.parametrize("channels, dtype", [(1, "uint8"), (2, "uint16"), (5, "uint8")])
def test_images_of_other_channels(channels, dtype, canvas, tmp_path):
    root, rng = tmp_path / "bands", np.random.default_rng(0)
    root.mkdir()
    for number in range(4):
        pixels = rng.integers(0, np.iinfo(dtype).max, (40, 50, channels)).astype(dtype)
        if channels == 1:
            Image.fromarray(pixels[..., 0]).save(root / f"{number}.png")
        else:
            np.save(root / f"{number}.npy", pixels)
    build_beton("imagefolder", root, tmp_path / "data", canvas=32, workers=1, channels=channels)
    views = {"size": 16, "mean": [0.5] * channels, "std": [0.2] * channels, "gray": 0, "jitter": {"p": 0}}
    model = {"backbone": "test_resnet", "in_chans": channels, "projector": {"layers": 2, "hidden": 16, "out": 8}}
    encoder = load_run_encoder(run_of(tmp_path / "run", tmp_path / "data", views=views, model=model), device="cpu")
    report = embed_images(encoder, root, tmp_path / "folder.npz", score="knn_euclidean", workers=1)
    embed_images(encoder, tmp_path / "data/train.beton", tmp_path / "beton.npz", score="knn_euclidean")
    assert_same_rows(read(tmp_path / "folder.npz"), read(tmp_path / "beton.npz"))
    assert "4 read." in report.account and "4 embedded." in report.account
    with pytest.raises(UserError, match="3 channels"):
        embed_images(encoder, canvas / "val.beton", tmp_path / "x.npz")


def test_batches_do_not_change_what_an_image_gives(encoder, photos, tmp_path, monkeypatch):
    """Several batches, the last one not full; the names belong to their rows."""
    embed_images(encoder, photos, tmp_path / "one.npz", workers=1)
    monkeypatch.setattr("fastssl.evaluation.embed.embed.BATCH_SIZE", 7)
    embed_images(encoder, photos, tmp_path / "many.npz", workers=1)
    one, many = read(tmp_path / "one.npz"), read(tmp_path / "many.npz")
    assert np.array_equal(one["name"], many["name"]) and len(one["name"]) == 60
    for key in ("h", "mu", "sigma"):
        np.testing.assert_allclose(one[key], many[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["moved", "no manifest", "damaged manifest"])
def test_without_the_training_file_a_sentence_names_the_canvas(damage, canvas, photos, tmp_path):
    shutil.copytree(canvas, tmp_path / "data")
    encoder = load_run_encoder(run_of(tmp_path / "run", tmp_path / "data"), device="cpu")
    manifest = tmp_path / "data/train.beton.json"
    if damage == "moved":
        shutil.rmtree(tmp_path / "data")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "canvas": "large"}))
    report = embed_images(encoder, photos / "val", tmp_path / "x.npz", workers=1)
    assert not report.conversion.is_recorded
    assert "views.size=16, images are converted to a canvas of 32 x 32 px, pixels" in report.conversion.reason
    embed_images(load_run_encoder(run_of(tmp_path / "b", canvas), device="cpu"), photos / "val", tmp_path / "y.npz")
    assert np.array_equal(read(tmp_path / "x.npz")["h"], read(tmp_path / "y.npz")["h"])  # also a canvas of 32 px


# -- which images ---------------------------------------------------------------------------------


def test_a_photo_library_is_accounted_for(fastssl, run, library, tmp_path):
    out = tmp_path / "out.npz"
    code, shown, err = fastssl("embed", run, library, "--out", out, "--workers", 1)
    assert code == 0, err
    found = read(out)
    assert len(found["name"]) == 13 and {"zebra.JPG", "2019/summer/class0/000.jpg"} <= set(found["name"])
    bad = [json.loads(line) for line in Path(f"{out}.bad.jsonl").read_text().splitlines()]
    assert {image["name"] for image in bad} == {"2019/empty.jpg", "2019/text.png", "cut.jpg"}
    assert all(image["reason"] for image in bad)
    width = found["h"].shape[1]
    assert f"{out} holds 13 images: name, h {width}, mu 8, sigma 8 (mu and sigma of z)." in shown
    assert "lists 3 bad images" in shown and "2019/empty.jpg (ValueError: the file is empty)" in shown
    assert f"Of 21 files in {library}: 16 read, 3 litter of other programs" in shown
    assert "2 not images by their suffix" in shown and "Of 16 images: 13 embedded, 3 bad." in shown
    # The list of bad images belongs to its file.
    for name in ("2019/empty.jpg", "2019/text.png", "cut.jpg"):
        (library / name).unlink()
    assert fastssl("embed", run, library, "--out", out, "--workers", 1)[0] == 0
    assert not Path(f"{out}.bad.jsonl").exists()


def test_a_list_of_paths(encoder, photos, tmp_path, monkeypatch):
    names = ["val/class1/001.jpg", str(photos / "val/class0/000.jpg"), "val/class2/../class2/002.jpg"]
    missing = ["val/class1/no.jpg", "no/such/folder.jpg"]
    (photos / "list.txt").write_text("\ufeff# a comment\n\n" + "\r\n".join([names[0], *missing, *names[1:]]))
    monkeypatch.chdir(tmp_path)
    try:
        report = embed_images(encoder, photos / "list.txt", "out.npz", workers=1)
    finally:
        (photos / "list.txt").unlink()
    assert read(Path("out.npz"))["name"].tolist() == names
    assert {image.name: image.reason for image in report.bad} == {
        missing[0]: "missing", missing[1]: "missing: its folder does not exist"
    }  # fmt: skip
    assert report.account == f"Of 5 images of {photos / 'list.txt'}: 3 embedded, 2 bad."


def test_relative_paths_start_at_the_list_and_not_at_the_current_folder(encoder, photos, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("val/class1/001.jpg\n")
    monkeypatch.chdir(photos)
    with pytest.raises(UserError, match="current folder but not in .*write absolute paths"):
        embed_images(encoder, tmp_path / "list.txt", tmp_path / "out.npz")


def test_one_image_and_names_in_other_encodings(encoder, photos, tmp_path):
    embed_images(encoder, photos / "val/class0/000.jpg", tmp_path / "one.npz", workers=1)
    assert read(tmp_path / "one.npz")["name"].tolist() == ["000.jpg"]
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"latin-\xe9.jpg", '日本,\n"x".jpg'.encode()):
        shutil.copy(photos / "val/class0/000.jpg", os.path.join(os.fsencode(folder), name))
    expected = ["latin-\\udce9.jpg", '日本,\n"x".jpg']
    for suffix in (".npz", ".csv", ".parquet"):
        embed_images(encoder, folder, tmp_path / f"names{suffix}", workers=1)
    assert read(tmp_path / "names.npz")["name"].tolist() == expected
    with open(tmp_path / "names.csv", newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(tmp_path / "names.parquet")["name"].to_pylist() == expected


def test_a_pattern_and_a_list_of_shards_give_what_one_file_gives(encoder, photos, canvas, tmp_path):
    build_beton("imagefolder", photos, tmp_path / "data", canvas=32, shards=3, workers=1)
    shards = [f"data/val-{number:05}-of-00003.beton" for number in range(3)]
    (tmp_path / "val.shards").write_text("\n".join(shards))
    embed_images(encoder, canvas / "val.beton", tmp_path / "one.npz")
    for name in ("data/val-*-of-00003.beton", "val.shards"):
        embed_images(encoder, tmp_path / name, tmp_path / "several.npz")
        assert_same_rows(read(tmp_path / "one.npz"), read(tmp_path / "several.npz"))


def test_a_beton_without_names_and_ids(encoder, canvas, tmp_path):
    shutil.copy(canvas / "val.beton", tmp_path / "x.beton")
    report = embed_images(encoder, tmp_path / "x.beton", tmp_path / "out.npz")
    assert sorted(read(tmp_path / "out.npz")["name"].tolist(), key=int) == [str(i) for i in range(12)]
    assert report.conversion is None and report.account is None


# -- formats --------------------------------------------------------------------------------------


def test_all_formats_hold_the_same_numbers(encoder, photos, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("fastssl.evaluation.embed.embed.BATCH_SIZE", 16)
    monkeypatch.setattr(output, "ROW_GROUP_BYTES", 20_000)
    for suffix in (".npz", ".csv", ".parquet"):
        embed_images(encoder, photos, tmp_path / f"x{suffix}", score="sigma_mean", workers=1)
    expected = read(tmp_path / "x.npz")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["name", "score", "h", "mu", "sigma"]
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups > 1
    assert str(table.schema.field("h").type).startswith("fixed_size_list<element: float>[")
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header[:3] == ["name", "score", "h0"] and header[-1] == f"sigma{expected['sigma'].shape[1] - 1}"
    first = 2
    for name in ("h", "mu", "sigma"):
        assert np.array_equal(np.array(table[name].to_pylist(), np.float32), expected[name]), name
        width = expected[name].shape[1]
        in_csv = np.array([line[first : first + width] for line in lines], np.float32)
        assert np.array_equal(in_csv, expected[name]), name
        first += width
    assert np.array_equal([float(line[1]) for line in lines], expected["score"])
    assert np.array_equal(table["score"].to_numpy(), expected["score"])
    assert [line[0] for line in lines] == table["name"].to_pylist() == expected["name"].tolist()


@pytest.mark.parametrize("stochastic, keys", [("none", ["name", "h"]), ("h", ["name", "h", "mu", "sigma"])])
def test_what_a_model_has_is_what_the_file_has(stochastic, keys, canvas, photos, tmp_path):
    folder = run_of(tmp_path / "run", canvas, embedding={"stochastic": stochastic})
    embed_images(load_run_encoder(folder, device="cpu"), photos / "val", tmp_path / "x.npz", workers=1)
    assert list(read(tmp_path / "x.npz")) == keys


def test_parquet_without_pyarrow_names_the_package_and_the_other_formats(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="run `pip install pyarrow`, or write a .npz or a .csv"):
        embed_images(encoder, photos, tmp_path / "x.parquet")


# -- models ---------------------------------------------------------------------------------------


def test_an_export_with_sigma_and_a_checkpoint(run, canvas, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed_images(load_embedder(run, None, "cpu"), photos / "val", "run.npz", workers=1)
    export_run(run, "safetensors", Path("export.safetensors"), sigma=True)
    exported = load_embedder("export.safetensors", None, "cpu")
    report = embed_images(exported, photos / "val", "export.npz", workers=1)
    assert_same_rows(read(Path("run.npz")), read(Path("export.npz")))
    assert "is not here" in report.conversion.reason  # an export does not tell the folders of its author
    embed_images(exported, photos / "val", "score.npz", score="knn_euclidean", fit=canvas / "train.beton", workers=1)
    assert "score" in read(Path("score.npz"))
    embed_images(load_embedder(run / "checkpoints/last.pt", None, "cpu"), photos / "val", "last.npz", workers=1)
    assert_same_rows(read(Path("run.npz")), read(Path("last.npz")))


# -- scores ---------------------------------------------------------------------------------------


def expected_scores(encoder, fit: Path, beton: Path, name: str) -> np.ndarray:
    """As `fastssl eval ood` computes them."""
    train = cached_features(encoder, BetonSubset(fit))
    classifier = linear_head(encoder, train, 0) if name in LABEL_BASED else None
    detector = DETECTORS[name](embedding_prior(encoder.model), classifier, "cpu")
    arrays = shared_arrays(train, classifier) | {"layers": cached_layers(encoder, BetonSubset(fit))}
    detector.fit(labels=train.label if name in LABEL_BASED else None, **arrays)
    return detector.score(**detector_arrays(encoder, BetonSubset(beton), classifier, [name])[name])


@pytest.mark.parametrize("name", [*LABEL_FREE, "msp", "energy", "mahalanobis", "layers_mahalanobis", "vim", "odin"])
def test_scores_are_those_of_eval_ood(name, encoder, canvas, photos, tmp_path):
    if DETECTORS[name].needs_pytorch_ood:
        pytest.importorskip("pytorch_ood")
    expected = expected_scores(encoder, canvas / "train.beton", canvas / "val.beton", name)
    embed_images(encoder, canvas / "val.beton", tmp_path / "beton.npz", score=name)
    # Covariances of fewer images than dimensions are nearly singular, and fitting a classifier enlarges rounding.
    nearly_singular = name.startswith(("mahalanobis", "layers", "kmeans"))
    rtol = 1e-3 if nearly_singular else 1e-5 if name in LABEL_FREE else 1e-4
    np.testing.assert_allclose(read(tmp_path / "beton.npz")["score"], expected, rtol=rtol, atol=1e-6)
    embed_images(encoder, photos / "val", tmp_path / "folder.npz", score=name, workers=1)
    folder = {key: row["score"] for key, row in by_name(read(tmp_path / "folder.npz")).items()}
    for key, row in by_name(read(tmp_path / "beton.npz")).items():
        np.testing.assert_allclose(folder[key.removeprefix("val/")], row["score"], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("source", ["folder", "beton"])
def test_the_sheet_shows_the_images_with_the_highest_scores(
    source, fastssl, run, canvas, photos, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        strangest, "draw_cells", lambda sheet, groups: drawn.extend(groups) or draw_cells(sheet, groups)
    )
    monkeypatch.setattr(embed, "BATCH_SIZE", 4)
    images = photos / "val" if source == "folder" else canvas / "val.beton"
    out, sheet = tmp_path / "a.npz", tmp_path / "strangest.png"
    command = ["embed", run, images, "--out", out, "--score", "sigma_mean", "--sheet", sheet, "--device", "cpu"]
    code, said, _ = fastssl(*command, "--sheet-count", 5)
    assert code == 0 and f"{sheet} shows the 5 with the highest score." in " ".join(said.split())
    file = np.load(out)
    order = np.argsort(-file["score"], kind="stable")[:5]
    ((title, cells),) = drawn
    assert [cell.caption for cell in cells] == file["name"][order].tolist()
    assert [cell.note for cell in cells] == [f"{value:.4g}" for value in file["score"][order]]
    assert f"the 5 of {len(file['name']):,} images with the highest sigma_mean" in title
    # A thumbnail is the image of that name: the photographs have different mean colors.
    for cell in cells:
        path = photos / "val" / Path(cell.caption).relative_to("val" if source == "beton" else ".")
        mean = np.asarray(Image.open(path).convert("RGB")).mean(axis=(0, 1))
        assert np.asarray(cell.picture).mean(axis=(0, 1)) == pytest.approx(mean, abs=8)
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 5 * 160


def test_the_training_images_are_passed_only_for_what_the_detector_reads(run, canvas, photos, tmp_path, monkeypatch):
    encoder = load_embedder(run, None, "cpu")
    monkeypatch.setattr(score, "cached_features", None)
    embed_images(encoder, canvas / "val.beton", tmp_path / "x.npz", score="layers_unlabelled")
    assert np.isfinite(read(tmp_path / "x.npz")["score"]).all()


def test_training_images_that_a_detector_does_not_need_need_not_exist(encoder, photos, tmp_path):
    config = encoder.recipe.data.model_copy(update={"train": "gone.beton"})
    object.__setattr__(encoder, "recipe", encoder.recipe.model_copy(update={"data": config}))
    embed_images(encoder, photos / "val", tmp_path / "x.npz", score="sigma_mean", workers=1)
    assert np.isfinite(read(tmp_path / "x.npz")["score"]).all()
    with pytest.raises(UserError, match="No file gone.beton"):
        embed_images(encoder, photos / "val", tmp_path / "x.npz", score="knn_cosine", workers=1)


def test_a_score_needs_images_that_are_stored_as_the_training_images(encoder, canvas_jpeg, tmp_path):
    with pytest.raises(UserError, match="canvas"):
        embed_images(encoder, canvas_jpeg / "val.beton", tmp_path / "x.npz", score="knn_cosine")
    embed_images(encoder, canvas_jpeg / "val.beton", tmp_path / "x.npz", score="sigma_mean")


def test_whole_images_of_one_size_are_not_compared_with_a_folder(tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"a/{number}.png")
    build_beton("imagefolder", tmp_path / "a", tmp_path / "data", max_side=50, workers=1)
    encoder = load_run_encoder(run_of(tmp_path / "run", tmp_path / "data"), device="cpu")
    with pytest.raises(UserError, match="have one size.*leave out --score"):
        embed_images(encoder, tmp_path / "a", tmp_path / "x.npz", score="knn_cosine")
    embed_images(encoder, tmp_path / "a", tmp_path / "x.npz", workers=1)


# -- mistakes and trouble -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{photos}", "--out", "x.txt"], "write a name that ends in .npz, .csv or .parquet"),
        (["{photos}", "--out", "x"], "is of no known kind"),
        (["{photos}", "--out", "folder.npz"], "is a folder"),
        (["{photos}/no", "--out", "x.npz"], "does not exist"),
        (["{photos}", "--out", "x.npz", "--score", "knn_cosin"], "did you mean knn_cosine"),
        (
            ["{photos}", "--out", "x.npz", "--score", "knn_supervised"],
            "without labels: use one that this run supports: sigma_mean,",
        ),
        (["{photos}", "--out", "x.npz", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["{photos}", "--out", "x.npz", "--score", "knn_cosine", "--fit", "no.beton"], "No file no.beton"),
        (
            ["empty", "--out", "x.npz"],
            "empty holds no images (Of 1 file in empty: 0 read",
        ),
        (["empty/train.beton", "--out", "x.npz"], "is not a .beton file"),
        (["list.txt", "--out", "x.npz"], "None of the 2 images of list.txt could be read (the first: no/a.jpg"),
        (["model.bin", "--out", "x.npz"], "no text file with one path per line"),
        (["void.txt", "--out", "x.npz"], "void.txt holds no images"),
        (["{photos}", "--out", "x.npz", "--sheet", "a.png"], "--sheet draws the images with the highest score: add"),
        (["{photos}", "--out", "x.npz", "--score", "sigma_mean", "--sheet", "a.jpg"], "is not a PNG file"),
        (
            ["{photos}", "--out", "x.npz", "--score", "sigma_mean", "--sheet", "{photos}/a.png"],
            "would be one of the images in",
        ),
        (
            ["listed.txt", "--out", "x.npz", "--score", "sigma_mean", "--sheet", "listed.png"],
            "--sheet listed.png is one of the images of listed.txt: name another file",
        ),
        (["{photos}", "--out", "x.npz", "--score", "sigma_mean", "--sheet", "folder.png"], "folder.png is a folder"),
        (["list.csv", "--out", "./list.csv"], "is the list of images: name another file"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, fastssl, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.npz", "folder.png", "empty"):
        Path(folder).mkdir()
    Path("empty/train.beton").write_text("x")
    Path("list.txt").write_text("no/a.jpg\nno/b.jpg\n")
    Path("list.csv").write_text(f"{photos}/val/class0/000.jpg")
    Path("model.bin").write_bytes(bytes(100))
    Image.new("RGB", (8, 8)).save("listed.png")
    Path("listed.txt").write_text("listed.png\n")
    Path("void.txt").write_text("\n# nothing\n")
    code, _, err = fastssl("embed", run, *(argument.format(photos=photos) for argument in arguments))
    # The message may be divided between the two lines.
    assert code == 2 and "error: " in err and message in err.replace("\nhint: ", ": "), err
    assert not Path("x.npz").exists()


def test_a_deterministic_run_names_the_scores_that_it_supports(fastssl, canvas, photos, tmp_path):
    folder = run_of(tmp_path / "run", canvas, embedding={"stochastic": "none"})
    code, _, err = fastssl("embed", folder, photos, "--out", tmp_path / "x.npz", "--score", "sigma_mean")
    assert (
        code == 2
        and "the embedding is deterministic\nhint: use one that this run supports: views_disagreement, knn_cosine"
        in err
    )


def test_bad_images_alone_leave_the_old_file(encoder, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "bad" / name).write_text("no image")
    (tmp_path / "x.npz").write_text("old")
    with pytest.raises(UserError, match=r"None of the 2 images .*a.jpg.*x.npz.bad.jsonl, which lists them"):
        embed_images(encoder, tmp_path / "bad", tmp_path / "x.npz", workers=1)
    assert (tmp_path / "x.npz").read_text() == "old"
    assert len((tmp_path / "x.npz.bad.jsonl").read_text().splitlines()) == 2


def test_trouble_of_the_machine_is_no_bad_image(encoder, photos, tmp_path):
    """A disk that is away: the folder of a linked image is empty."""
    folder, disk = tmp_path / "linked", tmp_path / "disk"
    shutil.copytree(photos / "val", folder)
    disk.mkdir()
    (folder / "class0/link.jpg").symlink_to(disk / "photo.jpg")
    with pytest.raises(UserError, match="missing or empty: mount its disk"):
        embed_images(encoder, folder, tmp_path / "x.npz", workers=1)
    assert not list(tmp_path.glob("*x.npz*"))


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(suffix, encoder, photos, tmp_path, monkeypatch):
    out = tmp_path / f"x{suffix}"
    out.write_text("old")
    write = output.find_writer(out)

    def fill_up(path, batches):
        write(path, batches)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("fastssl.evaluation.embed.embed.find_writer", lambda out: fill_up)
    with pytest.raises(UserError, match=f"x{suffix} cannot be written .No space left"):
        embed_images(encoder, photos / "val", out, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_text() == "old"


def test_ctrl_c_leaves_nothing(run, photos, tmp_path, default_signals):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(60):
        (many / str(number)).symlink_to(photos / "train")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "fastssl", "embed", str(run), str(many), "--out", str(out / "x.npz")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not list(out.iterdir()):  # the first columns are being written
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert list(out.iterdir()) == []
