"""fp32 and bf16 on a CPU: a training step of ResNet-18 (views ready), and training with loading and views.

    python benchmarks/cpu_precision.py                                # the tables, minutes on two idle cores
    python benchmarks/cpu_precision.py --rounds 1 --no-compile        # a short look
    python benchmarks/cpu_precision.py --record records/cpu-precision.md

Variants take turns within a round; each row is the median over rounds of images per second. The step is the one of
`fastssl train` (Barlow Twins, projector 1024-1024-1024, AdamW). The time to compile is that of the first step, in fp32
and bf16. A compiled step has torch's own convolutions (fastssl/models/small_convolution.py).
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastssl.beton import build_beton
from fastssl.common.environment import device_name
from fastssl.profiling.device_stages import take_step, with_fixed_views
from fastssl.recipe import load_recipe
from fastssl.training.loop import train_step
from fastssl.training.setup import TrainingRun, prepare

CPU = torch.device("cpu")
SIZES = {32: 64, 224: 16}  # px: batch
IMAGES = 256
BEGIN, END = "<!-- begin: benchmarks/cpu_precision.py -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--record", type=Path, help="Markdown file whose table is replaced")
    options = parser.parse_args()
    threads = sorted({1, torch.get_num_threads()})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, batch in SIZES.items():
            data = make_data(Path(folder), size)
            work: dict[tuple[str, str, int], Callable[[], int]] = {}
            compile_seconds = {}
            for precision in ("fp32", "bf16"):
                run = make_run(data, size, batch, precision, compiled=False)
                step, whole = step_of(run), training_of(run)
                for count in threads:
                    work[precision, "step", count] = step
                    work[precision, "train", count] = whole
                if not options.no_compile:  # a graph for each number of threads: the largest only
                    torch.set_num_threads(threads[-1])
                    compiled = step_of(make_run(data, size, batch, precision, compiled=True))
                    start = time.perf_counter()
                    compiled()
                    compile_seconds[precision] = time.perf_counter() - start
                    work[precision, "compiled step", threads[-1]] = compiled
            rates = measure(work, options.rounds)
            for kind, count in dict.fromkeys((kind, count) for _, kind, count in work):
                fp32, bf16 = (rates[precision, kind, count] for precision in ("fp32", "bf16"))
                seconds = ""
                if kind == "compiled step":
                    seconds = ", ".join(f"{compile_seconds[precision]:.0f} s" for precision in ("fp32", "bf16"))
                figures = f"{fp32:,.1f} | {bf16:,.1f} | {bf16 / fp32:.2f}"
                rows.append(f"| {size} px, batch {batch} | {kind} | {count} | {figures} | {seconds} |")
                print(rows[-1], flush=True)
    head = "| images | what | threads | fp32, images/s | bf16, images/s | ratio | to compile |"
    table = "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
    about = f"{device_name(CPU)}, torch {torch.__version__}, {options.rounds} rounds, medians."
    print(f"\n{about}\n\n{table}")
    if options.record:
        text = options.record.read_text()
        block = f"{BEGIN}\n{about}\n\n{table}\n{END}"
        text, found = re.subn(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, text, flags=re.S)
        assert found == 1, f"{options.record} has no place for the table"
        options.record.write_text(text)


def make_data(folder: Path, size: int) -> Path:
    """Smooth random images in two classes, as a canvas file."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 4)):
        for number in range(count):
            path = folder / f"images{size}" / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)
    build_beton("imagefolder", folder / f"images{size}", folder / f"beton{size}", canvas=size, workers=1)
    return folder / f"beton{size}"


def make_run(data: Path, size: int, batch: int, precision: str, compiled: bool) -> TrainingRun:
    keys = [
        f"data.train={data}", f"data.val={data}", f"views.size={size}", f"train.batch_size={batch}", "train.device=cpu",
        "model.backbone=resnet18", "model.projector={layers: 3, hidden: 1024, out: 1024}", "probe.every=0",
        f"train.precision={precision}", f"train.compile={str(compiled).lower()}", "train.epochs=1000",
    ]  # fmt: skip
    run, _ = prepare(load_recipe("recipes/barlow.yaml", keys), CPU, None)
    return run


def step_of(run: TrainingRun) -> Callable[[], int]:
    """One step on fixed views; returns its images."""
    batch = next(iter(run.state.loader))
    fixed = with_fixed_views(run, run.views(batch, 0))
    return lambda: take_step(fixed, [batch], 0)


def training_of(run: TrainingRun) -> Callable[[], int]:
    """Up to four steps with loading and views; returns their images."""

    def train() -> int:
        images = 0
        run.state.loader.set_epoch(0)
        for number, batch in enumerate(run.state.loader, 1):
            run.state.step = 0
            train_step(run, [batch], 0, run.schedule.rate(0))
            images += len(batch.index)
            if number == 4:
                break
        return images

    return train


def measure(work: dict[tuple[str, str, int], Callable[[], int]], rounds: int) -> dict[tuple[str, str, int], float]:
    rates: dict[tuple[str, str, int], list[float]] = {key: [] for key in work}
    for number in range(rounds + 1):  # the first round warms up
        for key, step in work.items():
            torch.set_num_threads(key[2])
            start = time.perf_counter()
            images = step()
            if number:
                rates[key].append(images / (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in rates.items()}


if __name__ == "__main__":
    main()
