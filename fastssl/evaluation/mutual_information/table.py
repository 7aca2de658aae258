"""Tables of `fastssl eval mi`: one run with its self-checks, or one column per run."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from fastssl.evaluation.mutual_information.evaluate import MIResult
from fastssl.evaluation.tables import SummaryRow, result_title

VERDICTS = {True: "holds", False: "FAILS", None: "inconclusive: saturated"}


def mi_table(result: MIResult) -> Group:
    """Show the estimates of one run, the bounds of stochastic embeddings, and the self-checks."""
    val = result["val"]
    side = result["settings"]["side"]
    lines = [
        "held-out lower bounds ± standard error of the joint pairs; js: main estimate, mine: the paper's estimator",
        f"saturated: at least as large. V: the image averaged to {side} x {side}, so I(V;.) is below that of the image",
        *([] if len(result["quantities"]) > 1 else ["a supervised run has no z"]),
        f"{val['images']:,} images of {val['path']} ({val['layout']} file), seed {result['seed']}",
        f"measured {result['measured_at']}",
    ]
    title = result_title(result)
    width = max(map(len, [title, *lines]))
    table = Table("nats", title=title, caption="\n".join(lines), min_width=width)
    for heading in ("js", "mine", "ceiling", ""):
        table.add_column(heading, justify="right")
    for quantity, estimates in result["quantities"].items():
        shown = {name: estimates[name] for name in ("js", "mine")}
        cells = [f"{each['nats']:.2f} ± {each['error']:.2f}" for each in shown.values()]
        saturated = [name for name, each in shown.items() if each["saturated"]]
        remarks = [f"{' and '.join(saturated)} saturated"] if saturated else []
        if quantity in result["infinite"]:
            remarks.append("infinite in theory")
        table.add_row(quantity, *cells, f"{estimates['js']['ceiling']:.2f}", ", ".join(remarks))
    parts = [table]
    if result["bounds"]:
        bounds = Table("nats", title="from the known q, without training", min_width=width)
        for heading in ("lower", "upper", "ceiling of lower", "rate E KL(q||p)"):
            bounds.add_column(heading, justify="right")
        for quantity, bound in result["bounds"].items():
            lower = f"{bound['lower']:.2f}" + (" saturated" if bound["saturated"] else "")
            bounds.add_row(quantity, lower, f"{bound['upper']:.2f}", f"{bound['ceiling']:.2f}", f"{bound['rate']:.2f}")
        parts.append(bounds)
    checks = Table("self-check", title="properties that must hold", min_width=width)
    checks.add_column("found", justify="right")
    checks.add_column("")
    for check in result["checks"]:
        checks.add_row(check["check"], check["found"], VERDICTS[check["passed"]])
    return Group(*parts, checks)


def mi_summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Show a line per quantity and a column per row of `summarize_runs`, in nats."""
    lines = ["nats; mean ± std over seeds; compare only on the same images, and nothing that is saturated (>=)"]
    lines += [f"self-check FAILS for {row.runs[0]}: {check}" for row in rows for check in row.failed]
    table = Table("quantity", caption="\n".join(lines))
    for row in rows:
        table.add_column(row.label(), justify="right")
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        cells = []
        for row in rows:
            metric = row.metrics.get(name)
            sign = ">= " if name in row.saturated else ""
            cells.append("" if metric is None else sign + metric.format("{:.2f}".format))
        table.add_row(name, *cells)
    return table
