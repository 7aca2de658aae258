"""The plot of a confusion matrix."""

from pathlib import Path

import numpy as np

from fastssl.common.figures import (
    SMALL,
    TEXT,
    WIDTH,
    label_cells,
    new_figure,
    plain_label,
    save_figure,
    shortened,
    text_width,
)
from fastssl.evaluation.metrics import ClassificationResult

MAX_CLASSES_WITH_NUMBERS = 20  # more do not fit into the cells
MAX_CLASSES_WITH_NAMES = 50
MAX_CELLS = 100  # per side: smaller ones cannot be seen
CELL = 0.38  # inches, of a cell with a number
LONGEST_NAME = 1.6  # inches of a class name


def draw_confusion(path: Path, result: ClassificationResult, class_names: list[str] | None) -> None:
    """Draw the confusion matrix: a row per true class, a column per guess, cells in percent of the row.

    Up to 20 classes have their numbers in the cells, and up to 50 their names at the axes. Of more than 100, a cell
    sums up neighboring labels, which in ImageNet are related classes.

    class_names: by label; None: the labels are shown.
    """
    size = -(-len(result.label_K) // MAX_CELLS)  # labels per cell
    first = np.arange(0, len(result.label_K), size)
    count_KK = np.add.reduceat(np.add.reduceat(result.confusion_KK, first, axis=0), first, axis=1)
    percent_KK = 100 * count_KK / np.maximum(count_KK.sum(axis=1, keepdims=True), 1)
    names = [
        plain_label(shortened(class_names[label], LONGEST_NAME, SMALL))
        if class_names and 0 <= label < len(class_names)
        else str(label)
        for label in result.label_K
    ]
    classes = len(names)
    named = classes <= MAX_CLASSES_WITH_NAMES
    numbered = classes <= MAX_CLASSES_WITH_NUMBERS
    longest = max(text_width(name, SMALL) for name in names) if named else 0.4
    side = max(3.0, CELL * classes) if numbered else WIDTH - 1 - longest  # inches of the matrix
    upright = named and longest > side / classes - 0.05
    note = "Shares below 0.5 have no number." if numbered else ""
    if size > 1:
        note = f"A cell sums up {size} neighboring labels."
    figure, body = new_figure(
        max(5.5, min(WIDTH, side + longest + 1)),
        side + (longest if upright else 0.2) + 0.6,
        f"Confusion matrix, accuracy {100 * result.metrics['accuracy']:.1f} %: the darker the diagonal, the better",
        f"Row: the true class. Column: the predicted class. Color: % of the row's images. {note} A dark cell off the "
        "diagonal is a frequent confusion.",
    )
    axes = body.subplots()
    image = axes.imshow(percent_KK, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    if numbered:
        label_cells(axes, image, [[f"{value:.0f}" if value >= 0.5 else "" for value in row] for row in percent_KK])
    else:
        bar = body.colorbar(image, ax=axes, shrink=0.5, aspect=30)
        bar.set_label("% of the true class", fontsize=TEXT)
        bar.ax.tick_params(labelsize=SMALL)
    if named:
        axes.set_xticks(range(classes), names, rotation=90 if upright else 0)
        axes.set_yticks(range(classes), names)
        axes.tick_params(length=0)
    else:
        ticks = range(0, len(first), 10)
        labels = [str(result.label_K[first[tick]]) for tick in ticks]
        axes.set_xticks(ticks, labels)
        axes.set_yticks(ticks, labels)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("predicted class" if named else "label of the predicted class", fontsize=TEXT)
    axes.set_ylabel("true class" if named else "label of the true class", fontsize=TEXT)
    save_figure(path, figure)
