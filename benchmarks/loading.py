"""Measure how many source images per second loaders deliver: fastssl, and the strongest peers found.

    python benchmarks/loading.py PHOTOS          # all tasks: at most 18 minutes, after 3 of building
    python benchmarks/loading.py PHOTOS --tasks crops-originals --rounds 1 --seconds 2
    python benchmarks/loading.py PHOTOS --render --record records/loading.md README.md docs/loading.md

PHOTOS is a folder of JPEGs, as they come from a camera or from ImageNet. The files that the loaders read are built from
them once, in --work, all from the same images: as they are (build-beton --max-side 500 for fastssl and FFCV), and as
canvases of 256 px, in JPEG, in BC4 blocks, and as raw pixels. A task compares loaders that give the same; a line says
what it gives, in batches of 256 images (128 for the whole augmentation); a view may be a strided part of a batch.

Every line runs in its own process, with the page cache warm, one after the other; the lines of a task take turns, and
every second round goes backwards. An image counts once, however many views it has. The CPU seconds are those of the
process and its children. A result is appended to --results as each line ends. --record writes the tables of each task's
last run into the Markdown files, between comments that name them. The peers have their own Python: loading_peers.py.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import loading_handmade as handmade
import loading_peers as peers
from loading_own import fastssl_batches, ffcv_batches, memcpy_batches
from loading_shared import Views, measure
from loading_tables import Row, Says, TaskSays, latest, replace_block, summary_table, task_table

PACKAGES = ("torch", "torchvision", "ffcv", "numba")
PEER_PACKAGES = (
    "nvidia-dali-cuda120", "simplejpeg", "opencv-python-headless", "torchcodec", "spdl", "turboloader", "litdata",
    "datago", "albumentationsx",
)  # fmt: skip
NO, SHRINKS = "no", "if both sides shrink"
SECONDS_PER_LINE = 120  # after which a line counts as hanging


class Line(NamedTuple):
    """A loader on one source."""

    batches: Callable[..., Iterator[Views]]
    source: str
    flip: str = "yes"
    antialiased: str = "yes"
    bound: bool = False  # not a loader
    share: float = 1.0  # of the rate that is measured

    @property
    def ours(self) -> bool:
        return self.batches is fastssl_batches

    @property
    def of_peer(self) -> bool:
        return self.batches.__module__ in (peers.__name__, handmade.__name__)


class Task(NamedTuple):
    """Loaders that give the same."""

    title: str
    job: str
    lines: dict[str, Line]
    batch: int = 256


TASKS = {
    "bytes": Task(
        "load canvases in BC4 blocks, as they are", "bytes",
        {
            "fastssl": Line(fastssl_batches, "blocks", "-", "-"),
            "FFCV": Line(ffcv_batches, "blocks", "-", "-"),
            "memcpy": Line(memcpy_batches, "blocks", "-", "-", bound=True),
        },
    ),
    "decode-canvas": Task(
        "decode canvases of 256 px", "decode",
        {
            "fastssl, BC4": Line(fastssl_batches, "blocks", "-", "-"),
            "fastssl, JPEG": Line(fastssl_batches, "canvas", "-", "-"),
            "FFCV": Line(ffcv_batches, "canvas", "-", "-"),
            "DALI": Line(peers.dali, "canvas", "-", "-"),
            "simplejpeg, threads": Line(handmade.simplejpeg_opencv, "canvas", "-", "-"),
            "torchcodec, threads": Line(handmade.torchcodec_torchvision, "canvas", "-", "-"),
            "SPDL": Line(peers.spdl, "canvas", "-", "-"),
            "TurboLoader": Line(peers.turboloader, "canvas", "-", "-"),
            "LitData and torchcodec": Line(peers.litdata, "canvas", "-", "-"),
            "datago": Line(peers.datago, "canvas", "-", "-"),
        },
    ),
    "decode-originals": Task(
        "decode originals to 256 px", "decode",
        {
            "fastssl": Line(fastssl_batches, "originals", "-"),
            "torchcodec and torchvision, threads": Line(handmade.torchcodec_torchvision, "originals", "-"),
            "simplejpeg and OpenCV, threads": Line(handmade.simplejpeg_opencv, "originals", "-", SHRINKS),
            "DALI": Line(peers.dali, "originals", "-"),
            "SPDL": Line(peers.spdl, "originals", "-"),
            "TurboLoader": Line(peers.turboloader, "originals", "-", NO),
            "LitData, torchcodec and torchvision": Line(peers.litdata, "originals", "-"),
        },
    ),
    "crops-originals": Task(
        "two crops of 224 px from originals", "crops",
        {
            "fastssl": Line(fastssl_batches, "originals"),
            "torchcodec and torchvision, threads": Line(handmade.torchcodec_torchvision, "originals"),
            "simplejpeg and OpenCV, threads": Line(handmade.simplejpeg_opencv, "originals", antialiased=SHRINKS),
            "DALI": Line(peers.dali, "originals"),
            "FFCV, two pipelines": Line(ffcv_batches, "originals", antialiased=SHRINKS, share=0.5),
            "SPDL": Line(peers.spdl, "originals"),
            "TurboLoader": Line(peers.turboloader, "originals", antialiased=NO),
        },
    ),
    "crops-canvas": Task(
        "two crops of 224 px from canvases", "crops",
        {
            "fastssl, BC4": Line(fastssl_batches, "blocks"),
            "fastssl, JPEG": Line(fastssl_batches, "canvas"),
            "simplejpeg and OpenCV, threads": Line(handmade.simplejpeg_opencv, "canvas", antialiased=SHRINKS),
            "torchcodec and torchvision, threads": Line(handmade.torchcodec_torchvision, "canvas"),
            "DALI": Line(peers.dali, "canvas"),
            "FFCV, two pipelines": Line(ffcv_batches, "canvas", antialiased=SHRINKS, share=0.5),
            "FFCV, raw pixels, two pipelines": Line(ffcv_batches, "raw", antialiased=SHRINKS, share=0.5),
        },
    ),
    "floats-canvas": Task(
        "two crops, normalized float32, from canvases", "floats",
        {
            "fastssl, BC4": Line(fastssl_batches, "blocks"),
            "fastssl, JPEG": Line(fastssl_batches, "canvas"),
            "TurboLoader, raw pixels": Line(peers.turboloader, "raw", antialiased=NO),
            "TurboLoader": Line(peers.turboloader, "canvas", antialiased=NO),
            "DALI": Line(peers.dali, "canvas"),
            "FFCV, two pipelines": Line(ffcv_batches, "canvas", antialiased=SHRINKS, share=0.5),
            "FFCV, raw pixels, two pipelines": Line(ffcv_batches, "raw", antialiased=SHRINKS, share=0.5),
            "AlbumentationsX, threads": Line(handmade.albumentations_threads, "canvas", antialiased=NO),
        },
    ),
    "whole-originals": Task(
        "the whole augmentation, from originals", "whole",
        {
            "fastssl": Line(fastssl_batches, "originals"),
            "AlbumentationsX, processes": Line(handmade.albumentations_processes, "originals", antialiased=NO),
            "AlbumentationsX, threads": Line(handmade.albumentations_threads, "originals", antialiased=NO),
            "DALI": Line(peers.dali, "originals"),
            "torchcodec and torchvision, processes": Line(handmade.torchcodec_processes, "originals"),
            "torchvision and PIL, DataLoader": Line(handmade.torchvision_pil, "originals"),
        },
        batch=128,
    ),
    "whole-canvas": Task(
        "the whole augmentation, from canvases", "whole",
        {
            "fastssl, BC4": Line(fastssl_batches, "blocks"),
            "fastssl, JPEG": Line(fastssl_batches, "canvas"),
            "AlbumentationsX, processes": Line(handmade.albumentations_processes, "canvas", antialiased=NO),
            "AlbumentationsX, threads": Line(handmade.albumentations_threads, "canvas", antialiased=NO),
            "DALI": Line(peers.dali, "canvas"),
            "torchcodec and torchvision, processes": Line(handmade.torchcodec_processes, "canvas"),
        },
        batch=128,
    ),
}  # fmt: skip
SOURCES = {"originals": "JPEG", "canvas": "JPEG", "blocks": "BC4", "raw": "pixels"}


def says(task: Task) -> TaskSays:
    lines = {
        name: Says(SOURCES[line.source], line.flip, line.antialiased, line.ours, line.bound)
        for name, line in task.lines.items()
    }
    return TaskSays(task.title, lines)


WRITE_RAW = """
import sys
from pathlib import Path
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image
paths = sorted(Path(sys.argv[1]).iterdir())[:2000]
class Photos:
    def __len__(self):
        return len(paths)
    def __getitem__(self, index):
        return Image.open(paths[index]).convert("RGB"), 0
