"""Measure how many source images per second reach the device, compared with stock FFCV, DALI and other loaders.

    python benchmarks/loading.py PHOTOS [--table canvas] [--copies 8] [--rounds 3] [--workers 2] [--record FILE]

PHOTOS is a folder of JPEGs, as they come from a camera or from ImageNet. Four files are built from it, in a temporary
folder next to it: 256 px canvases in JPEG and in BC4 blocks, and a full file with the original bytes up to 500 px, all
by build-beton, and one by stock FFCV's writer, encoded again at quality 90 and at most 500 px. Every line runs in its
own process, one after the other, in rounds; batch 256, two views of 224 px. Each line says what the loop gets.

    decode only     stock FFCV's SimpleRGBImageDecoder for a canvas; for images of different sizes, which it refuses,
                    FFCV's imdecode in a compiled parallel loop, into scratch memory
    FFCV, blocks    stock FFCV's NDArrayDecoder, which gives the bytes of the blocks
    two pipelines   stock FFCV with RandomResizedCropRGBImageDecoder, one pipeline per view. Our files have one image
                    field, so one pipeline is timed and its rate halved, which leaves out what two cost in parallel;
                    for the memory, two loaders run in parallel
    torchvision     DataLoader over the JPEG files themselves, two views per sample on the CPU
    DALI,           their own Python, see loading_peers.py; "not installed" if --peers is missing. They read the
    simplejpeg      JPEGs of the canvas as files
    memcpy          a bound: the C library's memcpy of the same bytes, at the same rows, by as many threads
    fastssl         BetonLoader; for a canvas the device cuts both crops. "pixels" decodes the blocks of each batch,
                    "views" adds PairedViews, on the same cores. With a GPU, batches and views are made there

Memory is the peak of the process's own memory, without mapped files. --record replaces the tables in a Markdown file,
each between two lines that name it.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

BATCH, SIZE, CANVAS = 256, 224, 256
MEASURED_FOR = 6.0  # seconds per line and round, after images that compile and warm up
WARM_UP = 2000  # images
PEERS = Path(".cache/peers/bin/python")


def stock_crop(path: Path, workers: int) -> Iterator[int]:
    return stock_loader(path, workers, "RandomResizedCropRGBImageDecoder", (SIZE, SIZE))


def stock_loader(path: Path, workers: int, decoder: str, *arguments) -> Iterator[int]:
    """Stock FFCV with one of its decoders for the images."""
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


def memcpy(path: Path, workers: int) -> Iterator[int]:
    """Copy the stored bytes of random rows, without anything else."""
    import numba
    import numpy as np
    from numba import types

    from fastssl.beton import read_samples

    metadata, size = read_samples(path)
    file, start = np.memmap(path, np.uint8, mode="r"), np.ascontiguousarray(metadata["image"]["data_ptr"])
    memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uint64))

    @numba.njit(nogil=True)
    def copy(target, source, start_B, size):
        for b in range(len(start_B)):
            memcpy(target + b * size, source + start_B[b], size)

    batches = itertools.cycle([np.empty((BATCH, int(size[0])), np.uint8) for _ in range(4)])
    share = -(-BATCH // workers)
    with ThreadPoolExecutor(workers) as pool:
        for epoch in itertools.count():
            order = np.random.default_rng(epoch).permutation(len(start))
            for first in range(0, len(order) - BATCH + 1, BATCH):
                start_B, out = start[order[first : first + BATCH]], next(batches)
                parts = [
                    pool.submit(copy, out[b:].ctypes.data, file.ctypes.data, start_B[b : b + share], size[0])
                    for b in range(0, BATCH, share)
                ]
                for part in parts:
                    part.result()
                yield BATCH


def torchvision_views(photos: Path, workers: int, whole_chain: bool) -> Iterator[int]:
    import torch
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


def fastssl_batches(
    path: Path, workers: int, crop: str = "gpu", with_views: bool = False, with_pixels: bool = False
) -> Iterator[int]:
    import torch

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
            if with_pixels:
                batch.pixels()
            if on_gpu:
                torch.cuda.synchronize()
            yield len(batch.image)


class Line(NamedTuple):
    """One loader on one file."""

    output: str  # what the loop gets
    batches: Callable[[Path, int], Iterator[int]] | str  # of the folder and the number of threads; a peer's name
    own: str = "fastssl"  # the line of fastssl with which it is compared: what training takes in the same place
    share: float = 1.0  # of the rate that is measured


def of(file: str, loader: Callable[..., Iterator[int]], *arguments: object, **options: object) -> Callable:
    """A line's `batches`: a loader of one of the files."""
    return lambda folder, workers: loader(folder / file, workers, *arguments, **options)


