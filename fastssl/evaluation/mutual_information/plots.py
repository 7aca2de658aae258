"""The learning curves of `fastssl eval mi`."""

from collections.abc import Mapping
from pathlib import Path

from fastssl.common.figures import (
    GRAY,
    MARKERS,
    SMALL,
    TEXT,
    WIDTH,
    add_legend,
    line_style,
    new_figure,
    save_figure,
)
from fastssl.evaluation.mutual_information.estimators import PairEstimates


def draw_learning_curves(path: Path, estimates: Mapping[str, PairEstimates]) -> None:
    """Draw one panel per quantity: the estimates on the validation samples against the step, and those reported."""
    figure, body = new_figure(
        WIDTH,
        3.4,
        "Mutual information while the critics learn",
        "Lines: the estimate on validation samples after each training step of the critic; where a line falls, it "
        "overfits. Points: the reported estimates, on test samples, by the critic of the highest validation "
        "estimate. js, mine: two estimators, both lower bounds. An open point is saturated: the true value may be much "
        "larger. Ceiling: the largest estimate that so many images allow (drawn where a panel reaches it). Shuffled "
        "pairs are independent, so their estimate should be 0. Panels end at -0.5 nats.",
    )
    panels = body.subplots(1, len(estimates), squeeze=False)[0]
    for axes, (quantity, each) in zip(panels, estimates.items(), strict=True):
        curves = {"js": each.js, "mine": each.mine, "js on shuffled pairs": each.shuffled}
        for number, (label, estimate) in enumerate(curves.items()):
            style = line_style(number)
            steps, nats = zip(*estimate.curve, strict=True)
            axes.plot(steps, nats, label=label, **style)
            face = "none" if estimate.saturated else style["color"]
            point = {"marker": MARKERS[number], "edgecolors": style["color"], "facecolors": face}
            axes.scatter([steps[-1]], [estimate.nats], zorder=3, **point)
        ceiling = each.js.ceiling
        # The curve of an overfitted critic may leave the panel.
        top = min(1.5 * max(estimate.nats for estimate in each) + 1, ceiling + 1)
        axes.set_ylim(-0.5, top)
        if ceiling < top:
            axes.axhline(ceiling, color=GRAY, linestyle="--", linewidth=1, label="ceiling")
        axes.set_title(quantity, fontsize=TEXT)
        axes.set_xlabel("training step of the critic", fontsize=TEXT)
        axes.tick_params(labelsize=SMALL)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("nats", fontsize=TEXT)
    add_legend(body, panels)
    save_figure(path, figure)
