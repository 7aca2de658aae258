"""Check tables at every width of a terminal: no column of width zero, no word cut."""

from collections import Counter
from io import StringIO

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import PlainConsole
from fastssl.evaluation.tables import FirstThatFits

WIDTHS = range(60, 201)
FOLDED = 20  # characters: a longer word, such as a path, may be continued on the next line


def rendered(renderable, width):
    console = PlainConsole(file=StringIO(), width=width, markup=False, emoji=False)
    console.print(renderable)
    return console.file.getvalue()


def tables_of(renderable, width):
    """The tables that are shown at this width."""
    if isinstance(renderable, Table):
        return [renderable]
    if isinstance(renderable, FirstThatFits):
        console = PlainConsole(width=width)
        shown = renderable.__rich_console__(console, console.options)
        return [each for each in shown if isinstance(each, Table)]
    if isinstance(renderable, Group):
        return [table for each in renderable.renderables for table in tables_of(each, width)]
    assert isinstance(renderable, (str, Text)), renderable
    return []


def words_of(table):
    """All words of headings and cells, with how often they occur."""
    cells = [cell for column in table.columns for cell in (column.header, *column.cells)]
    return Counter(word for cell in cells for word in str(cell).split())


def check_at_every_width(renderable):
    """Every word of every heading and cell must be there, as often as in the table, within the width."""
    for width in WIDTHS:
        shown = tables_of(renderable, width)
        assert shown
        for table in shown:
            text = rendered(table, width)
            assert "…" not in text, f"cut at {width} columns:\n{text}"
            assert all(cell_len(line) <= width for line in text.splitlines()), f"wider than {width} columns:\n{text}"
            found = Counter(text.split())
            for word, count in words_of(table).items():
                if len(word) > FOLDED:
                    assert word[:6] in text, f"{word} is not there at {width} columns:\n{text}"
                else:
                    assert found[word] >= count, f"{word}: {found[word]} of {count} at {width} columns:\n{text}"
    for width in (WIDTHS[0], 80, WIDTHS[-1]):  # the lines around the tables
        assert all(cell_len(line) <= width for line in rendered(renderable, width).splitlines()), width
