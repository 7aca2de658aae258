"""A profile as one HTML file that contains all that it shows: no script, nothing from the network."""

import io
import json
from html import escape
from pathlib import Path

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.pages import html_page, html_pairs, html_picture, html_table
from fastssl.profiling.plots import ProfileFigure, draw_profile
from fastssl.profiling.profile import Profile
from fastssl.profiling.tables import STAGES_CAPTION, details, headline, stage_rows, subject, time_caption, time_rows

BODY = """<h1>{sentence}</h1>
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
<h2>Machine, data, versions and recipe</h2><pre>{conditions}</pre>"""


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
    body = BODY.format(
        sentence=escape(profile.bottleneck.sentence),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        subject=escape(subject(profile)),
        headline=html_pairs(headline(profile)),
        figures="\n".join(map(_figure, draw_profile(profile))),
        stages=html_table(
            "Stages",
            ["stage", "images/s", "±", "CPU ms"],
            [row[:4] for row in stages],
            [row.is_bottleneck for row in stages],
        ),
        stages_caption=escape(STAGES_CAPTION),
        time=html_table(
            "Training time", ["part", "ms per image", "share"], [whole, *parts], [True, *(False for _ in parts)]
        ),
        time_caption=escape(time_caption(profile)),
        details=html_pairs(details(profile)),
        trace=trace,
        conditions=escape(json.dumps(conditions, indent=1, ensure_ascii=False)),
    )
    with explain_write_errors(path):
        write_atomically(path, html_page(f"Profile of {profile.name}", body))


def _figure(drawn: ProfileFigure) -> str:
    image = io.BytesIO()
    drawn.figure.savefig(image, dpi="figure", format="png")
    return html_picture(image.getvalue(), drawn.caption)
