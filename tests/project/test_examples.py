"""The programs in examples/ run as their docstrings say."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image
from small_models import make_run

from fastssl.beton import read_header, read_labels, read_names

ROOT = Path(__file__).parents[2]


def run_program(path, *arguments, **environment):
    """What a program prints."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        env=os.environ | {name: str(value) for name, value in variables.items()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def output_of(name, *arguments):
    return run_program(ROOT / "examples" / name, *arguments)


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    assert all(f'"{program.name}"' in text for program in (ROOT / "examples").iterdir() if program.is_file())


def test_the_notebook_of_the_tutorial(photos, tmp_path):
    """Its cells, one after the other in one process, on 48 photographs; the strange ones are noise."""
    cells = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "tutorial.py").write_text("if __name__ == '__main__':\n" + textwrap.indent(program, "    "))
    cells_dir = tmp_path / "cells"
    shutil.copytree(photos / "train", cells_dir / "train")
    shutil.copytree(photos / "val", cells_dir / "intact")
    (cells_dir / "defective").mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(cells_dir / "defective" / f"{number:02}.png")
    keys = "model.backbone=test_resnet train.batch_size=16 train.epochs=2 views.size=32 data.workers=1 train.device=cpu"
    printed = run_program(tmp_path / "tutorial.py", PHOTOS=cells_dir, WORK=tmp_path, KEYS=keys, MPLBACKEND="agg")
    share = re.search(r"A defective cell scores higher than an intact one in (\d+)% of all pairs\.", printed)
    assert int(share[1]) >= 80
    assert (tmp_path / "strangest.png").stat().st_size > 10_000


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
    source = shutil.copytree(photos / "val", tmp_path / "photos")
    files = sorted(source.rglob("*.jpg"))
    lines = [f"{file.relative_to(source)},{file.parent.name}" for file in files]
    (source / "labels.csv").write_text("\n".join(["path,class", *lines]))
    output_of("labels_in_a_table.py", source / "labels.csv", tmp_path / "data")
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
