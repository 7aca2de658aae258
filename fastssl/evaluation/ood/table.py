"""Tables of OOD evaluations: the detectors of one run, or one column per run."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import cast

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.table import Table

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import WIDTH_OF_FILES, PlainConsole
from fastssl.evaluation.ood.detectors import LABEL_BASED, OWN_UNCERTAINTY
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.ood.separation import DetectorResult
from fastssl.evaluation.ood.suites import SetDescription
from fastssl.evaluation.tables import SummaryRow, result_title

WIDE = 120  # columns of a terminal; in a narrower one, FPR and single sets are left out
HOW_TO_READ = (
    "AUROC: how often an unseen image scores higher than a known one, in percent (50 is chance), with 95 % intervals. "
    "The best ones are chosen on these very images, so theirs are upper bounds."
)


def ood_table(result: OODResult, width: int = 160) -> Table:
    """Show a line per detector, in percent: AUROC of near and far sets, and in a wide terminal FPR and each set."""
    wide = width >= WIDE
    ood_sets = {"near": result["near"], "far": result["far"]}
    groups = [group for group, sets in ood_sets.items() if sets]
    names = [name for group in groups for name in ood_sets[group]]
    skipped: dict[str, list[str]] = {}
    for detector, reason in result["skipped"].items():
        skipped.setdefault(reason, []).append(detector)
    train, val = cast(SetDescription, result["train"]), cast(SetDescription, result["val"])
    lines = [
        "AUROC (higher score = OOD) and FPR at 95 % of ID images accepted, in percent, means over sets; 95 % bootstrap",
        "intervals. inverted: AUROC is below 50 beyond its interval. rho: rank correlation with |h| on ID images",
        f"fitted on {train['images']:,} images of {_describe_source(train)}",
        f"ID: {val['images']:,} images of {_describe_source(val)}",
        *(f"{group} {name}: {_describe_source(ood_sets[group][name])}" for group in groups for name in ood_sets[group]),
        *(f"skipped: {', '.join(detectors)}: {reason}" for reason, detectors in skipped.items()),
        f"measured {result['measured_at']}",
    ]
    box = HEAVY_HEAD if wide else SIMPLE_HEAD
    table = Table(title=result_title(result), caption="\n".join(lines), caption_justify="left", box=box, pad_edge=wide)
    table.add_column("detector", no_wrap=True)
    headings = [heading for group in groups for heading in (f"{group}\nAUROC", "95 %", *(["FPR95"] if wide else []))]
    headings += [name.replace("-", "\n") for name in names] if wide else []
    for heading in [*headings, "rho"]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("inverted" if wide else "inv.", overflow="fold")
    labels_used = False
    for detector, row in result["detectors"].items():
        if row["labels"] and not labels_used:
            labels_used = True
            table.add_section()
        table.add_row(detector + (" *" if row["labels"] else ""), *_cells(row, groups, names, wide))
    if labels_used:
        table.caption = "\n".join([*lines, "* uses labels of the training images"])
    return table


def ood_summary(result: OODResult, width: int = 80) -> Table:
    """Show three detectors: the run's own uncertainty, the best one without labels and the best one with labels.

    "Best" is the highest mean of the near and far AUROC. A deterministic run has no uncertainty of its own. width: the
    columns of the terminal.
    """
    groups = [group for group in ("near", "far") if result[group]]
    kinds: dict[str, list[str]] = {}  # detector -> what it is
    if OWN_UNCERTAINTY in result["detectors"]:
        kinds[OWN_UNCERTAINTY] = ["own uncertainty"]
    for labels, kind in ((False, "best label-free"), (True, "best label-based")):
        names = [name for name, row in result["detectors"].items() if row["labels"] == labels]
        if names:
            best = max(names, key=lambda name: _mean_auroc(result["detectors"][name], groups))
            kinds.setdefault(best, []).append(kind)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=HOW_TO_READ, caption_justify="left")
    table.caption_style = "none"
    table.width = min(width, 80)
    table.add_column("", overflow="fold", min_width=8)
    table.add_column("score", overflow="fold", ratio=1)
    for group in groups:
        table.add_column(f"{group} AUROC" if width >= 60 else group, justify="right")
    for name, names_of_kind in kinds.items():
        row = result["detectors"][name]
        cells = []
        for group in groups:
            mean = row["near"] if group == "near" else row["far"]
            low, high = mean["intervals"]["auroc"]
            auroc = percent(mean["metrics"]["auroc"])
            cells.append(f"{auroc} ({percent(low)}-{percent(high)})" if width >= 80 else auroc)
        table.add_row(", ".join(names_of_kind), name, *cells)
    return table


def _mean_auroc(row: DetectorResult, groups: Sequence[str]) -> float:
    means = [row["near"] if group == "near" else row["far"] for group in groups]
    return sum(mean["metrics"]["auroc"] for mean in means) / len(means)


def save_ood_table(run_dir: Path, result: OODResult) -> Path:
    """Write the whole table to RUN/eval/ood-NAME.txt, and return its path. Raises UserError if it cannot be written."""
    path = run_dir / "eval" / result["scores"].replace(".scores.npz", ".txt")
    text = StringIO()
    PlainConsole(file=text, width=WIDTH_OF_FILES, markup=False, emoji=False).print(ood_table(result, WIDTH_OF_FILES))
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    with explain_write_errors(path):
        write_atomically(path, lines)
    return path


def _cells(row: DetectorResult, groups: Sequence[str], names: Sequence[str], wide: bool) -> list[str]:
    """Return the cells after the name. The last one has the sets where it is inverted, or if narrow their number."""
    cells = []
    for group in groups:
        mean = row["near"] if group == "near" else row["far"]
        low, high = mean["intervals"]["auroc"]
        cells += [percent(mean["metrics"]["auroc"]), f"{percent(low)}-{percent(high)}"]
        if wide:
            cells.append(percent(mean["metrics"]["fpr95_id_positive"]))
    inverted = [name for name in names if row["sets"][name]["inverted"]]
    shown = f"{len(inverted)}/{len(names)}" if inverted else ""
    if wide:
        cells += [percent(row["sets"][name]["metrics"]["auroc"]) for name in names]
        shown = "all" if inverted == names else ", ".join(inverted)
    return [*cells, f"{row['norm_correlation']:.2f}", shown]


def ood_summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Show a line per detector and a column per row of `summarize_runs`: near / far AUROC in percent."""
    table = Table("detector", caption="near / far AUROC in percent: means over sets, then mean ± std over seeds")
    for row in rows:
        table.add_column(row.label(), justify="right")
    for name in dict.fromkeys(metric.split(" ")[0] for row in rows for metric in row.metrics):
        cells = []
        for row in rows:
            found = [row.metrics.get(f"{name} {group} auroc") for group in ("near", "far")]
            cells.append(" / ".join(metric.format(percent) for metric in found if metric))
        table.add_row(name + (" *" if name in LABEL_BASED else ""), *cells)
    return table


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _describe_source(about: SetDescription) -> str:
    """Describe a file and its source images: CIFAR-10 that was saved as JPEG is not the original CIFAR-10."""
    formats = " and ".join(about["source_formats"] or ["unknown, built before formats were recorded"])
    height, width = about["source_px"]
    own = f", {about['own_bytes']:.0%} stored with their own bytes" if about["own_bytes"] else ""
    return f"{about['path']} (builder {about['builder']}; source: {formats}, {width:g}x{height:g} px{own})"
