"""`fastssl embed` compared with torchvision's ImageFolder and a DataLoader, on the same photographs and encoder.

    python benchmarks/embed.py RUN --images FOLDER [--copies 4] [--repeats 3]

Both read JPEG files, make the input of the run's evaluation transform (squash), run the encoder on the CPU and write an
.npz with names, h, mu and sigma. The peer decodes with Pillow in as many worker processes as there are cores; its JPEGs
are shrunk while they are decoded (Image.draft), as ours are. Each measurement is a process of its own; the clock starts
when the model has been loaded and ends when the file is closed. Threads of torch wait passively in both. The two take
turns, because other programs may use the machine.

FOLDER holds images without subfolders; copies are links to it. CPU seconds are those of all processes: on an idle
machine they, not the wall clock of a busy one, limit the rate.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measure(kind: str, run: str, images: str, out: str) -> None:
    """Embed once, and print the seconds as JSON."""
    import torch

    from fastssl.evaluation.embed import load_embedder

    encoder = load_embedder(run, device="cpu")
    encoder.model.embed(torch.zeros(256, encoder.recipe.model.in_chans, *[encoder.recipe.views.size] * 2))
    before, start = cpu_seconds(), time.perf_counter()
    (embed_with_fastssl if kind == "fastssl" else embed_with_torchvision)(encoder, images, out)
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - before}))


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def embed_with_fastssl(encoder, images: str, out: str) -> None:
    from fastssl.evaluation.embed import embed_images

    embed_images(encoder, images, out)


def embed_with_torchvision(encoder, images: str, out: str) -> None:
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional as F

    views = encoder.recipe.views
    size = (views.size, views.size)

    def load(path: str) -> Image.Image:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            return image.convert("RGB")

    def transform(image: Image.Image) -> torch.Tensor:
        return F.normalize(F.to_tensor(image.resize(size, Image.Resampling.BILINEAR)), views.mean, views.std)

    dataset = ImageFolder(images, transform, loader=load)
    columns: dict[str, list[np.ndarray]] = {"h": [], "mu": [], "sigma": []}
    workers = len(os.sched_getaffinity(0))
    with torch.inference_mode():
        for batch, _ in DataLoader(dataset, batch_size=256, num_workers=workers):
            embedding = encoder.model.embed(batch)
            for name, parts in columns.items():
                if (column := getattr(embedding, name)) is not None:  # mu, sigma of a stochastic model
                    parts.append(column.numpy())
    names = np.array([path for path, _ in dataset.samples])
    np.savez(out, name=names, **{name: np.concatenate(parts) for name, parts in columns.items() if parts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", required=True)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=("fastssl", "torchvision"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.run, options.images, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        for copy in range(options.copies):
            (root / f"copy{copy}").symlink_to(Path(options.images).resolve())
        results: dict[str, list[dict[str, float]]] = {"fastssl": [], "torchvision": []}
        for repeat in range(options.repeats):
            for kind, measured in results.items():
                out = Path(folder) / f"{kind}.npz"
                command = [sys.executable, __file__, options.run, "--images", str(root), "--measure", kind]
                done = subprocess.run(
                    [*command, "--out", str(out)], env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                measured.append(json.loads(done.stdout.splitlines()[-1]))
                with np.load(out) as file:
                    count = len(file["name"])
                line = measured[-1]
                print(
                    f"{repeat + 1} {kind:12} {count / line['seconds']:7,.0f} images/s, "
                    f"{1e3 * line['cpu'] / count:.2f} ms of CPU per image, load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
        with np.load(Path(folder) / "fastssl.npz") as ours, np.load(Path(folder) / "torchvision.npz") as peer:
            cosine = (
                (ours["h"] * peer["h"]).sum(1) / np.linalg.norm(ours["h"], axis=1) / np.linalg.norm(peer["h"], axis=1)
            )
            print(f"cosine similarity of h: median {np.median(cosine):.4f}, least {cosine.min():.4f}")
    for key, text in (("seconds", "wall clock"), ("cpu", "CPU time")):
        ratios = [b[key] / a[key] for a, b in zip(results["fastssl"], results["torchvision"])]
        print(
            f"torchvision / fastssl, {text}: median {np.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})"
        )


if __name__ == "__main__":
    main()
