"""Accuracy and time of Barlow Twins here and of lightly's: the same images, views, model, optimizer and steps.

pip install lightly
python benchmarks/parity.py --source CIFAR10 --seeds 0 1 2 --out records/parity.md

CIFAR10 has the folders train/CLASS and test/CLASS. Both train on the same images of each class: ResNet-18 with the
ImageNet stem, projector 1024-1024-1024, AdamW with a cosine schedule, batch 128, 32 px, one thread. lightly reads the
files through its dataset and makes its BYOL views of them with torchvision; fastssl reads a .beton of the same files.
The encoders of both are then evaluated as files of weights, by the same commands. Each seed trains both at once, so
that both share the machine with the same load; CPU time leaves out what other processes take. --work keeps everything:
the same command goes on with the trainings that have not finished.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lightly_peer import BATCH, SIZE, link_images, make_loader, make_model

LR = 1e-3 * BATCH / 256
WEIGHT_DECAY = 1e-4
FINAL_LR_FACTOR = 0.01
CLIP = 0.5
NAMES = ("lightly", "fastssl")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--source", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=20)
    arguments.add_argument("--images-per-class", type=int, default=1000)
    arguments.add_argument(
        "--work", type=Path, default=Path(".cache/parity"), help="folder of images, runs and results"
    )
    arguments.add_argument("--out", type=Path, help="file of the table")
    arguments.add_argument("--train", choices=NAMES, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    work = options.work  # other images or epochs have other results
    source = hashlib.sha256(str(options.source.resolve()).encode()).hexdigest()[:8]
    options.work = work / f"{source}-{options.images_per_class}-per-class-{options.epochs}-epochs"
    if options.train:
        (seed,) = options.seeds
        train_timed(options, options.train, seed)
        return
    prepare_images(options)
    results = [result_of(options, seed, work) for seed in options.seeds]
    text = report(options, results)
    print(text)
    if options.out:
        options.out.write_text(text)


def prepare_images(options: argparse.Namespace) -> None:
    """Link the first images of each class, and build .beton files of them and of the test images."""
    images = options.work / "images"
    if (options.work / "val.beton").exists():
        return
    link_images(options.source / "train", images / "train", options.images_per_class)
    link_images(options.source / "test", images / "val", None)
    fastssl("build-beton", "imagefolder", "--source", images, "--out", options.work, "--canvas", SIZE)


def result_of(options: argparse.Namespace, seed: int, work: Path) -> dict[str, dict[str, float]]:
    """Time and accuracies of both trainings with a seed. They run at once, the evaluations after them."""
    path = options.work / f"seed{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    command = [
        sys.executable, __file__, "--source", options.source, "--seeds", seed, "--epochs", options.epochs,
        "--images-per-class", options.images_per_class, "--work", work,
    ]  # fmt: skip
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen([*map(str, command), "--train", name], env=one_thread, start_new_session=True)
        for name in NAMES
        if not (folder_of(options, name, seed) / "time.json").exists()
    }
    try:
        while None in (codes := {name: process.poll() for name, process in started.items()}).values():
            if any(codes.values()):
                break
            time.sleep(1)
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # with the training that it has started
                process.wait()
    if failed := [name for name, code in codes.items() if code]:
        sys.exit(f"{failed[0]} ended with exit code {codes[failed[0]]}.")
    result = {name: accuracies(options, name, seed) for name in NAMES}
    for name in NAMES:
        result[name] |= json.loads((folder_of(options, name, seed) / "time.json").read_text())
    path.write_text(json.dumps(result, indent=2))
    print(f"seed {seed}: {result}", flush=True)
    return result


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.work / f"{name}{seed}"


def train_timed(options: argparse.Namespace, name: str, seed: int) -> None:
    """Train from the start, and write the time that it took."""
    folder = folder_of(options, name, seed)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    (train_lightly if name == "lightly" else train_fastssl)(options, seed)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(each.ru_utime + each.ru_stime for each in used)
    times = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds}
    (folder / "time.json").write_text(json.dumps(times))


def train_fastssl(options: argparse.Namespace, seed: int) -> None:
    work = options.work
    fastssl(
        "train", "recipes/cifar10/barlow.yaml", f"data.train={work}/train.beton", "data.val=null", "probe.every=0",
        "data.workers=1", "model.stem=imagenet", "model.projector.layers=3", "views.mean=[0.485,0.456,0.406]",
        "views.std=[0.229,0.224,0.225]", "train.device=cpu", "train.precision=fp32", f"train.batch_size={BATCH}",
        f"train.epochs={options.epochs}", f"seed={seed}", f"run.dir={folder_of(options, 'fastssl', seed)}",
    )  # fmt: skip


def train_lightly(options: argparse.Namespace, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    # Without blur: the views of recipes/cifar10/barlow.yaml.
    loader = make_loader(options.work / "images" / "train", gaussian_blur=0.0)
    encoder, model, criterion = make_model()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LR, fused=True)
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LR * FINAL_LR_FACTOR)
    for epoch in range(options.epochs):
        for (v1, v2), *_ in loader:
            v1, v2 = (v.to(memory_format=torch.channels_last) for v in (v1, v2))
            loss = criterion(model(v1), model(v2))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"lightly seed {seed} epoch {epoch + 1}: loss {loss.item():.1f}", file=sys.stderr, flush=True)
    folder = folder_of(options, "lightly", seed)
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in encoder.state_dict().items()}, folder / "encoder.safetensors")


def accuracies(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Accuracies in percent, of nearest neighbors and of a linear classifier."""
    folder = folder_of(options, name, seed)
    keys = [
        "--weights", folder / "encoder.safetensors", "--backbone", "resnet18", "--size", SIZE,
        "--train", options.work / "train.beton", "--val", options.work / "val.beton", "--out-dir", folder / "results",
    ]  # fmt: skip
    found = {}
    for evaluation, metric in (("knn", "accuracy_k20_t0.07"), ("linear", "accuracy")):
        fastssl("eval", evaluation, *keys)
        (path,) = (folder / "results" / "eval").glob(f"{evaluation}*.json")
        found[evaluation] = 100 * json.loads(path.read_text())["metrics"][metric]
    return found


