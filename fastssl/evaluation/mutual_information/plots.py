"""The learning curves of `fastssl eval mi`."""

from collections.abc import Mapping
from pathlib import Path

from fastssl.common.figures import save_figure
from fastssl.evaluation.mutual_information.estimators import PairEstimates


def draw_learning_curves(path: Path, estimates: Mapping[str, PairEstimates]) -> None:
    """Draw one panel per quantity: the estimates on the validation samples against the step, and those reported."""
    # Imported here because it takes half a second. Unlike pyplot, Figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.5 * len(estimates), 4), layout="constrained")
    panels = figure.subplots(1, len(estimates), squeeze=False)[0]
    for axes, (quantity, each) in zip(panels, estimates.items(), strict=True):
        curves = {"js": each.js, "mine": each.mine, "js, shuffled pairs": each.shuffled}
        for i, (label, estimate) in enumerate(curves.items()):
            steps, nats = zip(*estimate.curve, strict=True)
            axes.plot(steps, nats, color=f"C{i}", label=label)
            face = "none" if estimate.saturated else f"C{i}"
            axes.scatter([steps[-1]], [estimate.nats], edgecolors=f"C{i}", facecolors=face, zorder=3)
        ceiling = each.js.ceiling
        axes.axhline(ceiling, color="grey", linestyle="--", linewidth=1, label="ceiling (may be above the panel)")
        # The curve of an overfitted critic may leave the panel.
        axes.set_ylim(-0.5, min(1.5 * max(estimate.nats for estimate in each) + 1, ceiling + 1))
        axes.set_title(quantity)
        axes.set_xlabel("training step")
    panels[0].set_ylabel("nats, on validation samples")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("points: reported estimates, on test samples (open: saturated)", fontsize=9)
    save_figure(path, figure)
