"""The learning curves of `fastssl eval mi`."""

from pathlib import Path

from fastssl.evaluation.mutual_information.estimators import Estimate
from fastssl.evaluation.plots import save_figure

KINDS = {"js": "js", "mine": "mine", "independent": "js, partners exchanged"}


def draw_curves(path: Path, found: dict[str, dict[str, Estimate]]) -> None:
    """One panel a quantity: held-out nats against step, the reported estimates, and the ceiling."""
    from matplotlib.figure import Figure  # here, as it takes half a second; without pyplot, no display is looked for

    figure = Figure(figsize=(1 + 3.5 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (pair, estimates) in zip(panels, found.items(), strict=True):
        for number, (kind, label) in enumerate(KINDS.items()):
            each, color = estimates[kind], f"C{number}"
            axes.plot(*zip(*each.curve), color=color, label=label)
            face = "none" if each.saturated else color
            axes.scatter([each.curve[-1][0]], [each.nats], edgecolors=color, facecolors=face, zorder=3)
        axes.axhline(estimates["js"].ceiling, color="grey", linestyle="--", linewidth=1, label="ceiling (or above)")
        # A critic that overfits leaves the picture, below or above.
        top = max(each.nats for each in estimates.values())
        axes.set_ylim(-0.5, min(1.5 * top + 1, estimates["js"].ceiling + 1))
        axes.set_title(pair)
        axes.set_xlabel("step")
    panels[0].set_ylabel("nats, on the samples that stop the training")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Points: what is reported, of other samples; open: saturated", fontsize=9)
    save_figure(path, figure)