def fastssl(*arguments: object) -> None:
    command = [sys.executable, "-m", "fastssl", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def report(options: argparse.Namespace, results: list[dict[str, dict[str, float]]]) -> str:
    def cell(values: list[float], digits: int = 1) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    def row(name: str) -> str:
        of = {key: [result[name][key] for result in results] for key in ("knn", "linear", "cpu_seconds", "seconds")}
        minutes = {key: cell([x / 60 for x in of[key]]) for key in ("cpu_seconds", "seconds")}
        return (
            f"| {name} | {cell(of['knn'])} | {cell(of['linear'])} | {minutes['cpu_seconds']} | {minutes['seconds']} |"
        )

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lightly", "torch", "timm"))
    seeds = " ".join(map(str, options.seeds))
    train, test = (sum(1 for _ in (options.work / "images" / split).glob("*/*")) for split in ("train", "val"))
    ratios = [result["lightly"]["cpu_seconds"] / result["fastssl"]["cpu_seconds"] for result in results]
    lines = [
        "# Barlow Twins here and lightly's: accuracy and time",
        "",
        f"`python benchmarks/parity.py --source CIFAR10 --seeds {seeds} --epochs {options.epochs} "
        f"--images-per-class {options.images_per_class}`; Python "
        f"{platform.python_version()}, {versions}; {os.cpu_count()} cores, both trained at once, one thread each.",
        "",
        f"{train:,} CIFAR-10 images, {options.epochs} epochs, {SIZE} px, batch {BATCH}, ResNet-18 with the ImageNet",
        f"stem. Accuracies in percent on the {test:,} test images, mean ± standard deviation over the seeds.",
        "",
        "| | kNN | linear | CPU minutes | minutes |",
        "|---|---|---|---|---|",
        *map(row, NAMES),
        "",
    ]
    for metric in ("knn", "linear") if len(results) > 1 else ():
        differences = [result["fastssl"][metric] - result["lightly"][metric] for result in results]
        # Of independent trainings: a seed means other random numbers in each.
        deviations = [statistics.stdev([result[name][metric] for result in results]) for name in NAMES]
        error = (sum(x**2 for x in deviations) / len(results)) ** 0.5
        lines.append(
            f"{metric}: fastssl - lightly {statistics.mean(differences):+.1f}, standard error {error:.1f} points."
        )
    lines += ["", f"CPU time, lightly / fastssl: {statistics.median(ratios):.2f}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
