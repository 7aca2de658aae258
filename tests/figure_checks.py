"""Checks that every figure must pass, whatever it shows."""

from contextlib import contextmanager
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

TOUCH = 1.5  # px by which two texts may overlap, as their boxes are larger than their letters


@contextmanager
def saved_figures():
    """Yields a list of the figures that are saved, in their order."""
    figures = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield figures


def check_figure(figure: Figure, smallest: float = 8.0) -> None:
    """Check that the texts of a drawn figure are large enough, inside of it, and do not overlap."""
    assert figure.get_figwidth() <= 10, "drawn wider than it is seen"
    texts = shown_texts(figure)
    assert texts
    canvas = figure.bbox
    boxes = []
    for text in texts:
        content = text.get_text()
        assert text.get_size() >= smallest, f"{content!r} has {text.get_size()} pt"
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1
        assert inside, f"{content!r} is cut: {box} of {canvas}"
        boxes.append((content, box))
    for (one, a), (other, b) in combinations(boxes, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width < TOUCH or height < TOUCH, f"{one!r} and {other!r} overlap by {width:.0f} x {height:.0f} px"
    for legend in figure.findobj(Legend):
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels and len(set(labels)) == len(labels), f"a legend repeats a label: {labels}"


def shown_texts(figure: Figure) -> list[Text]:
    """The texts that are drawn: not the ticks outside of a panel's limits, nor the labels of a hidden axis."""
    shown = []
    draw = Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip("\u200b "):
            shown.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.draw_without_rendering()
    return shown
