"""Pictures of an OOD evaluation: how the scores of all sets lie, the ROC curves, and every AUROC at a glance."""

from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from fastssl.evaluation.ood.suites import Sets
from fastssl.evaluation.plots import save_figure

COLUMNS = 5
BINS = 40


def draw(folder: Path, name: str, scores: dict[str, dict[str, np.ndarray]], compared: dict, sets: Sets) -> None:
    """FOLDER/NAME.histograms.png, NAME.roc.png and NAME.auroc.png."""
    colours = dict(zip(sets.others, _colours(len(sets.others))))
    names = {other: _plain(other) for other in sets.others}
    for kind, draw_one, size in (("histograms", _histogram, (3.1, 2.1)), ("roc", _roc, (2.6, 2.6))):
        figure, panels = _grid(len(scores), size)
        for panel, (detector, of) in zip(panels, scores.items()):
            panel.set_title(detector, fontsize=9)
            draw_one(panel, of, colours, names)
            panel.tick_params(labelsize=6)
        for panel in panels[len(scores) :]:
            panel.set_axis_off()
        handles = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=9)
        if kind == "roc":
            figure.supxlabel("share of ID images called OOD", fontsize=9)
            figure.supylabel("share of OOD images found", fontsize=9)
        else:
            figure.supxlabel("score, higher = OOD (1st to 99th percentile of all)", fontsize=9)
            figure.supylabel("density", fontsize=9)
        save_figure(folder / f"{name}.{kind}.png", figure)
    save_figure(folder / f"{name}.auroc.png", _overview(compared["detectors"], sets))


def _grid(panels: int, size: tuple[float, float]):
    from matplotlib.figure import Figure  # here, as it takes half a second; without pyplot, no display is looked for

    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.5), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _histogram(panel, of: dict[str, np.ndarray], colours: dict, names: dict) -> None:
    low, high = np.percentile(np.concatenate(list(of.values())), (1, 99))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    panel.hist(np.clip(of["id"], edges[0], edges[-1]), edges, density=True, color="lightgrey", label="ID")
    for other, colour in colours.items():
        values = np.clip(of[other], edges[0], edges[-1])
        panel.hist(values, edges, density=True, histtype="step", color=colour, label=names[other])
    panel.set_yticks([])


def _roc(panel, of: dict[str, np.ndarray], colours: dict, names: dict) -> None:
    panel.plot([0, 1], [0, 1], color="lightgrey", linewidth=0.8)
    for other, colour in colours.items():
        truth = np.repeat([0, 1], [len(of["id"]), len(of[other])])
        fpr, tpr, _ = roc_curve(truth, np.r_[of["id"], of[other]])
        panel.plot(fpr, tpr, color=colour, linewidth=1.1, label=names[other])
    panel.set_aspect("equal")


def _overview(detectors: dict[str, dict], sets: Sets):
    """Detectors by sets, AUROC in percent: red below one half, blue above."""
    from matplotlib.figure import Figure

    others = list(sets.others)
    share = np.array([[row["sets"][other]["metrics"]["auroc"] for other in others] for row in detectors.values()])
    figure = Figure(figsize=(3 + 0.9 * len(others), 1.4 + 0.26 * len(detectors)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if abs(value - 0.5) > 0.35 else "black"
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    kinds = ["near"] * len(sets.near) + ["far"] * len(sets.far)
    heads = [f"{_plain(other)}\n({kind})" for other, kind in zip(others, kinds)]
    axes.set_xticks(range(len(others)), heads, fontsize=8)
    labels = [name + (" *" if row["labels"] else "") for name, row in detectors.items()]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("AUROC in %, the declared direction; below 50: inverted. * uses labels", fontsize=8)
    return figure


def _plain(name: str) -> str:
    """A name as it is: not as a formula, and not left out of legends, as matplotlib does with "_name"."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _colours(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["tab10"](place % 10) for place in range(count)]
