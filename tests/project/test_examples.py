"""The programs in examples/ run as their docstrings say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from small_models import make_run

ROOT = Path(__file__).parents[2]


def test_strange_photographs(canvas, photos, tmp_path):
    run, *_ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    shutil.copytree(photos / "val", tmp_path / "library/2019")
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "library/strange.png")
    (tmp_path / "library/bad.jpg").write_text("no image")
    program = [sys.executable, ROOT / "examples/strange_photographs.py", run, tmp_path / "library"]
    done = subprocess.run(
        [*program, "--count", "3", "--score", "knn_euclidean"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores, paths = zip(*(line.split("\t") for line in done.stdout.splitlines()))
    assert len(paths) == 3 and paths[0] == str(tmp_path / "library/strange.png")
    assert all(Path(path).is_file() for path in paths)
    assert [float(score) for score in scores] == sorted(map(float, scores), reverse=True)
