"""Measure how many source images per second reach the device, compared with stock FFCV and torchvision.

    python benchmarks/loading.py PHOTOS [--copies 8] [--rounds 3] [--workers 2]

PHOTOS is a folder of JPEGs, as they come from a camera or from ImageNet. Three files are built from it, in a temporary
folder next to it: a 256 px canvas and a full file with the original bytes up to 500 px, both by build-beton, and one by
stock FFCV's writer, encoded again at quality 90 and at most 500 px. Every line runs in its own process, one after the
other, in rounds; batch 256, two views of 224 px.

    decode only    stock FFCV's SimpleRGBImageDecoder for a canvas; for images of different sizes, which it refuses,
                   FFCV's imdecode in a compiled parallel loop, into scratch memory
    two pipelines  stock FFCV with RandomResizedCropRGBImageDecoder, one pipeline per view. Our files have one image
                   field, so one pipeline is timed and its rate halved, which leaves out what two cost in parallel;
                   for the memory, two loaders run in parallel
    torchvision    DataLoader over the JPEG files themselves, two views per sample on the CPU
    fastssl        BetonLoader; for a canvas the device cuts both crops. "+ views" adds PairedViews, on the same cores.
                   With a GPU, batches and views are made there

Memory is the peak of the process's own memory, without mapped files.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

BATCH, SIZE = 256, 224
MEASURED_FOR = 6.0  # seconds per line and round, after a first epoch that compiles and warms up


def stock_canvas(folder: Path, workers: int) -> Iterator[int]:
    return stock_loader(folder / "canvas/train.beton", workers, "SimpleRGBImageDecoder")


def stock_crop(path: Path, workers: int) -> Iterator[int]:
    return stock_loader(path, workers, "RandomResizedCropRGBImageDecoder", (SIZE, SIZE))


def stock_loader(path: Path, workers: int, decoder: str, *arguments) -> Iterator[int]:
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    from fastssl.beton import read_header

    pipelines = {name: None for name in read_header(path).fields}
    pipelines["image"] = [getattr(decoders, decoder)(*arguments), ToTensor()]
    pipelines["label"] = [decoders.IntDecoder(), ToTensor()]
    loader = Loader(
        str(path), BATCH, num_workers=workers, order=OrderOption.RANDOM, drop_last=True, pipelines=pipelines
    )
    while True:
        for batch in loader:
            yield len(batch[0])


def two_in_parallel(path: Path, workers: int) -> Iterator[int]:
    for count, _ in zip(stock_crop(path, workers), stock_crop(path, workers)):
        yield count


def imdecode_only(path: Path, workers: int) -> Iterator[int]:
    """Decode without anything else, in batches like a loader."""
    import numba
    import numpy as np
    from ffcv.libffcv import ctypes_imdecode

    from fastssl.beton import read_samples

    metadata, size = read_samples(path)
    image, file = metadata["image"], np.memmap(path, np.uint8, mode="r")

    @numba.njit(parallel=True, nogil=True)
    def decode(start_B, size_B, height_B, width_B, scratch_TN):
        for b in numba.prange(len(start_B)):
            source = file[start_B[b] : start_B[b] + size_B[b]]
            height, width = np.uint32(height_B[b]), np.uint32(width_B[b])
            ctypes_imdecode(
                source.ctypes.data, np.uint64(source.size), height, width,
                scratch_TN[numba.get_thread_id()].ctypes.data, height, width,
                np.uint32(0), np.uint32(0), np.uint32(1), np.uint32(1), False, False,
            )  # fmt: skip

    numba.set_num_threads(workers)
    start, height, width = (np.ascontiguousarray(image[name]) for name in ("data_ptr", "height", "width"))
    scratch_TN = np.empty((workers, 3 * int((height.astype(int) * width).max())), np.uint8)
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(len(image))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            decode(start[rows], size[rows], height[rows], width[rows], scratch_TN)
            yield BATCH


def torchvision_views(photos: Path, workers: int, whole_chain: bool) -> Iterator[int]:
    from torchvision import datasets
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> v2.Compose:
        crop = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
        colour = [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
        ]
        float_ = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        normalize = [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        return v2.Compose(crop + colour + float_ + normalize if whole_chain else crop + [v2.ToImage()])

    first, second = view(1.0, 0.0), view(0.1, 0.2)
    data = datasets.ImageFolder(str(photos), lambda image: (first(image), second(image)))
    # Batches of 64: there are only a thousand files, and a worker of a DataLoader makes whole batches.
    loader = torch.utils.data.DataLoader(
        data, 64, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        for (image, _), _label in loader:
            yield len(image)


def fastssl_batches(path: Path, workers: int, crop: str, with_views: bool = False) -> Iterator[int]:
    from fastssl.loading import BetonLoader
    from fastssl.recipe import PerViewConfig, ViewsConfig
    from fastssl.views import PairedViews

    recipe = ViewsConfig(size=SIZE, first=PerViewConfig(blur=1.0), second=PerViewConfig(blur=0.1, solarize=0.2))
    on_gpu = torch.cuda.is_available()
    views = PairedViews(recipe, compiled=on_gpu)
    device = "cuda" if on_gpu else "cpu"
    loader = BetonLoader(path, BATCH, crop=crop, views=recipe, workers=workers, device=device)
    while True:
        for batch in loader:
            if with_views:
                epoch = torch.full((), loader.epoch, device=device)
                views(batch.image, batch.index, epoch, batch.height, batch.width)
            if on_gpu:
                torch.cuda.synchronize()
            yield len(batch.image)


LINES = {
    "canvas": {
        "decode only": stock_canvas,
        "fastssl": lambda folder, workers: fastssl_batches(folder / "canvas/train.beton", workers, "gpu"),
        "fastssl + views": lambda folder, workers: fastssl_batches(folder / "canvas/train.beton", workers, "gpu", True),
        "FFCV, two pipelines, 500 px": lambda folder, workers: stock_crop(folder / "q90.beton", workers),
        "torchvision, crop and flip": lambda folder, workers: torchvision_views(folder / "photos", workers, False),
        "torchvision, whole augmentation": lambda folder, workers: torchvision_views(folder / "photos", workers, True),
    },
    "full, original bytes": {
        "decode only": lambda folder, workers: imdecode_only(folder / "full/train.beton", workers),
        "fastssl": lambda folder, workers: fastssl_batches(folder / "full/train.beton", workers, "cpu"),
        "FFCV, two pipelines": lambda folder, workers: stock_crop(folder / "full/train.beton", workers),
    },
    "full, q90": {
        "decode only": lambda folder, workers: imdecode_only(folder / "q90.beton", workers),
        "fastssl": lambda folder, workers: fastssl_batches(folder / "q90.beton", workers, "cpu"),
        "fastssl + views": lambda folder, workers: fastssl_batches(folder / "q90.beton", workers, "cpu", True),
        "FFCV, two pipelines": lambda folder, workers: stock_crop(folder / "q90.beton", workers),
        "FFCV, two in parallel (memory)": lambda folder, workers: two_in_parallel(folder / "q90.beton", workers),
    },
}


def measure(batches: Iterator[int], photos: int) -> dict[str, float]:
    """Return images per second, peak memory in MB and busy cores; the first epoch is not timed."""
    peak = Peak()
    warm = 0
    while warm < min(photos, 2000):
        warm += next(batches)
    start, images = time.perf_counter(), 0
    cpu = time.process_time()
    while (seconds := time.perf_counter() - start) < MEASURED_FOR:
        images += next(batches)
    return {"rate": images / seconds, "memory": peak.read(), "cores": (time.process_time() - cpu) / seconds}


class Peak:
    """The largest anonymous memory of this process in MB, read every 20 ms."""

    def __init__(self) -> None:
        self.largest = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.largest = max(self.largest, int(line.split()[1]) / 1e3)
            time.sleep(0.02)

    def read(self) -> float:
        return self.largest


WRITE_STOCK = """
import sys
from pathlib import Path
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image
paths = sorted(Path(sys.argv[1]).glob("*/*"))
class Photos:
    def __len__(self):
        return len(paths)
    def __getitem__(self, index):
        return Image.open(paths[index]).convert("RGB"), 0, index
