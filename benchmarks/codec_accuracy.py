"""Does the codec of a canvas cost accuracy? Barlow Twins and VICReg on the same images, stored as pixels, JPEG and BC4.

    for codec in pixels jpeg bc4; do       # pixels: without --codec
        fastssl build-beton imagefolder --source IMAGES --out DATA/$codec --canvas 32 [--codec $codec]
    done
    python benchmarks/codec_accuracy.py DATA RUNS --images 10000 --epochs 10 --seeds 0 1 2

Each run trains and is tested on files of the same codec: a user has no other ones. Runs of a seed have the same initial
weights, order, crops and augmentations, so they are compared in pairs. A run that is complete is not repeated. Prints a
Markdown table: accuracies of the representation by kNN (k = 20, T = 0.07) and by logistic regression, and differences
from pixels with 95 % intervals by a bootstrap over the test images and the seeds.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fastssl import load_model, load_recipe
from fastssl.evaluation.features import compute_features
from fastssl.evaluation.knn import knn_predictions
from fastssl.evaluation.runs import BetonSubset
from fastssl.training import train

CODECS = ("pixels", "jpeg", "bc4")
OBJECTIVES = ("barlow", "vicreg")
PROTOCOLS = ("knn", "linear")
RESAMPLES = 2000


class Job(NamedTuple):
    objective: str
    codec: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}_{self.codec}_{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=Path, help="folder with pixels/, jpeg/ and bc4/, each of train.beton and test.beton"
    )
    parser.add_argument("out", type=Path, help="folder for runs and results")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="more overrides of the recipes")
    options = parser.parse_args()
    for seed, objective, codec in itertools.product(options.seeds, OBJECTIVES, CODECS):
        job = Job(objective, codec, seed)
        if not result_path(options.out, job).exists():
            run(job, options)
            print_accuracy(options.out, job)
    print_table(options.out, options.seeds)


def result_path(out: Path, job: Job) -> Path:
    return out / f"{job.name}.npz"


def run(job: Job, options: argparse.Namespace) -> None:
    """Train, and save for each test image whether each protocol classifies it correctly."""
    folder = options.data / job.codec
    recipe = load_recipe(
        f"recipes/cifar10/{job.objective}.yaml",
        [f"data.train={folder}/train.beton", "data.val=null", f"data.limit={options.images}", f"seed={job.seed}",
         f"train.epochs={options.epochs}", "train.batch_size=128", f"model.backbone={options.backbone}",
         "model.stem=imagenet", "probe.every=0", f"run.dir={options.out}/{job.name}", *options.set],
    )  # fmt: skip
    model = load_model(train(recipe))
    bank = compute_features(model, BetonSubset(folder / "train.beton", limit=options.images), recipe.views)
    test = compute_features(model, BetonSubset(folder / "test.beton"), recipe.views)
    knn = knn_predictions(bank.h, bank.label, test.h, ks=[20], temperatures=[0.07])[20, 0.07].numpy()
    scaler = StandardScaler().fit(bank.h)
    linear = LogisticRegression(C=0.1, max_iter=200).fit(scaler.transform(bank.h), bank.label)
    np.savez(
        result_path(options.out, job),
        knn=knn == test.label,
        linear=linear.predict(scaler.transform(test.h)) == test.label,
    )


def print_accuracy(out: Path, job: Job) -> None:
    correct = np.load(result_path(out, job))
    print(job.name, *(f"{protocol} {100 * correct[protocol].mean():.2f} %" for protocol in PROTOCOLS), flush=True)


def print_table(out: Path, seeds: list[int]) -> None:
    print("\n| objective | protocol | stored as | accuracy by seed, % | mean | difference from pixels, 95 % interval |")
    print("|---|---|---|---|---|---|")
    for objective, protocol in itertools.product(OBJECTIVES, PROTOCOLS):
        correct = {
            codec: np.stack([np.load(result_path(out, Job(objective, codec, seed)))[protocol] for seed in seeds])
            for codec in CODECS
        }
        for codec, correct_SN in correct.items():
            each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in correct_SN.mean(axis=1))
            difference = "" if codec == "pixels" else describe_difference(correct_SN, correct["pixels"])
            print(f"| {objective} | {protocol} | {codec} | {each} | {100 * correct_SN.mean():.2f} | {difference} |")


def describe_difference(correct_SN: np.ndarray, baseline_SN: np.ndarray) -> str:
    """The difference of two accuracies in percent, with its interval: seeds and images are drawn with replacement."""
    rng = np.random.default_rng(0)
    difference_SN = 100 * (correct_SN.astype(np.float64) - baseline_SN)
    seeds, images = difference_SN.shape
    means = []
    for _ in range(RESAMPLES):
        of_seeds_N = difference_SN[rng.integers(seeds, size=seeds)].mean(axis=0)
        means.append(of_seeds_N[rng.integers(images, size=images)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{difference_SN.mean():+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
