"""A profile as one HTML file that contains all that it shows: no script, nothing from the network."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.profiling.plots import ProfileFigure, draw_profile
from fastssl.profiling.profile import Profile
from fastssl.profiling.tables import STAGES_CAPTION, details, headline, stage_rows, subject, time_caption, time_rows

# A wide table scrolls within its `div`; figures keep their white background where the page is dark.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Profile of {name}</title><style>
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
</style></head><body>
<h1>{sentence}</h1>
{notes}
<p class="soft">{subject}</p>
{headline}
<h2>Figures</h2>
<div class="figures">{figures}</div>
<h2>Stages</h2>
{stages}
<p class="soft">{stages_caption}</p>
<h2>Where the training time goes</h2>
{time}
<p class="soft">{time_caption}</p>
<h2>More on each stage</h2>
{details}
{trace}
<h2>Machine, data, versions and recipe</h2><pre>{conditions}</pre>
</body></html>
"""


def write_page(path: Path, profile: Profile) -> None:
    """Write the verdict, the figures, the tables and the conditions as HTML. Names and paths in a profile come from
    anywhere, so all text is escaped. Raises UserError where the file cannot be written."""
    stages, (whole, *parts) = stage_rows(profile), time_rows(profile)
    trace = ""
    if profile.trace:
        trace = (
            f"<h2>Trace</h2><p>A trace of a few steps, kernel by kernel, is in <code>{escape(profile.trace)}</code>, "
            "next to the profile: open <b>ui.perfetto.dev</b> in a browser and drop the file there (it stays on your "
            "machine).</p>"
        )
    conditions = profile.model_dump(
        include={"measured_at", "seconds", "fastssl_version", "overrides", "machine", "data", "environment", "recipe"}
    )
    notes = [profile.bottleneck.advice] if profile.bottleneck.advice else []
    notes += [f"Note: {remark}" for remark in profile.remarks]
    page = PAGE.format(
        name=escape(profile.name),
        sentence=escape(profile.bottleneck.sentence),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        subject=escape(subject(profile)),
        headline=_pairs(headline(profile)),
        figures="\n".join(map(_figure, draw_profile(profile))),
        stages=_table(
            ["stage", "images/s", "±", "CPU ms"], [row[:4] for row in stages], [row.is_bottleneck for row in stages]
        ),
        stages_caption=escape(STAGES_CAPTION),
        time=_table(["part", "ms per image", "share"], [whole, *parts], [True, *(False for _ in parts)]),
        time_caption=escape(time_caption(profile)),
        details=_pairs(details(profile)),
        trace=trace,
        conditions=escape(json.dumps(conditions, indent=1, ensure_ascii=False)),
    )
    with explain_write_errors(path):
        write_atomically(path, page)


def _figure(drawn: ProfileFigure) -> str:
    """Return a figure with its caption."""
    image = io.BytesIO()
    drawn.figure.savefig(image, dpi="figure", format="png")
    data = base64.b64encode(image.getvalue()).decode()
    caption = escape(drawn.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[bool]) -> str:
    """Return a table that scrolls within its own width."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = [f"<tr>{head}</tr>"]
    for row, is_marked in zip(rows, marked, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="marked">{cells}</tr>' if is_marked else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _pairs(lines: dict[str, str]) -> str:
    """Return names with their texts."""
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(text)}</dd></div>' for k, text in lines.items())}</dl>"
