"""The fuzz of the conversion: a few files of each kind, and that it finds the faults that it looks for."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_images import jpeg_bytes, photo

from fastssl.beton.images import encode_all

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz_build(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz_build")


KINDS = ("exif", "jpeg", "png", "tiff", "webp", "bytes", "tar", "parquet", "csv")


def test_damaged_files_are_stored_as_pillow_shows_them_or_refused(tmp_path):
    """8 files of each kind of seed 0; records/faults.md has ten minutes of it."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "fuzz_build.py", "--files", "8", "--out", tmp_path / "found", "--what", *KINDS],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [(row[0].strip(), row[1].strip(), row[-1].strip()) for row in rows[1:]] == [
        (kind, "8", "0") for kind in KINDS
    ]


@pytest.mark.parametrize("plan", ["raw", "jpg", "full"])
@pytest.mark.parametrize("fault", ["turned", "black", "shifted", "size"])
def test_wrong_pixels_are_found(fault, plan, fuzz_build):
    """The comparison with Pillow passes for the image itself, and fails for each of these."""
    image = photo(0, 90, 64)
    pixels = np.asarray(image)
    wrong = {
        "turned": pixels[::-1], "black": 0 * pixels, "shifted": np.roll(pixels, 12, axis=1), "size": pixels[:, :-1],
    }[fault]  # fmt: skip
    content = jpeg_bytes(image)

    def failures(stored):
        outcome = fuzz_build.Outcome()
        fuzz_build.compare_with_pillow(content, {plan: encode_all([stored], fuzz_build.PLANS[plan])[0]}, outcome)
        return [what for what, _ in outcome.failures]

    assert failures(content) == []
    assert failures(jpeg_bytes(Image.fromarray(wrong))) == ["wrong pixels"]


def test_the_comparison_counts_what_only_one_side_reads(fuzz_build):
    buffer = io.BytesIO()
    photo(0, 20, 20).save(buffer, "PNG")
    good, plan = buffer.getvalue(), fuzz_build.PLANS["raw"]
    for content, results, refused, lenient in (
        (good, {"raw": "reason"}, "raw: reason", False),
        (good[:60], {"raw": encode_all([good], plan)[0]}, "", True),
        (good[:60], {"raw": "reason"}, "", False),
    ):
        outcome = fuzz_build.Outcome()
        fuzz_build.compare_with_pillow(content, results, outcome)
        assert (outcome.refused, outcome.lenient, outcome.failures) == (refused, lenient, [])
