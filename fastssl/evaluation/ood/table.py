"""What a person sees of an OOD evaluation: one run as a table of detectors, several side by side."""

from collections.abc import Sequence

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.table import Table

from fastssl.evaluation.ood.detectors import LABEL_BASED
from fastssl.evaluation.tables import SummaryRow, result_title

WIDE = 120  # columns of a terminal; in a narrower one, figures of single sets are left to the JSON


def ood_table(result: dict, width: int = 160) -> Table:
    """AUROC of near and far sets with intervals, in percent; in a wide terminal FPR@95 and each set's AUROC too."""
    wide = width >= WIDE
    groups = [group for group in ("near", "far") if result[group]]
    sets = [other for group in groups for other in result[group]]
    lines = [
        "AUROC in the declared direction (higher score = OOD) and FPR at 95 % of ID kept, in percent, means over sets;",
        "95 % bootstrap intervals. inverted: AUROC is below 50 beyond its interval. rho: rank correlation with |h|, ID",
        f"fitted on {result['train']['images']:,} images of {_source(result['train'])}",
        f"ID: {result['val']['images']:,} images of {_source(result['val'])}",
        *(f"{group} {name}: {_source(about)}" for group in groups for name, about in result[group].items()),
        *(f"left out: {', '.join(names)}: {why}" for why, names in _by_reason(result["skipped"]).items()),
        f"measured {result['measured_at']}",
    ]
    box = HEAVY_HEAD if wide else SIMPLE_HEAD
    table = Table(title=result_title(result), caption="\n".join(lines), caption_justify="left", box=box, pad_edge=wide)
    table.add_column("detector", no_wrap=True)
    for group in groups:
        for heading in (f"{group}\nAUROC", "95 %", "FPR95")[: 3 if wide else 2]:
            table.add_column(heading, justify="right", no_wrap=True)
    for other in sets if wide else ():
        table.add_column(other.replace("-", "\n"), justify="right", no_wrap=True)
    table.add_column("rho", justify="right", no_wrap=True)
    table.add_column("inverted" if wide else "inv.", overflow="fold")
    labelled = False
    for name, row in result["detectors"].items():
        if row["labels"] and not labelled:
            table.add_section()
            labelled = True
        cells = []
        for group in groups:
            figures, (low, high) = row[group]["metrics"], row[group]["intervals"]["auroc"]
            cells += [percent(figures["auroc"]), f"{percent(low)}-{percent(high)}"]
            cells += [percent(figures["fpr95_id_positive"])] if wide else []
        cells += [percent(row["sets"][other]["metrics"]["auroc"]) for other in sets] if wide else []
        inverted = [other for other in sets if row["sets"][other]["inverted"]]
        named = "all" if inverted == sets else ", ".join(inverted)
        if not wide:
            named = f"{len(inverted)}/{len(sets)}" if inverted else ""
        table.add_row(name + (" *" if row["labels"] else ""), *cells, f"{row['norm_correlation']:.2f}", named)
    if labelled:
        table.caption += "\n* uses labels of the training images"
    return table


def ood_summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Rows of `summarize_runs`: near and far AUROC in percent, means over sets, then mean ± std over seeds."""
    table = Table("detector", caption="near / far AUROC in percent: means over sets, then mean ± std over seeds")
    for row in rows:
        table.add_column(row.label(), justify="right")
    names = dict.fromkeys(figure.split(" ")[0] for row in rows for figure in row.metrics)
    for name in names:
        cells = []
        for row in rows:
            found = [row.metrics.get(f"{name} {group} auroc") for group in ("near", "far")]
            cells.append(" / ".join(metric.format(percent) for metric in found if metric))
        table.add_row(name + (" *" if name in LABEL_BASED else ""), *cells)
    return table


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _source(about: dict) -> str:
    """A file, and what its images were before: CIFAR as JPEG is not CIFAR."""
    formats = about["source_formats"]
    was = " and ".join(f"{name}" for name in formats) if formats else "unknown, built before formats were recorded"
    height, width = about["source_px"]
    kept = f", {about['own_bytes']:.0%} stored as they were" if about["own_bytes"] else ""
    return f"{about['path']} (builder {about['builder']}; source: {was}, {width:g}x{height:g} px{kept})"


def _by_reason(left_out: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return names