CANVASES, BLOCKS, FULL, Q90 = "canvas/train.beton", "blocks/train.beton", "full/train.beton", "q90.beton"
LINES = {
    "canvas": {
        "fastssl": Line("blocks", of(BLOCKS, fastssl_batches)),
        "fastssl, pixels": Line("pixels", of(BLOCKS, fastssl_batches, with_pixels=True)),
        "memcpy": Line("bytes", of(BLOCKS, memcpy)),
        "FFCV, blocks": Line("blocks", of(BLOCKS, stock_loader, "NDArrayDecoder")),
        "fastssl, JPEG": Line("pixels", of(CANVASES, fastssl_batches)),
        "FFCV, decode only, JPEG": Line("pixels", of(CANVASES, stock_loader, "SimpleRGBImageDecoder")),
        "DALI, decode, JPEG": Line("pixels", "DALI, decode"),
        "simplejpeg, decode, JPEG": Line("pixels", "simplejpeg, decode"),
        "fastssl + views": Line("views", of(BLOCKS, fastssl_batches, with_views=True), "fastssl + views"),
        "fastssl, JPEG + views": Line("views", of(CANVASES, fastssl_batches, with_views=True), "fastssl + views"),
        "DALI, JPEG, whole augmentation": Line("views", "DALI, whole", "fastssl + views"),
        "torchvision, whole augmentation": Line("views", of("photos", torchvision_views, True), "fastssl + views"),
        "fastssl, crop=cpu": Line("two crops", of(BLOCKS, fastssl_batches, "cpu"), "fastssl, crop=cpu"),
        "fastssl, JPEG, crop=cpu": Line("two crops", of(CANVASES, fastssl_batches, "cpu"), "fastssl, crop=cpu"),
        "simplejpeg and OpenCV, JPEG": Line("two crops", "simplejpeg and OpenCV", "fastssl, crop=cpu"),
        "FFCV, two pipelines, 500 px": Line("two crops", of(Q90, stock_crop), "fastssl, crop=cpu", share=0.5),
        "torchvision, JPEG files": Line("two crops", of("photos", torchvision_views, False), "fastssl, crop=cpu"),
    },
    "full, original bytes": {
        "fastssl": Line("two crops", of(FULL, fastssl_batches, "cpu")),
        "decode only": Line("pixels", of(FULL, imdecode_only)),
        "FFCV, two pipelines": Line("two crops", of(FULL, stock_crop), share=0.5),
    },
    "full, q90": {
        "fastssl": Line("two crops", of(Q90, fastssl_batches, "cpu")),
        "fastssl + views": Line("views", of(Q90, fastssl_batches, "cpu", with_views=True)),
        "decode only": Line("pixels", of(Q90, imdecode_only)),
        "FFCV, two pipelines": Line("two crops", of(Q90, stock_crop), share=0.5),
        "FFCV, two in parallel (memory)": Line("two crops", of(Q90, two_in_parallel)),
    },
}


def measure(batches: Iterator[int]) -> dict[str, float]:
    """Return images per second, peak memory in MB and busy cores; the first images are not timed."""
    peak = Peak()
    warm = 0
    while warm < WARM_UP:
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


def build(photos: Path, folder: Path, copies: int, tables: list[str]) -> None:
    from fastssl.beton import read_samples

    (folder / "photos/all").mkdir(parents=True)
    (folder / "many/all").mkdir(parents=True)
    (folder / "jpegs").mkdir()
    for path in sorted(photos.rglob("*.[jJ]*")):
        os.link(path, folder / "photos/all" / path.name)
        for copy in range(copies):
            os.link(path, folder / "many/all" / f"{copy} {path.name}")
    options = {"canvas": ["--canvas", "256", "--codec", "jpeg"], "blocks": ["--canvas", "256", "--codec", "bc4"]}
    if tables != ["canvas"]:
        options["full"] = ["--max-side", "500"]
    for name, option in options.items():
        command = [sys.executable, "-m", "fastssl", "build-beton", "imagefolder", "--source", folder / "many"]
        subprocess.run([*command, "--out", folder / name, *option], check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-c", WRITE_STOCK, folder / "many", folder / "q90.beton"], check=True, capture_output=True
    )
    metadata, sizes = read_samples(folder / CANVASES)
    content = (folder / CANVASES).read_bytes()
    for i, (start, size) in enumerate(zip(metadata["image"]["data_ptr"], sizes)):
        (folder / "jpegs" / f"{i:06}.jpg").write_bytes(content[int(start) : int(start) + int(size)])