fields = {"image": RGBImageField("raw"), "label": IntField()}
DatasetWriter(sys.argv[2], fields, num_workers=2).from_indexed_dataset(Photos(), shuffle_indices=True)
"""


def build(photos: Path, folder: Path, copies: int, python_of_peers: Path) -> None:
    """Write the files of all loaders, if they are not there yet. The photographs are linked `copies` times."""
    from fastssl.beton import read_samples

    done = folder / "built"
    if done.exists():
        return
    (folder / "many/all").mkdir(parents=True)
    (folder / "jpegs").mkdir()
    for path in sorted(photos.rglob("*.[jJ]*")):
        for copy in range(copies):
            (folder / "many/all" / f"{copy} {path.name}").symlink_to(path.resolve())
    canvas = ["--canvas", "256", "--codec"]
    options = {"canvas": [*canvas, "jpeg"], "blocks": [*canvas, "bc4"], "full": ["--max-side", "500"]}
    for name, option in options.items():
        command = [sys.executable, "-m", "fastssl", "build-beton", "imagefolder", "--source", folder / "many"]
        subprocess.run([*command, "--out", folder / name, *option], check=True, capture_output=True)
    metadata, sizes = read_samples(folder / "canvas/train.beton")
    content = (folder / "canvas/train.beton").read_bytes()
    for i, (start, size) in enumerate(zip(metadata["image"]["data_ptr"], sizes)):
        (folder / "jpegs" / f"{i:06}.jpg").write_bytes(content[int(start) : int(start) + int(size)])
    raw = [sys.executable, "-c", WRITE_RAW, folder / "jpegs", folder / "raw.beton"]
    subprocess.run(raw, check=True, capture_output=True)
    if python_of_peers.exists():
        subprocess.run([python_of_peers, peers.__file__, folder], check=True, capture_output=True)
    done.touch()


def measure_line(task: str, name: str, number: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Run a line in its own process: what it measured, or {"error": ...}."""
    line = TASKS[task].lines[name]
    python = arguments.peers if line.of_peer else sys.executable
    if not Path(python).exists():
        return {"error": "not installed"}
    more = ["--sheet", arguments.sheet] if arguments.sheet and number == 1 else []
    command = [python, __file__, arguments.work, "--line", task, name, "--workers", arguments.workers, *more]
    command += ["--batch", arguments.batch or TASKS[task].batch]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.workers))
    try:
        done = subprocess.run(
            [*map(str, command), "--seconds", str(arguments.seconds)],
            capture_output=True, text=True, env={**os.environ, **threads}, timeout=SECONDS_PER_LINE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"did not end within {SECONDS_PER_LINE} seconds"}
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT")]
    if not found:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(found[0].removeprefix("RESULT"))


