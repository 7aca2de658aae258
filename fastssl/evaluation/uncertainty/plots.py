"""What a person should look at beside the figures: two plots, and the images themselves."""

from pathlib import Path

import numpy as np

from fastssl.beton import draw_samples, read_header
from fastssl.common.files import explain_write_errors
from fastssl.evaluation.plots import save_figure
from fastssl.evaluation.runs import BetonSubset
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS
from fastssl.loading.samples import Samples

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"
AXES = {
    "blur": ("Gaussian blur", "standard deviation, % of the side"),
    "noise": ("Gaussian noise", "standard deviation, % of white"),
    "jpeg": ("JPEG", "quality"),
    "crop": ("crop", "% of the area"),
}


def draw_risk_coverage(path: Path, run: str, curves: dict, figures: dict[str, float], score: str) -> None:
    """The share of wrong guesses among the most certain images, against the share of images that these are."""
    from matplotlib.figure import Figure  # here, as it takes half a second

    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    coverage = 100 * np.array(curves["coverage"])
    error = 1 - figures["accuracy"]
    least = figures["aurc"] - figures["e_aurc"]
    lines = [
        ("uncertainty", f"{score}: AURC {figures['aurc']:.3f}", {"color": BLUE, "lw": 2}),
        ("confidence", f"classifier's confidence: AURC {figures['aurc_confidence']:.3f}", {"color": ORANGE, "lw": 2}),
        ("oracle", f"best possible: AURC {least:.3f}", {"color": GREEN, "ls": "--"}),
    ]
    axes.axhline(100 * error, color=GREY, ls=":", label=f"random order: AURC {error:.3f}")
    for key, label, style in lines:
        axes.plot(coverage, 100 * np.array(curves[key]), label=label, **style)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage: % of the test images, the most certain first")
    axes.set_ylabel("risk: % of their guesses that are wrong")
    axes.set_title(f"{run}: does the uncertainty know which guesses are wrong?", parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    save_figure(path, figure)


def draw_corruptions(
    path: Path, run: str, corruptions: dict, figures: dict[str, float], intervals: dict, score: str
) -> None:
    """Mean uncertainty of images that are made worse and worse, with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(CORRUPTIONS), sharey=True)
    for axes, (name, strengths) in zip(panels, CORRUPTIONS.items()):
        title, unit = AXES[name]
        curve, scale = corruptions[name], 1 if name == "jpeg" else 100
        place, (low, high) = range(len(curve["mean"])), np.array(curve["intervals"]).T
        axes.axhline(curve["mean"][0], color=GREY, ls=":")
        axes.fill_between(place, low, high, color=BLUE, alpha=0.25, lw=0)
        axes.plot(place, curve["mean"], color=BLUE, marker="o", ms=4)
        axes.set_xticks(place, ["clean", *(f"{scale * s:g}" for s in strengths)])
        change = curve["mean"][-1] / curve["mean"][0] - 1 if curve["mean"][0] > 0 else 0  # the axis does not begin at 0
        axes.set_xlabel(f"{unit}\nstrongest: {100 * change:+.2g} %")
        key = f"spearman_{name}"
        low, high = intervals[key]
        axes.set_title(f"{title}\nSpearman {figures[key]:+.2f} ({low:+.2f} to {high:+.2f})", fontsize=11)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("\n".join(score.split(" to ")), fontsize=9)
    title = f"{run}: {corruptions['images']:,} test images made worse, mean uncertainty and its 95 % interval"
    figure.suptitle(title, parse_math=False)
    save_figure(path, figure)


def draw_extremes(
    path: Path, run: str, data: BetonSubset, index_M: np.ndarray, uncertainty_M: np.ndarray, count: int, score: str
) -> None:
    """The most and the least certain images, each with its class, uncertainty and index; of equal ones the first."""
    order_M = np.argsort(uncertainty_M, kind="stable")
    index_N = Samples.read(read_header(data.path)).index_N
    by_index_N = np.argsort(index_N, kind="stable")
    position_M = by_index_N[np.searchsorted(index_N[by_index_N], index_M)]
    count = min(count, len(order_M) // 2)
    most, least = order_M[:count], order_M[::-1][:count]
    sign = "σ" if "sigma" in score else "d"
    title = f"{run}: the {count} most certain of {len(order_M):,} test images by {score}, the most certain first"
    groups = [(title, position_M[most]), (f"the {count} least certain, the least certain first", position_M[least])]
    shown = np.concatenate([most, least])
    notes = {position_M[m]: f"{sign} {uncertainty_M[m]:#.5g}, index {index_M[m]}" for m in shown}
    with explain_write_errors(path):
        draw_samples(data.path, path, groups, notes, columns=10)
