"""Small real files for the tests: images of several sizes on disk, and the .betons made from them."""

import multiprocessing
import os
import signal
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores: one thread each, before torch starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl import cli
from fastssl.beton import build_beton
from fastssl.objectives import TotalLoss

# The server has imported torch when it forks, so a test's process starts in 0.1 s instead of 5 s.
multiprocessing.set_forkserver_preload(["fastssl.training", "fastssl.evaluation.probe"])


def labelled_image(seed: int, height: int, width: int, label: int) -> Image.Image:
    """A smooth random image with a bright square whose position depends on the class."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 160, (4, 5, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.BICUBIC))
    side, left = height // 4, label * width // 4
    pixels[side : 2 * side, left : left + side] = 250
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    """torch.compile refuses a function that it has compiled eight times in one process, whichever tests did so."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An imagefolder of 48 JPEGs, 3 classes, of different sizes, under train/ and 12 under val/."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 48), ("val", 12)):
        for i in range(count):
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = 60 + 7 * (i % 5), 90 - 11 * (i % 4)
            labelled_image(i + 1000 * (split == "val"), height, width, i % 3).save(folder / f"{i:03}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def canvas(photos, tmp_path_factory):
    """Folder with train.beton and val.beton, canvas 32 (raw pixels)."""
    out = tmp_path_factory.mktemp("canvas")
    build_beton("imagefolder", photos, out, canvas=32, workers=1)
    return out


@pytest.fixture(scope="session")
def canvas_jpeg(photos, tmp_path_factory):
    """The same at canvas 96, stored as JPEG."""
    out = tmp_path_factory.mktemp("canvas_jpeg")
    build_beton("imagefolder", photos, out, canvas=96, codec="jpeg", workers=1)
    return out


@pytest.fixture(scope="session")
def canvas_bc4(photos, tmp_path_factory):
    """The same at canvas 48, stored in blocks."""
    out = tmp_path_factory.mktemp("canvas_bc4")
    build_beton("imagefolder", photos, out, canvas=48, codec="bc4", workers=1)
    return out


@pytest.fixture(scope="session")
def full(photos, tmp_path_factory):
    """The same in the full layout: the JPEGs' own bytes, of different sizes."""
    out = tmp_path_factory.mktemp("full")
    build_beton("imagefolder", photos, out, max_side=500, workers=1)
    return out


@pytest.fixture(scope="session")
def forty_photos(tmp_path_factory):
    """Two classes of twenty JPEGs of several sizes. Never changed: copy it to change it."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("bird", "cat")):
        (root / name).mkdir()
        for number in range(20):
            image = photo(20 * label + number, 90 + number, 70 + 2 * number)
            (root / name / f"{number:02}.jpg").write_bytes(jpeg_bytes(image))
    return root


@pytest.fixture
def default_signals():
    """Signals act as usual in the test and its child processes, also if the suite was started to ignore them.

    A shell starts `make test &` with SIGINT ignored, nohup ignores SIGHUP, and child processes inherit that.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fastssl(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastssl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): let `action` run inside the loss of step n (from 0)."""

    def arrange(n, action):
        real, steps = TotalLoss.forward, iter(range(1000))

        def watched(self, *inputs):
            if next(steps) == n:
                action()
            return real(self, *inputs)

        monkeypatch.setattr(TotalLoss, "forward", watched)

    return arrange


@pytest.fixture
def slurm_commands(tmp_path, monkeypatch):
    """A PATH with a fake SLURM: sbatch stores its script, and squeue prints the file `queue`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "srun": "exit 0",
        "sbatch": f"cp $1 {folder}/script; echo Submitted batch job 17",
        "squeue": f"cat {folder}/queue",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("4_0\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder
