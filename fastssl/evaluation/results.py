"""What an evaluation shows and keeps: RUN/eval/<name>.json and the table of its figures."""

import json
from pathlib import Path

from rich.table import Table

from fastssl.beton.atomic import write_atomically


def write_result(run_dir: str | Path, result: dict) -> Path:
    """RUN/eval/<evaluation>.json, written beside and renamed."""
    path = Path(run_dir) / "eval" / f"{result['evaluation']}.json"
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))
    return path


def result_table(result: dict) -> Table:
    """The figures, shares from 0 to 1, in percent."""
    val = result["val"]
    caption = f"{val['images']:,} images of {val['path']} ({result['layout']} file)"
    title = f"{result['evaluation']}: {result['run']}"
    table = Table(title=title, caption=caption, min_width=max(len(title), len(caption)))
    table.add_column("figure")
    table.add_column("%", justify="right")
    for name, share in result["figures"].items():
        table.add_row(name, f"{100 * share:.2f}")
    return table
