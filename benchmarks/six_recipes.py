"""Does training help? The six CIFAR-10 recipes in short form, each compared with its own untrained encoder.

    python benchmarks/six_recipes.py data/cifar10 runs/six --images 5000 --epochs 20

Prints a Markdown table with the kNN accuracy (k = 20, T = 0.07) on all of val.beton with the training images as the
bank, and the images/s of the run. For CPUs: ImageNet stem, batch 128.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import timm
import torch

from fastssl import load_model, load_recipe
from fastssl.evaluation.probe import knn_probe
from fastssl.models import SSLModel
from fastssl.training import train

NAMES = ("barlow", "vicreg", "zprob_barlow", "zprob_vicreg", "hprob_barlow", "hprob_vicreg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of train.beton and val.beton")
    parser.add_argument("out", type=Path, help="folder for the run directories")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()

    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} torch threads; {options.images} images, {options.epochs} epochs, "
          f"seed {options.seed}\n")  # fmt: skip
    rows = []
    for name in options.recipes:
        recipe = load_recipe(
            f"recipes/cifar10/{name}.yaml",
            [f"data.train={options.data}/train.beton", f"data.val={options.data}/val.beton",
             f"data.limit={options.images}", f"train.epochs={options.epochs}", f"seed={options.seed}",
             f"run.dir={options.out}/{name}", "model.stem=imagenet", "train.batch_size=128", "log.every=39"],
        )  # fmt: skip
        probe = knn_probe(recipe)
        torch.manual_seed(recipe.seed)  # the weights that training begins with
        untrained = probe(SSLModel(recipe))["knn"]
        run_dir = train(recipe)
        trained = probe(load_model(run_dir))["knn"]
        speed = [json.loads(line)["images_per_second"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        rows.append((name, untrained, trained, statistics.median(speed)))
        print(rows[-1], flush=True)

    print("\n| recipe | untrained kNN % | trained kNN % | gain | images/s |\n|---|---|---|---|---|")
    for name, untrained, trained, speed in rows:
        gain = 100 * (trained - untrained)
        print(f"| {name} | {100 * untrained:.1f} | {100 * trained:.1f} | {gain:+.1f} | {speed:.0f} |")


if __name__ == "__main__":
    main()
