"""Tables of OOD evaluations: the detectors of one run, or one column per run."""

from collections.abc import Collection, Sequence
from io import StringIO
from pathlib import Path
from typing import cast

from rich.console import Group
from rich.table import Table

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import WIDTH_OF_FILES, PlainConsole, count_of
from fastssl.evaluation.ood.detectors import LABEL_BASED, OWN_UNCERTAINTY
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.ood.separation import DetectorResult
from fastssl.evaluation.ood.suites import SetDescription
from fastssl.evaluation.ood.verdict import (
    GROUPS,
    best_detector,
    detectors_of,
    group_mean,
    inverted_sets,
    is_of_some_images,
    ood_verdict,
    recommended_detector,
    runs_verdict,
)
from fastssl.evaluation.tables import (
    FirstThatFits,
    SummaryRow,
    needed_width,
    percent,
    plain_table,
    result_title,
    table_of_rows,
    text_lines,
)

HOW_TO_READ = (
    "AUROC: how often an unseen image scores higher than a known one, in percent (50 is chance), with 95 % intervals. "
    "The best ones are chosen on these very images, so theirs are upper bounds."
)
# Optional columns, from the widest form of the table to the narrowest. The others are in every form.
FORMS = (("95 %", "FPR95", "sets"), ("95 %", "FPR95"), ("95 %",), ())
# What the columns mean, each line with the optional column it is about.
LEGEND = (
    ("", "ID: in-distribution images, as in training. OOD: out-of-distribution images, similar (near) or not (far)."),
    ("", "AUROC: how often an OOD image scores higher than an ID image, in percent; 50 is chance, higher is better."),
    ("", "near, far: means over the sets of the group, with 95 % bootstrap intervals over the images."),
    ("FPR95", "FPR95: share of OOD images accepted when 95 % of the ID images are, in percent; lower is better."),
    ("", "rho: rank correlation of score and length of h on ID images. Near 1 or -1: little more than that length."),
    ("", "The best detector is chosen on these very images, so its AUROC is an upper bound."),
    ("", "inverted: sets whose AUROC is below 50 beyond its interval: OOD images score lower than ID images there."),
    ("sets", "!: inverted on this set."),
)
LABELS_USED = "*: uses labels of the training images."
WHERE_TO_READ = "Every word: docs/glossary.md; every detector: docs/ood.md."


def ood_table(result: OODResult) -> Group:
    """Show a line per detector, in as many columns as fit, then which one to use, and what every column means."""
    ood_sets = {group: result["near"] if group == "near" else result["far"] for group in GROUPS}
    skipped: dict[str, list[str]] = {}
    for detector, reason in result["skipped"].items():
        skipped.setdefault(reason, []).append(detector)
    train, val = cast(SetDescription, result["train"]), cast(SetDescription, result["val"])
    labels_used = any(row["labels"] for row in result["detectors"].values())
    about = [
        f"fitted on {train['images']:,} images of {_describe_source(train)}",
        f"ID: {val['images']:,} images of {_describe_source(val)}",
        *(f"{group} {name}: {_describe_source(about)}" for group in GROUPS for name, about in ood_sets[group].items()),
        *_jepa_images(result),
        *(f"skipped: {', '.join(detectors)}: {reason}" for reason, detectors in skipped.items()),
        f"measured {result['measured_at']}",
    ]
    verdict = text_lines(ood_verdict(result))
    end = [LABELS_USED] if labels_used else []
    if name := recommended_detector(result):
        end.append(f"Your images: fastssl embed RUN PHOTOS --out FILE --score {name}")
    end.append(WHERE_TO_READ)
    below = [Group(verdict, text_lines([*_legend(form), *end], style="dim")) for form in FORMS]
    return Group(
        FirstThatFits([_detector_table(result, form) for form in FORMS], below), text_lines(about, style="dim")
    )


def _jepa_images(result: OODResult) -> list[str]:
    """Say of how many images JEPA-SCORE is, if it was computed."""
    names = [name for name in result["detectors"] if is_of_some_images(name)]
    settings = result["settings"]
    along = "all directions" if settings["jepa_exact"] else f"up to {settings['jepa_directions']} random directions"
    images = f"at most {settings['jepa_images']:,} images of each set"
    return [f"{', '.join(names)}: {images}, along {along} of the embedding; never recommended"] if names else []


def _legend(form: Sequence[str]) -> list[str]:
    """Return what the columns of `form` mean."""
    return [line for column, line in LEGEND if not column or column in form]


def _detector_table(result: OODResult, form: Sequence[str]) -> Table:
    """Return the table with the optional columns of `form`."""
    groups = [group for group in GROUPS if result[group]]
    sets = [*result["near"], *result["far"]] if "sets" in form else []
    table = plain_table(result_title(result))
    table.add_column("detector", overflow="fold")
    for group in groups:
        for heading in (f"{group}\nAUROC", *(each for each in form if each != "sets")):
            table.add_column(heading, justify="right", no_wrap=True)
    for heading in [*(name.replace("-", "\n") for name in sets), "rho", "inverted"]:
        table.add_column(heading, justify="right", no_wrap=True)
    last_labels = False
    for detector, row in result["detectors"].items():
        if row["labels"] and not last_labels:
            table.add_section()
        last_labels = row["labels"]
        table.add_row(detector + (" *" if row["labels"] else ""), *_cells(row, groups, sets, form))
    return table


