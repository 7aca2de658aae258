"""The figures of an OOD evaluation: histograms of all scores, ROC curves, and a table of all AUROC values."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import roc_curve

from fastssl.common.figures import plain_label, save_figure
from fastssl.evaluation.ood.separation import DetectorResult
from fastssl.evaluation.ood.suites import OODSets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 5
BINS = 40


def draw_ood_plots(
    folder: Path,
    name: str,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    detectors: Mapping[str, DetectorResult],
    sets: OODSets,
) -> None:
    """Write FOLDER/NAME.histograms.png, NAME.roc.png and NAME.auroc.png.

    scores: detector -> set -> scores, with the set "id" of in-distribution images.
    """
    # Imported here because it takes half a second. Unlike pyplot, Figure needs no display.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = {other: colormaps["tab10"](i % 10) for i, other in enumerate(sets.ood)}
    columns = min(COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    score_label = "score, higher = OOD (from the 1st to the 99th percentile of all sets)"
    fpr_label = "false positive rate: share of ID images predicted as OOD"
    tpr_label = "true positive rate: share of OOD images predicted as OOD"
    for kind, draw_panel, width, height, x_label, y_label in (
        ("histograms", _draw_histograms, 3.1, 2.1, score_label, "density"),
        ("roc", _draw_roc, 2.6, 2.6, fpr_label, tpr_label),
    ):
        figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=110, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, (detector, score) in zip(panels, scores.items()):
            panel.set_title(detector, fontsize=9)
            panel.tick_params(labelsize=6)
            draw_panel(panel, score, colors)
        for panel in panels[len(scores) :]:
            panel.set_axis_off()
        handles = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=9)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        save_figure(folder / f"{name}.{kind}.png", figure)
    _draw_auroc(folder / f"{name}.auroc.png", detectors, sets)


def _draw_histograms(panel: "Axes", score: Mapping[str, np.ndarray], colors: Mapping[str, Any]) -> None:
    low, high = np.percentile(np.concatenate(list(score.values())), (1, 99))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    panel.hist(np.clip(score["id"], edges[0], edges[-1]), edges, density=True, color="lightgrey", label="ID")
    for other, color in colors.items():
        values = np.clip(score[other], edges[0], edges[-1])
        panel.hist(values, edges, density=True, histtype="step", color=color, label=plain_label(other))
    panel.set_yticks([])


def _draw_roc(panel: "Axes", score: Mapping[str, np.ndarray], colors: Mapping[str, Any]) -> None:
    panel.plot([0, 1], [0, 1], color="lightgrey", linewidth=0.8)
    for other, color in colors.items():
        is_ood = np.repeat([0, 1], [len(score["id"]), len(score[other])])
        fpr, tpr, _ = roc_curve(is_ood, np.r_[score["id"], score[other]])
        panel.plot(fpr, tpr, color=color, linewidth=1.1, label=plain_label(other))
    panel.set_aspect("equal")


def _draw_auroc(path: Path, detectors: Mapping[str, DetectorResult], sets: OODSets) -> None:
    """Draw a row per detector and a column per set, AUROC in percent: red below 50, blue above."""
    from matplotlib.figure import Figure

    auroc = np.array([[row["sets"][other]["metrics"]["auroc"] for other in sets.ood] for row in detectors.values()])
    figure = Figure(figsize=(3 + 0.9 * len(sets.ood), 1.4 + 0.26 * len(detectors)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(auroc, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(auroc):
        color = "white" if abs(value - 0.5) > 0.35 else "black"
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=color)
    headings = [f"{plain_label(other)}\n({'near' if other in sets.near else 'far'})" for other in sets.ood]
    axes.set_xticks(range(len(headings)), headings, fontsize=8)
    labels = [name + (" *" if detector["labels"] else "") for name, detector in detectors.items()]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("AUROC in %; below 50 the score is inverted. * uses labels", fontsize=8)
    save_figure(path, figure)
