"""The figures of `fastssl eval uncertainty`: two plots, and the images with the least and the greatest uncertainty."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.beton import draw_samples, read_header
from fastssl.common.figures import (
    BLUE,
    GRAY,
    GREEN,
    SMALL,
    TEXT,
    VERMILLION,
    WIDTH,
    add_legend,
    new_figure,
    save_figure,
)
from fastssl.common.files import explain_write_errors
from fastssl.evaluation.metric_info import metric_info
from fastssl.evaluation.runs import BetonSubset
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS
from fastssl.loading.samples import Samples

TITLES = {"blur": "Gaussian blur", "noise": "Gaussian noise", "jpeg": "JPEG compression", "crop": "Crop"}
UNITS = {
    "blur": "standard deviation, % of the side",
    "noise": "standard deviation, % of white",
    "jpeg": "quality",
    "crop": "% of the area",
}


def draw_risk_coverage(
    path: Path, run: str, curves: Mapping[str, list[float]], metrics: Mapping[str, float], score: str
) -> None:
    """Draw the error rate among the least uncertain images against the share of images that these are."""
    figure, body = new_figure(
        7,
        4.4,
        f"{run}: risk-coverage curve, lower is better",
        f"Uncertainty: {score}. "
        "Only the least uncertain images are predicted (coverage: how many, from left to right); risk is the "
        "error among them. AURC: the area under a curve. A score that says nothing stays near the dotted line; "
        "the best possible one ranks every wrong prediction last (dashed line).",
    )
    axes = body.subplots()
    coverage = 100 * np.array(curves["coverage"])
    show = metric_info("aurc").format
    error = 1 - metrics["accuracy"]
    least = metrics["aurc"] - metrics["e_aurc"]
    axes.axhline(100 * error, color=GRAY, ls=":", label=f"random order: AURC {show(error)}")
    for key, label, color, style in (
        ("uncertainty", f"uncertainty: AURC {show(metrics['aurc'])}", BLUE, "-"),
        ("confidence", f"classifier's confidence: AURC {show(metrics['aurc_confidence'])}", VERMILLION, "-."),
        ("oracle", f"best possible order: AURC {show(least)}", GREEN, "--"),
    ):
        axes.plot(coverage, 100 * np.array(curves[key]), label=label, color=color, ls=style, lw=2)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage: % of test images, least uncertain first", fontsize=TEXT)
    axes.set_ylabel("risk: % of wrong predictions among them", fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3)
    add_legend(body, [axes])
    save_figure(path, figure)


def draw_corruptions(path: Path, run: str, result: Mapping[str, Any], score: str) -> None:
    """Draw the mean uncertainty at each strength of each corruption, with its 95 % interval.

    result: has the fields "corruptions", "corrupted_images", "metrics" and "intervals" of the evaluation.
    """
    figure, body = new_figure(
        WIDTH,
        3.4,
        f"{run}: uncertainty of corrupted images, better if it rises with the corruption",
        f"Mean uncertainty of {result['corrupted_images']:,} test images, with 95 % intervals; corruptions get "
        "stronger from left to right. Dotted line: without corruption. The vertical axis does not start at 0. "
        "Spearman: the rank correlation of uncertainty with strength, with its 95 % interval; 1 is best, 0 means "
        "no relation.",
    )
    panels = body.subplots(1, len(CORRUPTIONS), sharey=True)
    for axes, (name, strengths) in zip(panels, CORRUPTIONS.items()):
        curve = result["corruptions"][name]
        mean_S = np.array(curve["mean"])
        low_S, high_S = np.array(curve["intervals"]).T
        position_S = range(len(mean_S))
        axes.axhline(mean_S[0], color=GRAY, ls=":")
        axes.fill_between(position_S, low_S, high_S, color=BLUE, alpha=0.25, lw=0)
        axes.plot(position_S, mean_S, color=BLUE, marker="o", ms=4)
        scale = 1 if name == "jpeg" else 100
        axes.set_xticks(position_S, ["none", *(f"{scale * strength:g}" for strength in strengths)])
        # Shown in words because the vertical axis does not start at 0.
        change = mean_S[-1] / mean_S[0] - 1 if mean_S[0] > 0 else 0
        axes.set_xlabel(f"{UNITS[name]}\nat the strongest: {100 * change:+.2g} %", fontsize=TEXT)
        low, high = result["intervals"][f"spearman_{name}"]
        spearman = f"Spearman {result['metrics'][f'spearman_{name}']:+.2f}\n({low:+.2f} to {high:+.2f})"
        axes.set_title(f"{TITLES[name]}\n{spearman}", fontsize=TEXT)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(score.replace(" to ", "\nto "), fontsize=TEXT)
    save_figure(path, figure)


def draw_extremes(
    path: Path, run: str, data: BetonSubset, index_M: np.ndarray, uncertainty_M: np.ndarray, count: int, score: str
) -> None:
    """Draw the `count` least and most uncertain images, each with its class, uncertainty and index.

    index_M: ids of the images that the uncertainties belong to. Of images with equal uncertainty, the first are drawn.
    """
    order_M = np.argsort(uncertainty_M, kind="stable")
    samples = Samples.read(read_header(data.path))
    index_N = samples.column("index", np.arange(len(samples)))
    by_index_N = np.argsort(index_N, kind="stable")
    position_M = by_index_N[np.searchsorted(index_N[by_index_N], index_M)]
    count = min(count, len(order_M) // 2)
    least, most = order_M[:count], order_M[::-1][:count]
    symbol = "σ" if "sigma" in score else "d"
    groups = [
        (f"{run}: the {count} least uncertain of {len(order_M):,} test images, by {score}", position_M[least].tolist()),
        (f"the {count} most uncertain, the most uncertain first", position_M[most].tolist()),
    ]
    notes = {
        position_M[m]: f"{symbol} {uncertainty_M[m]:#.5g}, index {index_M[m]}" for m in np.concatenate([least, most])
    }
    with explain_write_errors(path):
        draw_samples(data.path, path, groups, notes)
