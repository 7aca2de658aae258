"""A report as one HTML file: tables, curves as SVG, the views, and the commands of every run."""

from collections.abc import Sequence
from html import escape

from fastssl.common.pages import html_page, html_picture, html_row, html_table, scrolling
from fastssl.common.terminal import count_of
from fastssl.reporting.charts import COLORS, curve_charts, legend
from fastssl.reporting.report import Report
from fastssl.reporting.tables import DIFFERENCE_COLUMNS, Cell, ReportTable

# Colors of Okabe and Ito, as in fastssl/common/figures.py, darker or lighter where a line would have a contrast of less
# than 3 with the page; black is the color of the text, as the page may be dark.
STYLE = """
.better, .worse { font-weight: bold; }
.better::after { content: " ▲"; color: #007A59; } .worse::after { content: " ▼"; color: #B84F00; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21em), 1fr)); gap: 1em; }
.charts figcaption { text-align: center; color: var(--text); }
svg { width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--soft); }
svg path, svg circle { fill: none; stroke-width: 2; } svg circle { stroke-width: 4; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .grid { stroke: var(--line); stroke-width: 1; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2em 1.4em; }
.legend svg { width: 36px; height: 8px; margin-right: .5em; vertical-align: middle; }
.c0 { stroke: #0072B2; } .c1 { stroke: #D55E00; } .c2 { stroke: #009E73; } .c3 { stroke: #CC79A7; }
.c4 { stroke: #B87D00; } .c5 { stroke: #2F93CC; } .c6 { stroke: var(--text); }
@media (prefers-color-scheme: dark) {
  .c0 { stroke: #3D9BDC; } .c4 { stroke: #E69F00; } .c5 { stroke: #56B4E9; }
  .better::after { color: #2BC796; } .worse::after { color: #F08A4B; }
}
th[scope] { white-space: normal; } th[scope=col] { min-width: 5em; vertical-align: bottom; }
th[scope=row] { min-width: 8em; font-weight: normal; overflow-wrap: break-word; }
td.heat { text-align: center; }
.runs th[scope=col] { min-width: 0; } .runs th[scope=row] { min-width: 13em; overflow-wrap: anywhere; }
.runs td { white-space: normal; } .runs td:last-child { min-width: 7em; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
details { margin: .6em 0; } summary { cursor: pointer; }
.views { max-width: 700px; }
"""
assert COLORS == 7  # classes c0 to c6


def report_page(report: Report) -> str:
    """Return the page. All text in it is escaped: recipes and results may be from anywhere."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f'<p class="note">{escape(sentence)}</p>' for sentence in report.findings]
    for table in report.tables:
        parts += [f"<h2>{escape(table.title)}</h2>", _table(table), f'<p class="soft">{escape(table.caption)}</p>']
        if table.differences:
            rows = html_table(
                f"Differences: {table.title}", DIFFERENCE_COLUMNS, table.differences, [False] * len(table.differences)
            )
            summary = f"{count_of(len(table.differences), 'difference')} with p-values"
            parts.append(f"<details><summary>{summary}</summary>{rows}</details>")
    if report.heat_maps:
        parts.append("<h2>Over beta, samples and prior</h2>")
        parts += [
            f"<h3>{escape(table.title)}</h3>{_table(table)}<p>{escape(table.caption)}</p>" for table in report.heat_maps
        ]
    charts = [
        f"<figure>{chart.svg}<figcaption>{escape(chart.title)}</figcaption></figure>"
        for chart in curve_charts(report.variants)
    ]
    if charts:
        parts += ["<h2>Training</h2>", legend(report.variants), f'<div class="charts">{"".join(charts)}</div>']
        parts.append('<p class="soft">Means over the seeds of a variant, to where its shortest run ends.</p>')
    if report.views:
        parts += ["<h2>Views</h2>", f'<div class="views">{html_picture(report.views.png, report.views.caption)}</div>']
    parts += [
        "<h2>Runs</h2>",
        f'<div class="runs">{_table(report.runs)}</div>',
        f'<p class="soft">{escape(report.runs.caption)}</p>',
    ]
    parts += _list("Not measured yet", report.missing, code=True) + _list("Left out, or not readable", report.remarks)
    commands = "\n".join(f"# {name}\n{command}" for name, command in report.commands)
    parts.append(f'<h2>Commands</h2><pre tabindex="0" aria-label="Commands">{escape(commands)}</pre>')
    parts.append(f'<h2>Environment</h2><pre tabindex="0" aria-label="Environment">{escape(report.environment)}</pre>')
    return html_page(report.title, "\n".join(parts), STYLE)


def _table(table: ReportTable) -> str:
    head = [f'<th scope="col">{escape(name)}</th>' for name in (table.corner, *table.columns)]
    rows = [html_row([_row_head(name), *map(_cell, cells)]) for name, cells in table.rows]
    return scrolling(table.title, f"<table>{html_row(head)}{''.join(rows)}</table>")


def _row_head(name: str) -> str:
    """Return the first cell of a row. Long paths break after a slash."""
    return f'<th scope="row">{escape(name).replace("/", "/<wbr>")}</th>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.mark:
        return f'<td class="{cell.mark}">{text}</td>'
    if cell.share is not None:
        # On a light blue, text of the page's color keeps its contrast on light and dark pages.
        return f'<td class="heat" style="background: rgb(0 114 178 / {0.05 + 0.35 * cell.share:.2f})">{text}</td>'
    return f"<td>{text}</td>"


def _list(title: str, lines: Sequence[str], code: bool = False) -> list[str]:
    if not lines:
        return []
    items = "".join(f"<li>{f'<code>{escape(line)}</code>' if code else escape(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2>", f"<ul>{items}</ul>"]