fields = {"image": RGBImageField("jpg", max_resolution=500, jpeg_quality=90)}
fields |= {name: IntField() for name in ("label", "index")}
DatasetWriter(sys.argv[2], fields, num_workers=2).from_indexed_dataset(Photos(), shuffle_indices=True)
"""


def build(photos: Path, folder: Path, copies: int) -> None:
    (folder / "photos/all").mkdir(parents=True)
    (folder / "many/all").mkdir(parents=True)
    for path in sorted(photos.rglob("*.[jJ]*")):
        os.link(path, folder / "photos/all" / path.name)
        for copy in range(copies):
            os.link(path, folder / "many/all" / f"{copy} {path.name}")
    for name, option in (("canvas", ["--canvas", "256"]), ("full", ["--max-side", "500"])):
        command = [sys.executable, "-m", "fastssl", "build-beton", "imagefolder", "--source", folder / "many"]
        subprocess.run([*command, "--out", folder / name, *option], check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-c", WRITE_STOCK, folder / "many", folder / "q90.beton"], check=True, capture_output=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--line", nargs=2, help=argparse.SUPPRESS)  # measures one line, in its own process
    arguments = parser.parse_args()
    if arguments.line:
        table, line = arguments.line
        batches = LINES[table][line](arguments.photos, arguments.workers)
        print("RESULT", json.dumps(measure(batches, 1000)), flush=True)
        os._exit(0)  # stock FFCV's threads do not end

    results: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.photos.parent) as folder:
        build(arguments.photos, Path(folder), arguments.copies)
        for _ in range(arguments.rounds):
            for table, lines in LINES.items():
                for line in lines:
                    command = [sys.executable, __file__, folder, "--line", table, line]
                    done = subprocess.run(
                        [*command, "--workers", str(arguments.workers)],
                        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(arguments.workers)},
                    )  # fmt: skip
                    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT")]
                    if not found:
                        sys.exit(f"{table}, {line}: {done.stderr[-3000:]}")
                    result = json.loads(found[0].removeprefix("RESULT"))
                    if "two pipelines" in line:
                        result["rate"] /= 2
                    results.setdefault((table, line), []).append(result)
    for (table, line), found in results.items():
        rates = [result["rate"] for result in found]
        ratios = [own["rate"] / result["rate"] for own, result in zip(results[table, "fastssl"], found)]
        print(
            f"{table:<21} {line:<28} {statistics.median(rates):6.0f} images/s ({min(rates):.0f} to {max(rates):.0f}); "
            f"fastssl is {statistics.median(ratios):.2f}x; {statistics.median(r['memory'] for r in found):5.0f} MB, "
            f"{statistics.median(r['cores'] for r in found):.2f} cores"
        )


if __name__ == "__main__":
    main()
