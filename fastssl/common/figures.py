"""The style of every figure: colors, line styles, sizes of text, title and caption, and how a figure is saved.

A figure is seen about WIDTH inches wide: a page in a browser, or half a screen. It is drawn at that size, so a text of
8 pt here is one of 8 pt there. Its title says what is good, its caption how to read it. matplotlib takes half a second
to import, so it is imported where a figure is drawn. Figure, unlike pyplot, never looks for a display.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

WIDTH = 10.0  # inches; 960 px of a web page
DPI = 150
LONGEST = 400  # characters: no figure has room for a line of more
SMALL, TEXT, TITLE = 8.0, 9.0, 12.0  # pt: ticks and captions; labels and legends; the title
# The colors of Okabe and Ito, which color-blind readers can distinguish. Yellow cannot be seen as a line on white.
BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, BLACK, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442",
)  # fmt: skip
GRAY, LIGHT_GRAY = "#595959", "#CCCCCC"  # for text and lines of reference; for areas
# Seven colors and four line styles have no common factor: the first 28 series differ in their pair of both.
LINE_COLORS = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, BLACK)
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "*")


def line_style(number: int) -> dict[str, Any]:
    """Return the color and line style of the series of this number, for `plot(**...)`."""
    return {
        "color": LINE_COLORS[number % len(LINE_COLORS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
    }


def new_figure(width: float, height: float, title: str, caption: str = "") -> tuple["Figure", "SubFigure"]:
    """Return a figure, and its part between title and caption, where the panels go.

    Args:
        width: inches, at most WIDTH.
        height: inches of the part for the panels.
        title: one sentence, which says what is good; shown as it is.
        caption: how to read the figure, at its foot; shown as it is. Without one, the panels reach to the foot.
    """
    from matplotlib.figure import Figure

    margin = 0.1  # inches
    title = wrapped(printable(title), width - 2 * margin, TITLE, weight="bold")
    caption = wrapped(printable(caption), width - 2 * margin, SMALL)
    head = _text_height(title, TITLE) + margin
    foot = _text_height(caption, SMALL) + margin
    heights = [head, height, foot] if caption else [head, height]
    total = sum(heights)
    figure = Figure(figsize=(width, total), dpi=DPI, layout="constrained")
    body = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[1, 0]
    x = margin / width
    as_it_is: dict[str, Any] = {"parse_math": False, "linespacing": 1.2}
    figure.text(x, 1 - margin / total, title, size=TITLE, weight="bold", va="top", **as_it_is)
    if caption:
        figure.text(x, margin / total, caption, size=SMALL, color=GRAY, va="bottom", **as_it_is)
    return figure, body


def add_legend(figure: "SubFigure", panels: Iterable["Axes"]) -> None:
    """Add one legend above all panels: each label that a panel shows once, in as many columns as fit."""
    width = figure.bbox.width / DPI  # inches
    line = 5 * TEXT / 72  # inches of the line in front of a label, and of the gaps
    handles: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(shortened(label, width / 2 - line, TEXT), handle)
    widest = max(text_width(label, TEXT) for label in handles) + line
    columns = min(len(handles), int(width / widest))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=columns,
        fontsize=TEXT,
        frameon=False,
    )


def label_cells(axes: "Axes", image: "AxesImage", texts: Sequence[Sequence[str]], size: float = SMALL) -> None:
    """Write a text on each cell of an image, in black or white, whichever has more contrast with the cell's color."""
    values = image.get_array()
    assert values is not None
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                color = text_color(cast(Sequence[float], image.cmap(image.norm(values[row, column]))))
                axes.text(column, row, text, ha="center", va="center", size=size, color=color)


def text_color(background: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast with an RGB color from 0 to 1: never less than 4.5:1."""
    return max(("black", "white"), key=lambda color: contrast((float(color == "white"),) * 3, background))


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the contrast of two RGB colors from 0 to 1, as WCAG 2 defines it: from 1 to 21, for text at least 4.5."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def plain_label(name: str) -> str:
    """A name as matplotlib shows it as it is: no formula, and not hidden because of an underscore in front."""
    return ("\u200b" if name.startswith("_") else "") + printable(name).replace("$", r"\$")


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Break a text at its spaces into lines of at most `width` inches at a font size in pt; longer words are cut."""
    lines = [""]
    for word in text.split(" "):
        word = shortened(word, width, size, weight)
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size, weight) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def shortened(name: str, width: float, size: float, weight: str = "normal") -> str:
    """Cut a name in its middle to at most `width` inches at a font size in pt: names often differ at their ends."""
    if len(name) <= LONGEST and text_width(name, size, weight) <= width:
        return name
    lengths = range(2, max(3, min(len(name), LONGEST)))
    fit = bisect_right(lengths, width, key=lambda kept: text_width(_without_middle(name, kept), size, weight))
    return _without_middle(name, lengths[max(fit - 1, 0)])


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches of the longest line of a text at a font size in pt."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    points = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n")]
    return max(points) / 72


def save_figure(path: Path, figure: "Figure") -> None:
    """Save a matplotlib figure as a PNG file, atomically. Raises UserError if it cannot be written."""
    with explain_write_errors(path):
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi="figure", format="png"))


def _without_middle(name: str, kept: int) -> str:
    return f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"


def _text_height(text: str, size: float) -> float:
    """Inches of a text of one or more lines with linespacing 1.2."""
    return (1 + text.count("\n")) * 1.2 * 1.2 * size / 72


def _luminance(color: Sequence[float]) -> float:
    """Relative luminance of an sRGB color."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
