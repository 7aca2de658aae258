"""Draw the learning rate of a run that a resume extends, for docs/training.md. Nothing is trained.

python benchmarks/extended_rates.py docs/figures/extended_rates.png
"""

import sys
from pathlib import Path

import matplotlib

from fastssl.recipe import load_recipe
from fastssl.training.schedule import Schedule, plan

STEPS = 10  # per epoch, enough for a smooth curve
BEFORE, AFTER = 100, 200  # epochs


def schedule_of(epochs: int, decay_epochs: int) -> Schedule:
    schedule, _ = plan(load_recipe("recipes/zprob_barlow.yaml", [f"train.epochs={epochs}"]), STEPS, decay_epochs)
    return schedule


def draw(path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, stretched = schedule_of(BEFORE, BEFORE), schedule_of(AFTER, AFTER)
    constant = schedule_of(AFTER, BEFORE)
    before, after = range(BEFORE * STEPS), range(BEFORE * STEPS, AFTER * STEPS)
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    curves = (
        (f"the run of {BEFORE} epochs", first, before, "-", "black"),
        ("optim.extend=stretch (default)", stretched, after, "-", "tab:blue"),
        ("optim.extend=constant", constant, after, "-", "tab:orange"),
        (f"a run of {AFTER} epochs from the start", stretched, before, ":", "tab:blue"),
    )
    for label, schedule, steps, style, color in curves:
        axes.plot(
            [step / STEPS for step in steps], [schedule.rate(step) for step in steps], style, color=color, label=label
        )
    axes.set(xlabel="epoch", ylabel="learning rate", xlim=(0, AFTER), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
