"""The style of every figure."""

import numpy as np
import pytest
from figure_checks import check_figure, shown_texts
from matplotlib.figure import Figure

from fastssl.common.figures import (
    GRAY,
    WIDTH,
    add_legend,
    contrast,
    label_cells,
    line_style,
    new_figure,
    save_figure,
    shortened,
    text_color,
    text_width,
    wrapped,
)


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast((1, 1, 1), (1, 1, 1)) == 1
    # The gray that WCAG's documents name as the lightest for text on white.
    assert contrast((1, 1, 1), [0x76 / 255] * 3) == pytest.approx(4.54, abs=0.01)
    from matplotlib.colors import to_rgb

    assert contrast((1, 1, 1), to_rgb(GRAY)) >= 4.5


@pytest.mark.parametrize("name", ["Blues", "RdBu", "viridis", "gray"])
def test_text_on_every_cell_has_the_contrast_that_wcag_asks_for(name):
    axes = Figure().subplots()
    image = axes.imshow(np.linspace(0, 1, 300)[None], cmap=name, vmin=0, vmax=1)
    label_cells(axes, image, [["x"] * 300])
    assert len(axes.texts) == 300
    for value, text in zip(np.linspace(0, 1, 300), axes.texts):
        color = (float(text.get_color() == "white"),) * 3
        assert contrast(color, image.cmap(value)) >= 4.5


def test_text_is_black_or_white_on_every_color():
    for color in np.random.default_rng(0).random((200, 3)):
        assert contrast((float(text_color(color) == "white"),) * 3, color) >= 4.5


def test_series_differ_in_their_pair_of_color_and_line_style():
    styles = [tuple(line_style(number).values()) for number in range(28)]
    assert len(set(styles)) == 28
    # Neighbors, of which there are often only two, differ in both.
    for one, other in zip(styles, styles[1:]):
        assert one[0] != other[0] and one[1] != other[1]


def test_long_texts_are_wrapped_or_cut_to_the_width():
    text = "one sentence of many words " * 10 + "w" * 300
    lines = wrapped(text, 4, 9).split("\n")
    assert len(lines) > 3 and all(text_width(line, 9) <= 4 for line in lines)
    assert " ".join(lines[:-1]).split() == text.split()[:-1]
    for name in ("imagenet-" * 9 + "v2", "x" * 100_000):
        cut = shortened(name, 2, 9)
        assert text_width(cut, 9) <= 2 and "…" in cut and cut[:4] == name[:4] and cut[-2:] == name[-2:]
    assert shortened("cifar100", 2, 9) == "cifar100"


@pytest.mark.parametrize("name", ["short", "a data set of a long name with $\\frac$ " * 2])
@pytest.mark.parametrize("series", [1, 12])
def test_title_legend_and_caption_keep_apart(tmp_path, name, series):
    figure, body = new_figure(WIDTH, 3, f"A title about {name}: lower is better", f"How to read {name}. " * 12)
    panels = body.subplots(1, 3)
    for panel in panels:
        for number in range(series):
            panel.plot([0, 1], [0, number], label=f"{name}{number}".replace("$", r"\$"), **line_style(number))
        panel.set_title("panel", fontsize=9)
    add_legend(body, panels)
    save_figure(tmp_path / "x.png", figure)
    check_figure(figure)
    labels = [text.get_text() for text in body.legends[0].get_texts()]
    assert len(labels) == series
    assert any("A title" in text.get_text() for text in shown_texts(figure))
