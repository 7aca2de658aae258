"""Do the objectives behave as the theory predicts? Short runs on CIFAR-10 and a plot of their curves.

    python benchmarks/objective_curves.py run data/cifar10 runs/curves --steps 300
    python benchmarks/objective_curves.py draw runs/curves curves.png

Each variant trains for `steps` steps of batch 128 with the ImageNet stem at 32 px (for CPUs), its other keys as in
recipes/cifar10. The plot shows the loss, sigma, KL per dimension and RankMe of h and z of every run.
"""

import argparse
import json
from pathlib import Path

import torch

from fastssl import load_recipe
from fastssl.recipe import Recipe
from fastssl.training import train

REFERENCE = ["train.precision=fp32", "seed=0", "probe.split=val"]  # as in the other variants, for comparison
SIMCLR = ["objective={name: simclr, temperature: 0.5}"]
VARIANTS = {  # recipe and overrides
    "barlow": ("cifar10/barlow", []),
    "zprob_barlow": ("cifar10/zprob_barlow", []),
    "hprob_barlow": ("cifar10/hprob_barlow", []),
    "vicreg": ("cifar10/vicreg", []),
    "zprob_vicreg": ("cifar10/zprob_vicreg", []),
    "hprob_vicreg": ("cifar10/hprob_vicreg", []),
    "hzprob_barlow": ("cifar10/hprob_barlow", ["embedding.stochastic=hz"]),
    "zprob_barlow_mixture": ("cifar10/zprob_barlow", ["embedding.prior=mixture"]),
    "simclr": ("cifar10/barlow", SIMCLR),
    "byol": ("cifar10/barlow", ["objective={name: byol, momentum: 0.99, predictor_hidden: 1024}"]),
    "sigreg": ("cifar10/sigreg", []),
    "hprob_sigreg": ("cifar10/hprob_sigreg", []),
    "visreg": ("cifar10/visreg", []),
    "zprob_visreg": ("cifar10/zprob_visreg", []),
    "reference_zprob_barlow": ("reference/cifar10_zprob_barlow", REFERENCE),
    "reference_zprob_vicreg": ("reference/cifar10_zprob_vicreg", REFERENCE),
}
TERMS = [
    "on_diagonal", "off_diagonal", "invariance", "variance", "covariance", "nt_xent", "prediction", "sigreg",
    "scale", "shape", "center", "beta_kl",
]  # fmt: skip
BATCH = 128


def recipe_of(name: str, data: Path, out: Path, steps: int) -> Recipe:
    base, overrides = VARIANTS[name]
    return load_recipe(
        f"recipes/{base}.yaml",
        [f"data.train={data}/train.beton", f"data.val={data}/val.beton", f"data.limit={steps * BATCH}",
         "train.epochs=1", f"run.dir={out}/{name}", "model.stem=imagenet", f"train.batch_size={BATCH}", "log.every=10",
         "log.rank_every=10",
         "data.workers=1", "probe.every=0", *overrides],
    )  # fmt: skip


def run(data: Path, out: Path, steps: int, names: list[str]) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} torch threads", flush=True)
    for name in names:
        train(recipe_of(name, data, out, steps))


def draw(out: Path, plot_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in VARIANTS if (out / name / "metrics.jsonl").exists()]
    figure, axes = plt.subplots(len(names), 4, figsize=(18, 2.6 * len(names)), squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        plot(row[0], lines, ["loss", *TERMS], f"{name}: loss and its terms")
        row[0].set_yscale("log")
        plot(row[1], lines, [f"sigma{what}_{space}" for space in "hz" for what in ("", "_min", "_max")], "sigma")
        row[1].set_yscale("log")
        plot(row[2], lines, [f"kl_per_dim_{space}" for space in "hz"], "KL, nats per dimension")
        plot(row[3], lines, ["rankme_h", "rankme_z"], f"RankMe (batch of {BATCH})")
        row[0].set_ylabel(name, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(plot_path, dpi=70)


def plot(axis, lines: list[dict], keys: list[str], title: str) -> None:
    """Plot those of the keys that the run has logged over its steps."""
    for key in keys:
        if key in lines[0]:
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=key)
    axis.set_title(title, fontsize=9)
    if axis.lines:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "deterministic", ha="center", transform=axis.transAxes, color="grey")
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path, help="folder of train.beton and val.beton")
    running.add_argument("out", type=Path, help="folder for the run directories")
    running.add_argument("--steps", type=int, default=300)
    running.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    drawing = commands.add_parser("draw")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("plot", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.data, options.out, options.steps, options.variants)
    else:
        draw(options.out, options.plot)


if __name__ == "__main__":
    main()