def measure_line(folder: Path, table: str, name: str, workers: int, peers: Path) -> dict[str, float] | None:
    """Run a line in its own process. None if it is not installed."""
    batches = LINES[table][name].batches
    if isinstance(batches, str):
        if not peers.exists():
            return None
        command = [peers, Path(__file__).with_name("loading_peers.py"), batches, folder / "jpegs"]
    else:
        command = [sys.executable, __file__, folder, "--line", table, name]
    done = subprocess.run(
        [*command, "--workers", str(workers)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(workers)},
    )  # fmt: skip
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT")]
    if not found:
        sys.exit(f"{table}, {name}: {done.stderr[-3000:]}")
    result = json.loads(found[0].removeprefix("RESULT"))
    result["rate"] *= LINES[table][name].share
    return result


def as_markdown(table: str, lines: dict[str, list[dict[str, float]]], workers: int) -> str:
    """A table, and a paragraph about the machine."""
    with open("/proc/cpuinfo") as cpuinfo:
        processor = next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name"))
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ffcv", "numba"))
    rounds = max(map(len, lines.values()))
    text = [
        f"| {table} | gives | images/s, median (range) | fastssl is | memory, MB | cores |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in lines.items():
        line = LINES[table][name]
        if not found:
            text.append(f"| {name} | {line.output} | not installed | | | |")
            continue
        rates = [result["rate"] for result in found]
        ratio = statistics.median(own["rate"] / result["rate"] for own, result in zip(lines[line.own], found))
        memory, cores = (statistics.median(result[key] for result in found) for key in ("memory", "cores"))
        text.append(
            f"| {name} | {line.output} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
            f"| {'' if name == line.own else f'{ratio:.2f}x'} | {memory:,.0f} | {cores:.2f} |"
        )
    text += [
        "",
        f"{workers} threads, {os.cpu_count()} cores ({processor}); Python {platform.python_version()}, {packages}; "
        f"{rounds} rounds; {time.strftime('%Y-%m-%d')}.",
    ]
    return "\n".join(text) + "\n"


def replace_table(record: Path, table: str, text: str) -> None:
    begin, end = (f"<!-- {which} of benchmarks/loading.py, {table} -->\n" for which in ("begin", "end"))
    before, rest = record.read_text().split(begin)
    record.write_text(before + begin + text + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--table", choices=LINES, action="append", help="only this one")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python of loading_peers.py")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--line", nargs=2, help=argparse.SUPPRESS)  # measures one line, in its own process
    arguments = parser.parse_args()
    if arguments.line:
        table, name = arguments.line
        print(
            "RESULT", json.dumps(measure(LINES[table][name].batches(arguments.photos, arguments.workers))), flush=True
        )
        os._exit(0)  # stock FFCV's threads do not end

    tables = arguments.table or list(LINES)
    results: dict[str, dict[str, list[dict[str, float]]]] = {
        table: {line: [] for line in LINES[table]} for table in tables
    }
    with tempfile.TemporaryDirectory(dir=arguments.photos.parent) as folder:
        build(arguments.photos, Path(folder), arguments.copies, tables)
        for number in range(arguments.rounds):
            for table in tables:
                # Every second round backwards, so that a machine that slows down or heats up does not favor a line.
                for name in list(LINES[table])[:: -1 if number % 2 else 1]:
                    result = measure_line(Path(folder), table, name, arguments.workers, arguments.peers)
                    if result is not None:
                        results[table][name].append(result)
                        print(f"{table}, {name}: {result['rate']:,.0f} images/s", file=sys.stderr, flush=True)
    for table in tables:
        text = as_markdown(table, results[table], arguments.workers)
        print(text)
        if arguments.record:
            replace_table(arguments.record, table, text)


if __name__ == "__main__":
    main()
