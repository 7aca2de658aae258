"""A profile as one HTML file that contains all that it shows: no script, nothing from the network."""

import base64
import io
import json
from html import escape
from pathlib import Path

from rich.console import Console

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.profiling.plots import draw_profile
from fastssl.profiling.profile import Profile
from fastssl.profiling.tables import profile_table

WIDTH = 130  # columns of the table
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>Profile of {name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5em; line-height: 1.3; border-left: 6px solid #D55E00; padding-left: .6em; }}
img {{ width: 100%; border: 1px solid #ddd; }}
pre {{ background: #f6f6f6; padding: 1em; font-size: 13px; line-height: 1.3; overflow-x: auto; }}
</style></head><body>
<h1>{sentence}</h1>
<img alt="{sentence}" src="data:image/png;base64,{image}">
<pre>{table}</pre>
{trace}
<h2>Machine, data, versions and recipe</h2><pre>{conditions}</pre>
</body></html>
"""


def write_page(path: Path, profile: Profile) -> None:
    """Write the figure, the terminal's table and the conditions as HTML. Names and paths in a profile come from
    anywhere, so all text is escaped. Raises UserError where the file cannot be written."""
    image = io.BytesIO()
    draw_profile(profile).savefig(image, dpi="figure", format="png")
    console = Console(width=WIDTH, file=io.StringIO(), record=True, markup=False)
    console.print(profile_table(profile, WIDTH))
    trace = ""
    if profile.trace:
        trace = (
            f"<p>A trace of a few steps, kernel by kernel, is in <code>{escape(profile.trace)}</code>, next to the "
            "profile: open <b>ui.perfetto.dev</b> in a browser and drop the file there (it stays on your machine).</p>"
        )
    conditions = profile.model_dump(
        include={"measured_at", "seconds", "fastssl_version", "overrides", "machine", "data", "environment", "recipe"}
    )
    page = PAGE.format(
        name=escape(profile.name),
        sentence=escape(profile.bottleneck.sentence),
        image=base64.b64encode(image.getvalue()).decode(),
        table=console.export_html(inline_styles=True, code_format="{code}"),
        trace=trace,
        conditions=escape(json.dumps(conditions, indent=1, ensure_ascii=False)),
    )
    with explain_write_errors(path):
        write_atomically(path, page)
