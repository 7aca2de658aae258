"""What the lines of benchmarks/loading.py share: data, crops, and `measure`, which times a line in its own process."""

import math
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

CANVAS, SIZE = 256, 224  # px
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the crops, as in RandomResizedCrop
BLUR, SOLARIZE = (1.0, 0.1), (0.0, 0.2)  # probabilities for the two views
JPEGS = {"originals": "many/all", "canvas": "jpegs"}  # folders
WARM_UP_SECONDS, WARM_UP_BATCHES = 0.7, 3
TICKS = os.sysconf("SC_CLK_TCK")

Views = list[np.ndarray]  # of a batch: one array of images, or one for each view; tensors of torch are fine too


class Measured(TypedDict):
    """What a line's process prints."""

    rate: float  # source images per second
    per_core_second: float  # source images per second of CPU time of the process and its children
    memory: float  # MB: peak of the anonymous memory of the process and its children
    output: str  # type and shape of the views of one image


def jpegs(folder: Path, source: str) -> list[str]:
    return sorted(str(path) for path in (folder / JPEGS[source]).iterdir())


def shuffled_batches(paths: list[str], batch: int) -> Iterator[list[str]]:
    """Endless: an epoch is a new order, its last incomplete batch is dropped."""
    rng = random.Random(0)
    while True:
        rng.shuffle(paths)
        for first in range(0, len(paths) - batch + 1, batch):
            yield paths[first : first + batch]


def random_box(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width: torchvision's RandomResizedCrop, but the central square if ten proposals do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_w, box_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_w <= width and box_h <= height:
            return rng.randint(0, height - box_h), rng.randint(0, width - box_w), box_h, box_w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def measure(batches: Iterator[Views], seconds: float, sheet: Path | None = None) -> Measured:
    """Time a line, from the arrival of one batch to that of another. `sheet`: a PNG for its first images."""
    peak = PeakMemory()
    views = next(batches)
    if sheet:
        save_row(views, sheet)
    output = describe(views)
    start, count = time.perf_counter(), 1
    while count < WARM_UP_BATCHES or time.perf_counter() - start < WARM_UP_SECONDS:
        next(batches)
        count += 1
    start, cpu, images = time.perf_counter(), cpu_seconds(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(batches)[0])
    per_core_second = images / (cpu_seconds() - cpu)
    return Measured(rate=images / elapsed, per_core_second=per_core_second, memory=peak.largest, output=output)


def describe(views: Views) -> str:
    """For example "uint8 2 x 224 x 224 x 3": of one image."""
    dtype = str(views[0].dtype).removeprefix("torch.")
    shape = ([len(views)] if len(views) > 1 else []) + list(views[0].shape[1:])
    return f"{dtype} {' x '.join(map(str, shape))}"


def family() -> list[int]:
    """This process and those that it started, directly or not, and that are alive."""
    found = [os.getpid()]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it ended
                continue
    return found


def cpu_seconds() -> float:
    """Of the family, so far."""
    total = 0
    for process in family():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


class PeakMemory:
    """The largest sum of the family's anonymous memory in MB, read five times a second."""

    def __init__(self) -> None:
        self.largest = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.largest = max(self.largest, sum(map(anonymous_memory, family())))
            time.sleep(0.2)


def anonymous_memory(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("RssAnon"))


def save_row(views: Views, path: Path) -> None:
    """Write the first images of each view side by side, to be looked at."""
    from PIL import Image

    row = []
    for index in range(min(6, len(views[0]))):
        for view in views:
            image = np.asarray(view[index])
            if image.ndim != 3:
                return  # bytes of blocks
            if image.shape[0] == 3:
                image = image.transpose(1, 2, 0)
            if image.dtype != np.uint8:
                image = (255 * (image * STD + MEAN)).round().clip(0, 255).astype(np.uint8)
            row.append(image)
    Image.fromarray(np.concatenate(row, axis=1)).save(path)
