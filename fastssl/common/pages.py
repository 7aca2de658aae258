"""HTML pages that contain all that they show: no script, nothing from the network. Light or dark, as the browser asks.

Text comes from recipes, names of files and results, which may be from anywhere: every function here escapes it.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

# A wide table scrolls within its `div`, which the keyboard reaches; pictures keep their white background where the page
# is dark. The policy lets a browser load nothing, even if some text were not escaped.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; --text: #222; --page: #fff; --soft: #595959; --line: #d5d5d5; --area: #f6f6f6;
         --mark: #D55E00; --row: #fdeee3; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6e6e6; --page: #16181c; --soft: #a8a8a8; --line: #3a3d42; --area: #202329; --mark: #E69F00;
           --row: #3a2c16; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1100px;
       margin: 1.5em auto; padding: 0 1em; }}
h1 {{ font-size: 1.4em; line-height: 1.35; border-left: 6px solid var(--mark); padding-left: .6em; }}
h1, p, li, dd {{ overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15em; margin: 1.8em 0 .5em; }}
.note {{ border-left: 6px solid var(--line); padding-left: .8em; }}
.soft, figcaption, dt {{ color: var(--soft); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: right; padding: .25em .6em; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: .3em; }}
tr.marked {{ background: var(--row); font-weight: bold; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20em), 1fr)); gap: .6em 2em; margin: 0; }}
dd {{ margin: 0; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); gap: 1.5em; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }}
figcaption {{ font-size: .9em; }}
@media (max-width: 500px) {{ th, td {{ font-size: .87em; padding: .25em .4em; }} }}
pre {{ background: var(--area); padding: 1em; font-size: 13px; line-height: 1.3; overflow-x: auto; }}
{style}</style></head><body>
{body}
</body></html>
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Return a page. `body` is HTML, and `style` more rules of its style sheet."""
    return _PAGE.format(title=escape(title), body=body, style=style)


def html_table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[bool]) -> str:
    """Return a table of text; marked rows stand out. name: what it holds, for screen readers."""
    lines = [html_row([f"<th>{escape(name)}</th>" for name in heads])]
    for row, is_marked in zip(rows, marked, strict=True):
        lines.append(html_row([f"<td>{escape(cell)}</td>" for cell in row], "marked" if is_marked else ""))
    return scrolling(name, f"<table>{''.join(lines)}</table>")


def html_row(cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(cells)}</tr>' if kind else f"<tr>{''.join(cells)}</tr>"


def scrolling(name: str, table: str) -> str:
    """Return an element that scrolls, also by keys, where a table is wider than the window."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def html_pairs(lines: Mapping[str, str]) -> str:
    """Return names with their texts."""
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(text)}</dd></div>' for k, text in lines.items())}</dl>"


def html_picture(png: bytes, caption: str) -> str:
    """Return a picture with its caption."""
    data, caption = base64.b64encode(png).decode(), escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