def _cells(row: DetectorResult, groups: Sequence[str], sets: Sequence[str], form: Sequence[str]) -> list[str]:
    """Return the cells after the name of the detector."""
    cells = []
    for group in groups:
        mean = group_mean(row, group)
        cells.append(percent(mean["metrics"]["auroc"]))
        if "95 %" in form:
            low, high = mean["intervals"]["auroc"]
            cells.append(f"{percent(low)}-{percent(high)}")
        if "FPR95" in form:
            cells.append(percent(mean["metrics"]["fpr95_id_positive"]))
    inverted = inverted_sets(row)
    cells += [percent(row["sets"][name]["metrics"]["auroc"]) + ("!" if name in inverted else " ") for name in sets]
    return [*cells, f"{row['norm_correlation']:.2f}", f"{len(inverted)} of {len(row['sets'])}" if inverted else ""]


def ood_summary(result: OODResult, width: int = 80) -> Table:
    """Show three detectors: the run's own uncertainty, the best one without labels and the best one with labels.

    "Best" is the highest mean of the near and far AUROC, of the detectors that are inverted on no set. A deterministic
    run has no uncertainty of its own. width: the columns of the terminal.
    """
    groups = [group for group in GROUPS if result[group]]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=HOW_TO_READ, caption_justify="left")
    table.caption_style = "none"
    table.width = min(width, 80)
    table.add_column("", overflow="fold", min_width=8)
    table.add_column("detector", overflow="fold", ratio=1)
    for group in groups:
        table.add_column(f"{group} AUROC" if width >= 60 else group, justify="right")
    inverted = [name for name, row in result["detectors"].items() if inverted_sets(row)]
    for name, kinds in summarized_detectors(result["metrics"], inverted).items():
        cells = []
        for group in groups:
            mean = group_mean(result["detectors"][name], group)
            low, high = mean["intervals"]["auroc"]
            auroc = percent(mean["metrics"]["auroc"])
            cells.append(f"{auroc} ({percent(low)}-{percent(high)})" if width >= 80 else auroc)
        table.add_row(", ".join(kinds), name, *cells)
    return table


def summarized_detectors(metrics: dict[str, float], inverted: Collection[str]) -> dict[str, list[str]]:
    """Choose three detectors by metrics such as "energy near auroc". Returns what each one is, by its name.

    One that is `inverted` on some set is chosen only if all of its kind are.
    """
    measured = detectors_of(name for name in metrics if name.endswith(" auroc"))
    names = [name for name in measured if not is_of_some_images(name)]
    kinds: dict[str, list[str]] = {}
    if OWN_UNCERTAINTY in names:
        kinds[OWN_UNCERTAINTY] = ["own uncertainty"]
    for labels, kind in ((False, "best label-free"), (True, "best label-based")):
        if candidates := [name for name in names if (name in LABEL_BASED) == labels]:
            sound = [name for name in candidates if name not in inverted]
            kinds.setdefault(best_detector(metrics, sound or candidates), []).append(kind)
    return kinds


def save_ood_table(run_dir: Path, result: OODResult) -> Path:
    """Write the whole table to RUN/eval/ood-NAME.txt, and return its path. Raises UserError if it cannot be written."""
    path = run_dir / "eval" / result["scores"].replace(".scores.npz", ".txt")
    text = StringIO()
    width = max(WIDTH_OF_FILES, needed_width(_detector_table(result, FORMS[0])))
    PlainConsole(file=text, width=width, markup=False, emoji=False).print(ood_table(result))
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lines)
    return path


def ood_summary_table(rows: Sequence[SummaryRow]) -> Group:
    """Show a line per detector and a column per row of `summarize_runs`: near / far AUROC in percent."""
    names = detectors_of(metric for row in rows for metric in row.metrics)
    inverted = ("inverted", _inverted_count)
    table = table_of_rows("detector", "near / far AUROC", rows, names, _near_and_far, show=_starred, second=inverted)
    lines = [
        "near / far AUROC in percent (50 is chance): means over sets, then mean ± std over seeds.",
        "Above chance: mean - std is above 50. The best detector is chosen on these very images.",
        "inverted: sets whose AUROC is below 50 beyond its interval in some run: OOD images score lower there.",
        *([LABELS_USED] if set(names) & set(LABEL_BASED) else []),
        WHERE_TO_READ,
    ]
    return Group(table, text_lines(runs_verdict(rows)), text_lines(lines, style="dim"))


def _inverted_count(row: SummaryRow, name: str) -> str:
    sets = row.inverted.get(name)
    return count_of(len(sets), "set") if sets else ""


def _starred(name: str) -> str:
    return name + (" *" if name in LABEL_BASED else "")


def _near_and_far(row: SummaryRow, name: str) -> str:
    found = (row.metrics.get(f"{name} {group} auroc") for group in GROUPS)
    return " / ".join(metric.format(percent) for metric in found if metric)


def _describe_source(about: SetDescription) -> str:
    """Describe a file and its source images: CIFAR-10 that was saved as JPEG is not the original CIFAR-10."""
    formats = " and ".join(about["source_formats"] or ["unknown, built before formats were recorded"])
    height, width = about["source_px"]
    own = f", {about['own_bytes']:.0%} stored with their own bytes" if about["own_bytes"] else ""
    return f"{about['path']} (builder {about['builder']}; source: {formats}, {width:g}x{height:g} px{own})"
