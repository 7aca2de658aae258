"""Measure how fast a set of images in blocks comes from the disk into the memory of the device, where it then stays.

    python benchmarks/resident_loading.py --folder DIR [--gigabytes 4] [--rounds 3] [--device cuda] [--json F]

A file of canvases of 256 px is written to DIR and deleted at the end. The lines take turns; those from the disk read it
after it was evicted from the page cache:

    one thread     one thread reads the file from its beginning to its end, 8 MB at a time, as `dd` does
    pieces         what a resident set is read with: several threads, 64 MB at a time, into pinned memory on a GPU
    resident set   the whole: BetonLoader.load_resident
    copy           on a GPU: one large copy from pinned memory, the peak of the bus

On a CPU, "resident set" also takes the page faults of new memory, which a GPU does not have.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastssl.beton import format as beton_format
from fastssl.beton.format import BC4, bc4_bytes
from fastssl.loading import BetonLoader
from fastssl.loading.resident import read_pieces
from fastssl.profiling.peaks import copy_peak

SIDE = 256  # px
READ = 1 << 23  # bytes that the one thread reads at a time


def write_blocks(path: Path, size: float) -> None:
    """Write a file of about `size` bytes of random blocks."""
    bytes_per_image = bc4_bytes(SIDE)
    rows = np.zeros(int(size) // bytes_per_image, beton_format.ROW)
    rows["data_ptr"], end = beton_format.allocate([bytes_per_image] * len(rows), beton_format.data_start(len(rows)))
    rows["index"] = np.arange(len(rows))
    rows["mode"] = BC4
    rows["size"] = bytes_per_image
    for name in ("height", "width", "source_height", "source_width"):
        rows[name] = SIDE
    page = np.random.default_rng(0).integers(0, 256, READ, np.uint8).tobytes()
    with open(path, "wb") as file:
        for position in range(0, end, READ):
            file.seek(position)
            file.write(page[: min(READ, end - position)])
        beton_format.write_tables(file, rows, end)


def evict(path: Path) -> None:
    """Let the system forget the file, as far as nothing has it mapped and in use."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_with_one_thread(path: Path) -> None:
    memory = bytearray(READ)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def measure(path: Path, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median rate of each line, in bytes per second."""
    loader = BetonLoader(path, 256, device=device, resident=True)
    set_bytes = len(loader.rows) * loader.image_bytes

    def pieces() -> None:
        shape = loader.cropping.image_shape(loader.samples)
        for _ in read_pieces(loader.samples, loader.rows, shape, loader.workers, loader._buffers):
            pass

    def resident_set() -> None:
        BetonLoader(path, 256, device=device, resident=True).load_resident()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    lines: dict[str, tuple[Callable[[], None], bool]] = {
        "one thread, from the disk": (lambda: read_with_one_thread(path), True),
        "pieces, from the disk": (pieces, True),
        "resident set, from the disk": (resident_set, True),
        "pieces, from the page cache": (pieces, False),
        "resident set, from the page cache": (resident_set, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, (work, from_disk) in lines.items():
            if from_disk:
                evict(path)
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: set_bytes / statistics.median(values) for name, values in seconds.items()}
    peak = copy_peak(device)
    return rates | ({"copy": peak} if peak else {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "train.beton"
        write_blocks(path, options.gigabytes * 1e9)
        rates = measure(path, torch.device(options.device), options.rounds)
    for name, rate in rates.items():
        print(f"{name:36}{rate / 1e9:8.2f} GB/s")
    if options.json:
        options.json.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
