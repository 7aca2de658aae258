"""What an evaluation keeps and shows: RUN/eval/<name>.json, the table of one result, and that of several runs."""

import importlib.metadata
import json
import statistics
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.table import Table

from fastssl.beton import read_header
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.evaluation.metrics import Scores
from fastssl.recipe import load_recipe

PLACES = ("run", "weights", "path", "subset", "list")  # keys of a result that say where something lies
MOST_CLASSES_DRAWN = 50  # in a confusion matrix: more cannot be read
# Units of the figures that are no shares from 0 to 1, which are shown in percent:
UNITS = {"nll": "nats", "nll_scaled": "nats"}
UNITS |= dict.fromkeys(("aurc", "e_aurc", "aurc_confidence", "e_aurc_confidence"), "0 to 1")
UNITS |= dict.fromkeys(("spearman_blur", "spearman_noise", "spearman_jpeg", "spearman_crop"), "-1 to 1")
MARKS = ("saturated", "failed")  # keys of a result that name its figures or checks
MOST_COLUMNS = 10  # of figures in a table of several runs: with more, each figure is a line


def load_or_compute(run_dir: str | Path, name: str, request: dict, measure: Callable[[], dict]) -> dict:
    """RUN/eval/NAME.json if it answers this request, else what `measure` gives, kept there.

    request: all that the figures depend on: protocol, settings, seed, checksums of encoder and data; and where these
    lie, which does not matter. The result is the request and what `measure` returns, with the time and the version
    that made it.
    """
    request = {**request, "fastssl": importlib.metadata.version("fastssl-trainer")}
    request = json.loads(json.dumps(request))  # tuples become lists, as in the file
    path = Path(run_dir) / "eval" / f"{name}.json"
    kept = read_result(path)
    if kept and without_places({key: kept.get(key) for key in request}) == without_places(request):
        return kept | request
    with explain_write_errors(path):
        path.parent.mkdir(exist_ok=True)
    result = {**request, **measure(), "made": datetime.now().astimezone().isoformat(timespec="seconds")}
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_text(text))
    return json.loads(text)


def without_places(value: object) -> object:
    """An object, and those in it, without the keys that say where something lies."""
    if not isinstance(value, dict):
        return value
    return {key: without_places(inner) for key, inner in value.items() if key not in PLACES}


def read_result(path: Path) -> dict | None:
    """None where there is none, or a damaged one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def scored(run_dir: str | Path, name: str, scores: Scores, test: Path) -> dict:
    """Figures and intervals for a result; the confusion matrix goes into a file beside it, and into a picture.

    test: the .beton that was tested on, for the names of its classes.
    """
    path = Path(run_dir) / "eval" / f"{name}.confusion.npy"
    write_atomically(path, lambda beside: np.save(beside, scores.confusion))
    if len(scores.confusion) <= MOST_CLASSES_DRAWN:
        draw_confusion(path.with_suffix(".png"), scores, read_header(test).classes)
    return {
        "figures": scores.figures,
        "intervals": {key: list(interval) for key, interval in scores.intervals.items()},
        "confusion": path.name,
        "confusion_classes": [int(label) for label in scores.confusion_classes],
    }


def draw_confusion(path: Path, scores: Scores, names: list[str] | None) -> None:
    """The confusion matrix: rows the truth, columns the guess, each row's shares in percent."""
    from matplotlib.figure import Figure  # here, as it takes half a second; without pyplot, no display is looked for

    share = 100 * scores.confusion / np.maximum(scores.confusion.sum(axis=1, keepdims=True), 1)
    labels = [names[c] if names and 0 <= c < len(names) else str(c) for c in scores.confusion_classes]
    side = 2.5 + 0.4 * len(labels)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.5:
            color = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_xlabel("guess")
    axes.set_ylabel("truth")
    axes.set_title(f"% of each class, accuracy {100 * scores.figures['accuracy']:.1f} %")
    save_picture(path, figure)


def save_picture(path: Path, figure) -> None:
    """A matplotlib Figure as a PNG, never half there. Raises UserError where it cannot be written."""
    with explain_write_errors(path):
        write_atomically(path, lambda beside: figure.savefig(beside, dpi="figure", format="png"))


def shown(name: str, value: float) -> str:
    """A share in percent, anything else as it is."""
    return f"{value:.3f}" if name in UNITS else f"{100 * value:.2f}"


def with_unit(name: str) -> str:
    """A figure's name, with its unit where that is not percent."""
    return name + (f" ({UNITS[name]})" if name in UNITS else "")


def score_of(result: dict) -> str | None:
    """Which uncertainty was measured, in a result that is about one."""
    return result["settings"].get("score")


def result_table(result: dict) -> Table:
    """The figures of one result, shares in percent, with their 95 % intervals over the test images."""
    val, train = result["val"], result["train"]
    lines = [
        f"fitted on {train['images']:,} images of {train['path']}",
        f"tested on {val['images']:,} images of {val['path']} ({result['layout']} file)",
        "95 % bootstrap intervals over the tested images",
        f"measured {result['made']}",
    ]
    if score := score_of(result):
        spread = result["uncertainty"]
        lines.insert(2, f"uncertainty: {score}, {spread['mean']:.4g} ± {spread['std']:.2g} over them")
    title = f"{result['evaluation']}: {result['run']}" + (" (untrained)" if result["weights"] == "untrained" else "")
    width = max(map(len, [title, *lines]))
    table = Table("figure", title=title, caption="\n".join(lines), min_width=width)
    table.add_column("%", justify="right")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    for name, value in result["figures"].items():
        low, high = result["intervals"].get(name, (None, None))
        bounds = ("", "") if low is None else (shown(name, low), shown(name, high))
        table.add_row(with_unit(name), shown(name, value), *bounds)
    return table


def summarize(results: list[dict]) -> list[dict]:
    """Results of several runs, one row for those that differ in the seed of their run alone.

    Each row has the runs and seeds, and for each figure that all of them have the mean and the standard deviation over
    them (n - 1; None for a single run). What any of them calls `saturated` or `failed` stands there too.
    """
    groups: dict[str, list[dict]] = {}
    for result in results:
        recipe = load_recipe(Path(result["run"]) / "recipe.yaml").model_dump(mode="json", exclude={"seed", "run"})
        alike = {key: result.get(key) for key in ("evaluation", "settings", "view", "train", "val", "near", "far")}
        kind = [without_places(alike), recipe, Path(result["weights"]).name]
        group = groups.setdefault(json.dumps(kind, sort_keys=True), [])
        if result["encoder_sha256"] not in [other["encoder_sha256"] for other in group]:  # else one run, given twice
            group.append(result)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict]) -> dict:
    names = [name for name in group[0]["figures"] if all(name in result["figures"] for result in group)]
    columns = {name: [result["figures"][name] for result in group] for name in names}
    score = score_of(group[0])
    return {
        "evaluation": group[0]["evaluation"],
        **({"score": score} if score else {}),
        **{key: sorted({name for result in group for name in result[key]}) for key in MARKS if key in group[0]},
        "runs": [result["run"] for result in group],
        "untrained": group[0]["weights"] == "untrained",
        "seeds": [load_recipe(Path(result["run"]) / "recipe.yaml").seed for result in group],
        "figures": {
            name: {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
            for name, values in columns.items()
        },
    }


def summary_table(rows: list[dict]) -> Table:
    """One line for each of `summarize`, one column if there are many figures: mean and standard deviation over the
    seeds, shares in percent."""
    heads = ["evaluation", "run", "seeds"] + ["score"] * any("score" in row for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    cells = []
    for row in rows:
        run = Path(row["runs"][0]).resolve().name + (" (untrained)" if row["untrained"] else "")
        run += f" and {len(row['runs']) - 1} more" if len(row["runs"]) > 1 else ""
        cells.append([row["evaluation"], run, str(len(row["runs"])), row.get("score", "")][: len(heads)])
        for name in names:
            figure = row["figures"].get(name, {"mean": None})
            mean, sd = figure["mean"], figure.get("sd")
            cell = "" if mean is None else shown(name, mean) + ("" if sd is None else f" ± {shown(name, sd)}")
            cells[-1].append(cell)

    upright = len(names) <= MOST_COLUMNS
    table = Table(caption="shares in percent, nll in nats; mean ± sd over seeds", show_header=upright)
    if upright:
        for head in heads:
            table.add_column(head)
        for name in names:
            table.add_column(name.replace("_", "\n"), justify="right", overflow="fold")
        lines = cells
    else:
        table.add_column()
        for _ in rows:
            table.add_column(justify="right", overflow="fold")
        lines = zip([*heads, *map(with_unit, names)], *cells)
    for line in lines:
        table.add_row(*line)
    return table


def write_summary(path: Path, rows: list[dict]) -> None:
    text = json.dumps({"rows": rows}, indent=2) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lambda beside: beside.write_text(text))
