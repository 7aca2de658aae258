"""The plot of a confusion matrix."""

from pathlib import Path

import numpy as np

from fastssl.common.figures import plain_label, save_figure
from fastssl.evaluation.metrics import ClassificationResult


def draw_confusion(path: Path, result: ClassificationResult, class_names: list[str] | None) -> None:
    """Draw the confusion matrix: a row per true class, a column per guess, cells in percent of the row.

    class_names: by label; None: the labels are shown.
    """
    # Imported here as it takes half a second. Figure, unlike pyplot, never looks for a display.
    from matplotlib.figure import Figure

    count_K1 = result.confusion_KK.sum(axis=1, keepdims=True)
    percent_KK = 100 * result.confusion_KK / np.maximum(count_K1, 1)
    names = [
        plain_label(class_names[label] if class_names and 0 <= label < len(class_names) else str(label))
        for label in result.label_K
    ]
    side = 2.5 + 0.4 * len(names)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percent_KK, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent_KK):
        if value >= 0.5:
            color = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("guess")
    axes.set_ylabel("truth")
    axes.set_title(f"% of each class, accuracy {100 * result.metrics['accuracy']:.1f} %")
    save_figure(path, figure)
