"""Speed of build-beton and of stock FFCV's DatasetWriter, measured in one run.

    python benchmarks/build_beton.py PHOTOS [--copies 10] [--repeats 2]

PHOTOS is a folder of JPEGs. Both writers get the same files (hard links, so that a thousand photographs make a longer
run), the same options and the same number of workers, and alternate. Whole processes are timed, including their start.
Stock FFCV is used as in its documentation: an indexed dataset that opens each file with Pillow, and
RGBImageField(write_mode="jpg", jpeg_quality=90).

    canvas      ours --canvas 256, in BC4 blocks and with --codec jpeg; stock resizes to 256 x 256 with the same filter
    full        ours --max-side 500; stock max_resolution=500
    fits        the same with only the files that fit, so ours are all stored unchanged
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

OURS = "import sys; from fastssl.cli import main; main()"
STOCK = """
import sys
from pathlib import Path
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image

source, out, workload, workers = sys.argv[1:]
paths = sorted(Path(source).glob("*/*"))

class Photos:
    def __len__(self):
        return len(paths)

    def __getitem__(self, index):
        image = Image.open(paths[index]).convert("RGB")
        if workload == "canvas":
            image = image.resize((256, 256), Image.Resampling.BILINEAR)
        return image, 0

image = RGBImageField("jpg", max_resolution=None if workload == "canvas" else 500, jpeg_quality=90)
writer = DatasetWriter(out + "/train.beton", {"image": image, "label": IntField()}, num_workers=int(workers))
writer.from_indexed_dataset(Photos(), shuffle_indices=True)
"""
STOCK_FFCV, OURS_JPEG = "stock FFCV", "ours, JPEG"
OPTIONS = {"canvas": ["--canvas", "256"], "full": ["--max-side", "500"], "fits": ["--max-side", "500"]}


def command(writer: str, workload: str, source: Path, out: str, workers: int) -> list[str]:
    if writer == STOCK_FFCV:
        return [sys.executable, "-c", STOCK, str(source), out, workload, str(workers)]
    build = ["build-beton", "imagefolder", "--source", str(source), "--out", out]
    codec = ["--codec", "jpeg"] if writer == OURS_JPEG else []
    return [sys.executable, "-c", OURS, *build, *OPTIONS[workload], *codec, "--workers", str(workers)]


def images_per_second(writer: str, workload: str, source: Path, workers: int) -> float:
    images = sum(1 for _ in source.glob("*/*"))
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        start = time.monotonic()
        run = command(writer, workload, source, out, workers)
        subprocess.run(run, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return images / (time.monotonic() - start)


def link_photos(photos: Path, folder: Path, copies: int, largest: int | None) -> Path:
    """Make hard links to the JPEGs, or only to those that are RGB and at most `largest` px wide and high."""
    (folder / "photos").mkdir(parents=True)
    for path in sorted(photos.rglob("*.[jJ]*")):
        with Image.open(path) as image:
            fits = image.mode == "RGB" and max(image.size) <= (largest or max(image.size))
        for copy in range(copies if fits or largest is None else 0):
            os.link(path, folder / "photos" / f"{copy} {path.name}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.photos.parent) as folder:
        everything = link_photos(arguments.photos, Path(folder, "all"), arguments.copies, None)
        fitting = link_photos(arguments.photos, Path(folder, "fits"), arguments.copies, 500)
        for workload in arguments.workloads:
            writers = ["ours", STOCK_FFCV] + ([OURS_JPEG] if workload == "canvas" else [])
            rates: dict[tuple[str, int], list[float]] = {}
            for _ in range(arguments.repeats):
                for workers in (1, 2):
                    for writer in writers:
                        source = fitting if workload == "fits" else everything
                        rate = images_per_second(writer, workload, source, workers)
                        rates.setdefault((writer, workers), []).append(rate)
            median = {key: statistics.median(values) for key, values in rates.items()}
            for workers in (1, 2):
                for other in writers[1:]:
                    ratio = np.divide(rates["ours", workers], rates[other, workers])
                    print(
                        f"{workload:<7} {workers} workers: {other} {median[other, workers]:6.0f}, "
                        f"ours {median['ours', workers]:6.0f} images/s; ratio {np.median(ratio):.2f} "
                        f"({ratio.min():.2f} to {ratio.max():.2f})"
                    )
            scaling = np.divide(rates["ours", 2], rates["ours", 1])
            print(f"{workload:<7} ours, 1 to 2 workers: {np.median(scaling):.2f}", flush=True)


if __name__ == "__main__":
    main()
