"""A profile as one HTML file that holds all it shows: no script, nothing from the network."""

import base64
import io
import json
from html import escape
from pathlib import Path

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import printable
from fastssl.profiling.plots import draw_profile
from fastssl.profiling.result import figure, missing_legs
from fastssl.profiling.tables import headline, leg_rows, percent, si, step_rows, subject

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; line-height: 1.3; border-left: 6px solid #D55E00; padding-left: .6em; }
h2 { font-size: 1.1em; margin: 2em 0 .4em; }
.dim, dt { color: #666; }
img { width: 100%; border: 1px solid #ddd; }
table { border-collapse: collapse; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { color: #666; font-weight: normal; }
.right { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.limit { background: #fbe9dd; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em 1.2em; margin: .5em 0; }
dd { margin: 0; }
pre { background: #f6f6f6; padding: 1em; white-space: pre-wrap; font-size: 13px; }
"""


def write_page(path: Path, profile: dict) -> None:
    """Raises UserError where the file cannot be written."""
    text = page(profile)
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def page(profile: dict) -> str:
    """All that a profile says. Names and paths are strangers' words, so `_text` is around every one of them."""
    picture = io.BytesIO()
    draw_profile(profile).savefig(picture, dpi="figure", format="png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    sentence = _text(profile["verdict"]["sentence"])
    remarks = [f"<li>{_text(remark)}</li>" for remark in profile["remarks"]]
    parts = [
        f"<h1>{sentence}</h1>",
        f'<p class="dim">{_text(subject(profile))}</p>',
        _pairs(dict(headline(profile))),
        f'<img alt="{sentence}" src="data:image/png;base64,{encoded}">',
        "<h2>The legs, each alone</h2>",
        _legs(profile),
        "<h2>What the device's time goes to</h2>",
        _table(("part", "ms an image", "share"), step_rows(profile)),
        f'<p class="dim">{_text(figure(profile, "step", "phases_note") or "")}</p>',
        "<h2>Not measured</h2>" + _pairs(missing) if (missing := missing_legs(profile)) else "",
        "<h2>Remarks</h2><ul>" + "".join(remarks) + "</ul>" if remarks else "",
        _trace(profile["trace"]),
        "<h2>Machine</h2>" + _pairs(_machine(profile)),
        "<h2>Data</h2>" + _pairs(_data(profile["data"])),
        "<h2>Versions</h2>" + _pairs(_versions(profile)),
        f"<h2>Recipe</h2><details><summary>{_text(' '.join([profile['name'], *profile['overrides']]))}</summary>"
        f"<pre>{_text(json.dumps(profile['recipe'], indent=1), lines=True)}</pre></details>",
        f'<p class="dim">Measured {_text(profile["made"])} in {profile["seconds"]:.0f} s.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>Profile of {_text(profile['name'])}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _text(words: object, lines: bool = False) -> str:
    """Safe between tags and between double quotes. lines: keep the line breaks."""
    texts = str(words).split("\n") if lines else [str(words)]
    return "\n".join(escape(printable(text)) for text in texts)


def _pairs(rows: dict[str, object]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows.items()) + "</dl>"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]], limits: list[bool] = (), numbers: int = 3) -> str:
    """Columns 2 to `numbers` hold figures."""
    right = [' class="right"' if 0 < i < numbers else "" for i in range(len(heads))]
    head = "".join(f"<th{style}>{_text(cell)}</th>" for style, cell in zip(right, heads))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{style}>{_text(cell)}</td>" for style, cell in zip(right, row))
        body.append(f"<tr{' class=limit' if limits and limits[i] else ''}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _legs(profile: dict) -> str:
    rows = leg_rows(profile)
    heads = ("leg", "images/s", "spread", "CPU-ms an image", "")
    return _table(heads, [row[:5] for row in rows], [row.is_limit for row in rows], numbers=4)


def _trace(name: str | None) -> str:
    if not name:
        return ""
    return (
        f"<h2>Trace</h2><p>Some steps, kernel by kernel, are in <code>{_text(name)}</code>, beside the profile: open "
        "<b>ui.perfetto.dev</b> in a browser and drop the file there (it stays on your machine).</p>"
    )


def _machine(profile: dict) -> dict[str, object]:
    machine, environment = profile["machine"], profile["environment"]
    rows = {"device": machine["device"], "cores": machine["cores"], "processes": machine["processes"]}
    if machine["peak_flops"]:
        rows["peak"] = f"{si(machine['peak_flops'], 'FLOP/s')} ({machine['peak_source']})"
    return rows | {key: value for key, value in environment.items() if key not in ("python", "packages", "cores")}


def _data(data: dict) -> dict[str, object]:
    rows = {
        "file": f"{data['path']}, {si(data['file_bytes'], 'B')}",
        "images": f"{data['images']:,}, {data['batches_per_epoch']:,} batches an epoch",
        "an image": f"{si(data['image_bytes'], 'B')} stored, {si(data['decoded_bytes'], 'B')} decoded",
        "stored as": f"{data['layout']}, {data['storage']}",
        "crop": f"on the {data['crop'].upper()}",
        "resident on the device": "yes" if data["resident"] else "no",
    }
    if data["resolution"]:
        rows["stored as"] += ", " + " x ".join(map(str, data["resolution"])) + " px"
    if data["in_page_cache"] is not None:
        rows["in the page cache"] = percent(data["in_page_cache"])
    if data["fits_into_memory"] is not None:
        rows["fits into memory"] = "yes" if data["fits_into_memory"] else "no"
    return rows


def _versions(profile: dict) -> dict[str, object]:
    environment = profile["environment"]
    packages = environment.get("packages")
    rows = {"fastssl": profile["fastssl"], "python": environment.get("python", "?")}
    return rows | (packages if isinstance(packages, dict) else {})
