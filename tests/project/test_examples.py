"""The programs in examples/ run as their docstrings say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from small_models import make_run

from fastssl.beton import read_header, read_labels, read_names

ROOT = Path(__file__).parents[2]


def output_of(name, *arguments):
    """What a program of examples/ prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    assert all(f'"{program.name}"' in text for program in (ROOT / "examples").glob("*.py"))


def test_train_from_python(canvas, tmp_path):
    keys = [
        "model.backbone=test_resnet",
        "views.size=32",
        "train.batch_size=16",
        "train.epochs=1",
        "embedding.samples=2",
    ]
    data = [f"data.train={canvas}/train.beton", f"data.val={canvas}/val.beton", f"run.dir={tmp_path}/run"]
    printed = output_of("train_from_python.py", "zprob_vicreg", *data, *keys, "optim.warmup_epochs=0", "data.workers=1")
    assert f"{tmp_path}/run: " in printed and "of the test images are classified correctly" in printed


def test_nearest_photographs(canvas, photos, tmp_path):
    run, *_ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    query = photos / "val" / "class0" / "000.jpg"
    printed = output_of("nearest_photographs.py", run, photos / "val", query, "--count", 3)
    similarity, paths = zip(*(line.split("\t") for line in printed.splitlines()))
    assert len(paths) == 3 and paths[0] == str(query) and similarity[0] == "1.000"


def test_custom_objective_lowers_its_loss(canvas):
    file = canvas / "train.beton"
    options = ["--size", 32, "--epochs", 30, "--batch-size", 48, "--backbone", "test_resnet"]
    printed = output_of("custom_objective.py", file, *options)
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines()]
    assert len(losses) == 30 and max(losses[-5:]) < losses[0] - 0.5


def test_labels_in_a_table(photos, tmp_path):
    files = sorted((photos / "val").rglob("*.jpg"))
    lines = [f"{file.relative_to(photos)},{file.parent.name}" for file in files]
    (photos / "labels.csv").write_text("\n".join(["path,class", *lines]))
    output_of("labels_in_a_table.py", photos / "labels.csv", tmp_path / "data")
    file = tmp_path / "data" / "train.beton"
    names = read_names(file, range(len(files)))
    assert sorted(names.values()) == sorted(line.partition(",")[0] for line in lines)
    assert read_header(file).num_samples == len(files)
    assert sorted(read_labels(file)) == sorted(int(f.parent.name[-1]) for f in files)


def test_strange_photographs(canvas, photos, tmp_path):
    run, *_ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    shutil.copytree(photos / "val", tmp_path / "library/2019")
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "library/strange.png")
    (tmp_path / "library/bad.jpg").write_text("no image")
    options = ["--count", 3, "--score", "knn_euclidean"]
    printed = output_of("strange_photographs.py", run, tmp_path / "library", *options)
    scores, paths = zip(*(line.split("\t") for line in printed.splitlines()))
    assert len(paths) == 3 and paths[0] == str(tmp_path / "library/strange.png")
    assert all(Path(path).is_file() for path in paths)
    assert [float(score) for score in scores] == sorted(map(float, scores), reverse=True)
