"""Training end to end, compared with lightly: images/s and the share of time spent waiting for data.

pip install lightly
python benchmarks/end_to_end.py --source CIFAR10/train --out records/end-to-end.md

Both train Barlow Twins on the same 5,000 images (500 of each class of an image folder): ResNet-18 with the ImageNet
stem, projector 1024-1024-1024, AdamW, batch 128, 32 px, two views with the same operations and probabilities. lightly
reads the JPEG files through its dataset, its BYOL views and torch's DataLoader; fastssl reads a .beton of them. The two
run alternately, each in a process of its own, --rounds times. The first steps of an epoch are left out, because both
start threads or workers then.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightly_peer import BATCH, SIZE, link_images, make_loader, make_model

IMAGES_PER_CLASS = 500
LEFT_OUT = 9  # of the 39 steps of an epoch


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--source", type=Path, required=True, help="image folder with a folder for each class")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--json", type=Path, help="write the figures here too")
    arguments.add_argument("--only", choices=["lightly"], help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.only:
        print(json.dumps(measure_lightly(options.source, options.device, options.workers)))
        return
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        rounds = measure_rounds(Path(folder), options)
    text = report(options, rounds)
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.json:
        options.json.write_text(json.dumps([{"lightly": theirs, "fastssl": ours} for theirs, ours in rounds]))


def measure_rounds(work: Path, options: argparse.Namespace) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Train both packages alternately, and return what each round has measured: lightly, fastssl."""
    images = work / "images" / "train"
    link_images(options.source, images, IMAGES_PER_CLASS)
    build = [sys.executable, "-m", "fastssl", "build-beton", "imagefolder", "--source", images.parent]
    subprocess.run([*build, "--out", work, "--canvas", str(SIZE)], check=True, stdout=subprocess.DEVNULL)

    rounds = []
    for number in range(options.rounds):
        command = [sys.executable, __file__, "--source", images, "--device", options.device, "--only", "lightly"]
        done = subprocess.run([*command, "--workers", str(options.workers)], check=True, capture_output=True, text=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        ours = measure_fastssl(work, number, options.device, options.workers)
        rounds.append((theirs, ours))
        print(f"round {number + 1}: lightly {theirs}, fastssl {ours}", flush=True)
    return rounds


def measure_fastssl(work: Path, number: int, device: str, workers: int) -> dict[str, float]:
    run_dir = work / f"run{number}"
    keys = [
        f"data.train={work}/train.beton", "data.val=null", f"data.workers={workers}", f"views.size={SIZE}",
        f"train.batch_size={BATCH}", "train.epochs=1", f"train.device={device}", "probe.every=0", "log.every=3",
        "optim.warmup_epochs=0", f"run.dir={run_dir}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "fastssl", "train", "recipes/barlow.yaml", *keys]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if line["step"] > LEFT_OUT]
    seconds = [3 * BATCH / line["images_per_second"] for line in timed]
    waited = sum(line["data_wait"] * took for line, took in zip(timed, seconds))
    return {"images_per_second": len(timed) * 3 * BATCH / sum(seconds), "data_wait": waited / sum(seconds)}


def measure_lightly(images: Path, device: str, workers: int) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    loader = make_loader(images, workers, pin_memory=device == "cuda")
    _, model, criterion = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=1e-4)
    waited, asked, began = 0.0, time.perf_counter(), None
    for step, ((v1, v2), *_) in enumerate(loader, 1):
        v1, v2 = (v.to(device, non_blocking=True, memory_format=torch.channels_last) for v in (v1, v2))
        if step > LEFT_OUT:
            waited += time.perf_counter() - asked
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z1, z2 = model(v1), model(v2)
        loss = criterion(z1.float(), z2.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            loss.item()
        if step == LEFT_OUT:
            began = time.perf_counter()
        asked = time.perf_counter()
    seconds = time.perf_counter() - began
    return {"images_per_second": (step - LEFT_OUT) * BATCH / seconds, "data_wait": waited / seconds}


def report(options: argparse.Namespace, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    def version(name: str) -> str:
        return f"{name} {importlib.metadata.version(name)}"

    def row(name: str, results: list[dict[str, float]]) -> str:
        rates, waits = ([result[key] for result in results] for key in ("images_per_second", "data_wait"))
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        return f"| {name} | {statistics.median(rates):,.0f} | {span} | {statistics.median(waits):.1%} |"

    ratios = [ours["images_per_second"] / theirs["images_per_second"] for theirs, ours in rounds]
    versions = ", ".join(version(name) for name in ("lightly", "torch", "timm", "torchvision"))
    return "\n".join([
        "# End to end, compared with lightly",
        "",
        f"`python benchmarks/end_to_end.py --source CIFAR10/train --device {options.device} "
        f"--workers {options.workers} --rounds {options.rounds}`; "
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores.",
        "",
        f"5,000 CIFAR-10 images (JPEG files), {SIZE} px, batch {BATCH}, ResNet-18 with the ImageNet stem, Barlow "
        f"Twins. Steps {LEFT_OUT + 1} to 39 of an epoch, median of {len(rounds)} rounds.",
        "",
        "| | images/s | range | waiting for data |",
        "|---|---|---|---|",
        row("lightly, torchvision, DataLoader", [theirs for theirs, _ in rounds]),
        row("fastssl", [ours for _, ours in rounds]),
        "",
        f"fastssl / lightly: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
