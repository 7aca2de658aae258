"""What a person sees of `fastssl eval mi`: one run with its checks, several side by side."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from fastssl.evaluation.tables import SummaryRow, result_title

VERDICTS = {True: "holds", False: "FAILS", None: "inconclusive: saturated"}


def mi_table(result: dict) -> Group:
    val = result["val"]
    lines = [
        "lower bounds, held out, ± standard error of the joint pairs; js is the headline, mine what the paper used",
        "saturated: as large as this, or larger. V: the clean view averaged to "
        f"{result['settings']['side']} x {result['settings']['side']}, so I(V;.) is below the image's own",
        *([] if len(result["quantities"]) > 1 else ["a supervised run has no z"]),
        f"{val['images']:,} images of {val['path']} ({val['layout']} file), seed {result['seed']}",
        f"measured {result['measured_at']}",
    ]
    title = result_title(result)
    width = max(map(len, [title, *lines]))
    table = Table("nats", title=title, caption="\n".join(lines), min_width=width)
    for heading in ("js", "mine", "ceiling", ""):
        table.add_column(heading, justify="right")
    for pair, kinds in result["quantities"].items():
        js, mine = kinds["js"], kinds["mine"]
        cells = [f"{each['nats']:.2f} ± {each['error']:.2f}" for each in (js, mine)]
        flags = [name for name, each in (("js", js), ("mine", mine)) if each["saturated"]]
        said = "saturated" if len(flags) == 2 else f"{flags[0]} saturated" if flags else ""
        said = ", ".join(filter(None, [said, "infinite in theory" if pair in result["infinite"] else ""]))
        table.add_row(pair, *cells, f"{js['ceiling']:.2f}", said)
    parts = [table]
    if result["bounds"]:
        bounds = Table("nats", title="from the known q, without training", min_width=width)
        for heading in ("lower", "upper", "ceiling of lower", "rate E KL(q||p)"):
            bounds.add_column(heading, justify="right")
        for of, each in result["bounds"].items():
            lower = f"{each['lower']:.2f}" + (" saturated" if each["saturated"] else "")
            row = (lower, f"{each['upper']:.2f}", f"{each['ceiling']:.2f}", f"{each['rate']:.2f}")
            bounds.add_row(of, *row)
        parts.append(bounds)
    checks = Table("self-check", title="what must hold", min_width=width)
    checks.add_column("found", justify="right")
    checks.add_column("")
    for check in result["checks"]:
        checks.add_row(check["check"], check["found"], VERDICTS[check["passed"]])
    return Group(*parts, checks)


def mi_summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Rows of `summarize_runs`: nats, mean ± std over seeds."""
    lines = ["nats; mean ± std over seeds; compare on the same images alone, and none that is saturated (>=)"]
    lines += [f"self-check FAILS for {row.runs[0]}: {check}" for row in rows for check in row.failed]
    table = Table("quantity", caption="\n".join(lines))
    for row in rows:
        table.add_column(row.label(), justify="right")
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        cells = []
        for row in rows:
            lower_limit = ">= " if name in row.saturated else ""
            metric = row.metrics.get(name)
            cells.append("" if metric is None else lower_limit + metric.format("{:.2f}".format))
        table.add_row(name, *cells)
    return table
