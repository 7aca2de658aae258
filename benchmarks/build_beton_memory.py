"""Memory of build-beton, and the time until it writes its first image, for many files.

    python benchmarks/build_beton_memory.py /tmp/tiny --images 1000000 [--seconds 120]

Makes small JPEGs (32 px, 800 bytes) in a thousand class folders, builds them, and prints when the first image was
written and the peak memory of the whole process tree: the sum of the processes' PSS, which counts shared memory once.
--seconds stops the build early.
"""

import argparse
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

CLASSES = 1000


def make_tree(folder: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(100):
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32)).save(buffer, "JPEG", quality=80)
        contents.append(buffer.getvalue())
    for label in range(CLASSES):
        class_folder = folder / f"n{label:08}"
        class_folder.mkdir(parents=True)
        for number in range(images // CLASSES):
            (class_folder / f"n{label:08}_{number}.JPEG").write_bytes(contents[number % 100])


def tree_memory(process: psutil.Process) -> int:
    """Return the PSS of a process and its descendants, in bytes."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:  # it ended in the meantime
            pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the images and the .beton")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    make_tree(arguments.folder / "images", arguments.images)

    out = arguments.folder / "out"
    build = ["build-beton", "imagefolder", "--source", arguments.folder / "images", "--out", out, "--max-side", "64"]
    start = time.monotonic()
    process = psutil.Popen([sys.executable, "-m", "fastssl", *build, "--workers", str(arguments.workers)])
    pages, first, peak = out / "train.beton.part" / "pages", None, 0
    while process.poll() is None and time.monotonic() - start < arguments.seconds:
        peak = max(peak, tree_memory(process))
        if first is None and pages.exists() and pages.stat().st_size:
            first = time.monotonic() - start
        time.sleep(0.2)
    seconds = time.monotonic() - start
    finished = process.poll() == 0
    if not finished:
        process.terminate()
        process.wait()
    print(
        f"{arguments.images:,} images, {arguments.workers} workers: "
        f"first image written after {first or seconds:.1f} s, "
        f"peak memory {peak / 1e6:.0f} MB, {'finished' if finished else 'stopped'} after {seconds:.0f} s"
    )
    if finished:
        subprocess.run([sys.executable, "-m", "fastssl", "inspect", out / "train.beton"], check=True)


if __name__ == "__main__":
    main()