def run_line(arguments: argparse.Namespace) -> None:
    """In the process of a line: measure it and print the result."""
    task, name = TASKS[arguments.line[0]], arguments.line[1]
    line = task.lines[name]
    sheet = arguments.sheet / f"{arguments.line[0]} {name}.png" if arguments.sheet else None
    batches = line.batches(arguments.photos, line.source, task.job, arguments.batch, arguments.workers)
    result = measure(batches, arguments.seconds, sheet)
    for key in ("rate", "per_core_second"):
        result[key] *= line.share
    if line.share < 1:  # one of two views was measured
        result["output"] = result["output"].replace(" ", " 2 x ", 1)
    print("RESULT", json.dumps(result), flush=True)
    os._exit(0)  # stock FFCV's threads do not end


def versions(python_of_peers: Path, workers: int) -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        processor = next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name"))
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    if python_of_peers.exists():
        ask = f"import importlib.metadata as m\nfor n in {PEER_PACKAGES}: print(n, m.version(n))"
        answer = subprocess.run([python_of_peers, "-c", ask], capture_output=True, text=True)
        found += answer.stdout.splitlines()
    cores = f"{workers} threads, {os.cpu_count()} cores ({processor})"
    return f"{cores}; Python {platform.python_version()}, {', '.join(found)}"


def run_rounds(arguments: argparse.Namespace) -> None:
    row = {"run": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(arguments.peers, arguments.workers)}
    end = time.monotonic() + 60 * arguments.minutes - 15  # of which the last line may need 15 s
    for number in range(1, arguments.rounds + 1):
        lines = [
            (task, name) for task in arguments.tasks or TASKS for name in TASKS[task].lines if arguments.only in name
        ]
        # Every second round backwards, so that a machine that slows down or heats up does not favor a line.
        for task, name in lines if number % 2 else lines[::-1]:
            if time.monotonic() > end:
                print(f"{number}: {task}, {name}: left out, after {arguments.minutes:g} minutes", file=sys.stderr)
                continue
            result = measure_line(task, name, number, arguments)
            with open(arguments.results, "a") as file:
                file.write(json.dumps(row | {"task": task, "line": name, "round": number} | result) + "\n")
            print(f"{number}: {task}, {name}: {result}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", help="only these")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="per line and round, after a warm-up")
    parser.add_argument("--minutes", type=float, default=18.0, help="no line starts later")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, help="of all tasks, for a trial on a busy machine")
    parser.add_argument("--work", type=Path, default=Path(".cache/loading"), help="of the files that are built")
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers/bin/python"), help="their Python")
    parser.add_argument("--results", type=Path, default=Path(".cache/loading/results.jsonl"))
    parser.add_argument("--render", action="store_true", help="the tables of earlier runs, without measuring")
    parser.add_argument("--record", type=Path, nargs="+", default=[], help="Markdown files with blocks for tables")
    parser.add_argument("--sheet", type=Path, help="a folder for images of the first batch of every line")
    parser.add_argument("--line", nargs=2, help=argparse.SUPPRESS)  # measures one line, in its own process
    arguments = parser.parse_args()
    if arguments.line:
        return run_line(arguments)
    if not arguments.render:
        build(arguments.photos, arguments.work, arguments.copies, arguments.peers)
        run_rounds(arguments)
    rows: list[Row] = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    described = {key: says(task) for key, task in TASKS.items()}
    tables = {key: task_table(task, latest(rows, key)) for key, task in described.items() if latest(rows, key)}
    tables["summary"] = summary_table(described, rows)
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
        for path in arguments.record:
            replace_block(path, name, text)


if __name__ == "__main__":
    main()
