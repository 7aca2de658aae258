"""The figures of an OOD evaluation: histograms of all scores, ROC curves, and a table of all AUROC values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import roc_curve

from fastssl.common.figures import (
    GRAY,
    LIGHT_GRAY,
    SMALL,
    TEXT,
    WIDTH,
    add_legend,
    label_cells,
    line_style,
    new_figure,
    plain_label,
    save_figure,
    shortened,
    text_width,
)
from fastssl.evaluation.ood.separation import DetectorResult
from fastssl.evaluation.ood.suites import OODSets

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

COLUMNS = 5
BINS = 40
TALLEST = 3  # bars of ID images are cut at this many times the highest bar of OOD images
TINT = "#FBEADD"  # of panels of inverted detectors
LONGEST_NAME = 2.5  # inches of a set's name
ABOUT_AUROC = (
    "AUROC, in %: how often an OOD image scores higher than an in-distribution (ID) one, mean over the near and far "
    "sets; 50 is chance. Inverted (tinted): on these sets AUROC is below 50 beyond its 95 % interval, so the score "
    "points the wrong way. Detectors marked * use labels of the training images."
)

Scores = Mapping[str, Mapping[str, np.ndarray]]  # detector -> set -> scores, with the set "id" of ID images


def draw_ood_plots(
    folder: Path, name: str, scores: Scores, detectors: Mapping[str, DetectorResult], sets: OODSets
) -> None:
    """Write FOLDER/NAME.histograms.png, NAME.roc.png and NAME.auroc.png."""
    _draw_histograms(folder / f"{name}.histograms.png", scores, detectors, sets)
    _draw_roc(folder / f"{name}.roc.png", scores, detectors, sets)
    _draw_auroc(folder / f"{name}.auroc.png", detectors, sets)


def _draw_histograms(path: Path, scores: Scores, detectors: Mapping[str, DetectorResult], sets: OODSets) -> None:
    figure, body = new_figure(
        WIDTH,
        1 + 1.75 * _rows(scores),
        "OOD scores by detector: the further an OOD set lies to the right of the gray ID images, the better",
        "Each panel: the scores of all images by one detector; higher means OOD. The horizontal axis goes from the 1st "
        "to the 99th percentile of all sets, and the two end bins hold all scores beyond. Bars of ID images are cut at "
        f"{TALLEST} times the highest bar of OOD images. {ABOUT_AUROC}",
    )
    panels = body.subplots(_rows(scores), min(COLUMNS, len(scores)), squeeze=False).flatten()
    for panel, score in zip(panels, scores.values()):
        low, high = np.percentile(np.concatenate(list(score.values())), (1, 99))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
        panel.hist(np.clip(score["id"], edges[0], edges[-1]), edges, density=True, color=LIGHT_GRAY, label="ID images")
        highest = 0.0  # bar of OOD images
        for number, (other, label) in enumerate(_labels(sets).items()):
            values = np.clip(score[other], edges[0], edges[-1])
            bars, _, _ = panel.hist(values, edges, density=True, histtype="step", label=label, **line_style(number))
            highest = max(highest, np.max(bars))
        panel.set_yticks([])
        # One bar of ID images that is much higher would leave nothing of the OOD sets to see.
        panel.set_ylim(0, min(panel.get_ylim()[1], TALLEST * highest))
        panel.locator_params(axis="x", nbins=3)
    _finish_panels(body, panels, [(name, detectors[name]) for name in scores])
    body.supxlabel("score, higher = OOD", fontsize=TEXT)
    body.supylabel("density of the images", fontsize=TEXT)
    save_figure(path, figure)


def _draw_roc(path: Path, scores: Scores, detectors: Mapping[str, DetectorResult], sets: OODSets) -> None:
    figure, body = new_figure(
        WIDTH,
        1 + 2.25 * _rows(scores),
        "ROC curves by detector: the closer a curve is to the upper left corner, the better",
        "Each point of a curve is a threshold on the score: images above it are predicted as OOD. On the diagonal "
        f"the score is no better than chance, below it points the wrong way. {ABOUT_AUROC}",
    )
    shape = _rows(scores), min(COLUMNS, len(scores))
    panels = body.subplots(*shape, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, score in zip(panels, scores.values()):
        panel.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8)
        for number, (other, label) in enumerate(_labels(sets).items()):
            is_ood = np.repeat([0, 1], [len(score["id"]), len(score[other])])
            fpr, tpr, _ = roc_curve(is_ood, np.r_[score["id"], score[other]])
            panel.plot(fpr, tpr, label=label, **line_style(number))
        panel.set_aspect("equal")
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    _finish_panels(body, panels, [(name, detectors[name]) for name in scores])
    body.supxlabel("false positive rate: share of ID images predicted as OOD", fontsize=TEXT)
    body.supylabel("true positive rate: share of OOD images predicted as OOD", fontsize=TEXT)
    save_figure(path, figure)


def _draw_auroc(path: Path, detectors: Mapping[str, DetectorResult], sets: OODSets) -> None:
    """Draw a row per detector and a column per set, AUROC in percent: red below 50, blue above."""
    auroc = np.array([[row["sets"][other]["metrics"]["auroc"] for other in sets.ood] for row in detectors.values()])
    labels = _labels(sets)
    headings = [label.replace(" (", "\n(") for label in labels.values()]
    width = min(WIDTH, max(5, 2.5 + len(labels)))
    longest = max(text_width(heading, SMALL) for heading in headings)
    upright = longest > (width - 2) / len(labels)
    figure, body = new_figure(
        width,
        0.7 + 0.26 * len(detectors) + (longest if upright else 0),
        "AUROC in %: higher is better, 50 is chance",
        "How often an image of this OOD set scores higher than an in-distribution one. ▼ marks inverted detectors: "
        "below 50 beyond the 95 % interval, so the score points the wrong way. * marks those that use labels.",
    )
    axes = body.subplots()
    image = axes.imshow(auroc, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    texts = [
        [("▼ " if row["sets"][other]["inverted"] else "") + f"{100 * value:.1f}" for other, value in zip(labels, line)]
        for row, line in zip(detectors.values(), auroc)
    ]
    label_cells(axes, image, texts)
    axes.set_xticks(range(len(labels)), headings, fontsize=SMALL, rotation=90 if upright else 0)
    names = [name + (" *" if row["labels"] else "") for name, row in detectors.items()]
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    save_figure(path, figure)


def _rows(scores: Scores) -> int:
    return -(-len(scores) // COLUMNS)


def _finish_panels(body: "SubFigure", panels: np.ndarray, detectors: Sequence[tuple[str, DetectorResult]]) -> None:
    """Title each panel by its detector and its AUROC, tint those that are inverted on any set, and add the legend."""
    for panel, (detector, row) in zip(panels, detectors):
        means = {group: row[group]["metrics"]["auroc"] for group in ("near", "far") if group in row}
        lines = [
            detector + (" *" if row["labels"] else ""),
            "AUROC " + ", ".join(f"{100 * auroc:.1f} {group}" for group, auroc in means.items()),
        ]
        inverted = sum(each["inverted"] for each in row["sets"].values())
        if inverted:
            lines.append(f"inverted on {inverted} of {len(row['sets'])} sets")
            panel.set_facecolor(TINT)
        panel.set_title("\n".join(lines), fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
    for panel in panels[len(detectors) :]:
        panel.set_axis_off()
    add_legend(body, panels[: len(detectors)])


def _labels(sets: OODSets) -> dict[str, str]:
    """What the sets are called in a figure, by their names."""
    return {
        other: f"{plain_label(shortened(other, LONGEST_NAME, SMALL))} ({'near' if other in sets.near else 'far'})"
        for other in sets.ood
    }
