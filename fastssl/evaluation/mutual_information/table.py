"""Tables of `fastssl eval mi`: one run with its self-checks, or one column per run."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from fastssl.evaluation.mutual_information.evaluate import MIResult, SelfCheck
from fastssl.evaluation.tables import SummaryRow, plain_table, result_title, table_of_rows, text_lines

VERDICTS = {True: "holds", False: "FAILS", None: "inconclusive (saturated)"}
UNRELIABLE = "UNRELIABLE"
ERRORS = 2  # standard errors above 0 from which on an estimate shows information
LEGEND = (
    "All values are in nats (1 nat = 1.44 bits); 0 means independent. More is not better by itself.",
    "js, mine: two estimators, both lower bounds on held-out images ± standard error. js is the main one, mine that of "
    "the paper (MINE).",
    "ceiling: the largest estimate that so many images allow. saturated: the estimate has reached its limit, and the "
    "true value may be much larger.",
    "H: representation h. Z: embedding z. Z': z of another view of the same image.",
)
BOUNDS_LEGEND = (
    "lower, upper: bounds of the mutual information with the whole image X, from the known q = N(mu, diag sigma^2), "
    "without training. rate: E KL(q || prior), another upper bound.",
)
WORDS = "Every word: docs/glossary.md, section Mutual information."


def mi_table(result: MIResult, verbose: bool = False) -> Group:
    """Show the estimates of one run, the bounds of stochastic embeddings, and the self-checks.

    verbose: show every self-check. Otherwise one line counts them, and only those that fail are named.
    """
    val = result["val"]
    side = result["settings"]["side"]
    parts: list[RenderableType] = [_estimates_table(result)]
    legend = [*LEGEND, f"V: the image averaged to {side} x {side} pixels, so I(V;.) is below that of the whole image."]
    if result["bounds"]:
        parts.append(_bounds_table(result))
        legend += BOUNDS_LEGEND
    if verbose:
        parts.append(_checks_table(result["checks"]))
    parts.append(text_lines([*mi_verdict(result), *checks_in_words(result["checks"])]))
    about = [
        *([] if len(result["quantities"]) > 1 else ["a supervised run has no z"]),
        f"{val['images']:,} images of {val['path']} ({val['layout']} file), seed {result['seed']}",
        f"measured {result['measured_at']}",
    ]
    return Group(*parts, text_lines([*legend, WORDS], style="dim"), text_lines(about, style="dim"))


def affected_quantities(check: str) -> list[str]:
    """Return the quantities whose estimates are unreliable if this self-check fails, such as ["I(V;H)"].

    Two estimates in the wrong order are both in doubt; an estimate above the upper bound of a known q is alone.
    """
    names = re.findall(r"I\([^()]+\)", check)
    return names[:1] if check.endswith("upper bound") else names


def unreliable_quantities(failed: Iterable[str]) -> dict[str, list[str]]:
    """Return the quantities in doubt, each with the self-checks that failed."""
    doubts: dict[str, list[str]] = {}
    for check in failed:
        for quantity in affected_quantities(check):
            doubts.setdefault(quantity, []).append(check)
    return doubts


def mi_verdict(result: MIResult) -> list[str]:
    """Say what the estimates show. They are lower bounds; one that failed a self-check says nothing."""
    doubts = unreliable_quantities(_failed(result["checks"]))
    subjects = {
        "I(V;H)": ("h holds at least {} about the averaged image V", "in h about the averaged image V"),
        "I(V;Z)": ("z holds at least {} about V", "in z about V"),
        "I(H;Z)": ("h and z share at least {}", "that h and z share"),
        "I(Z;Z')": ("the z of two views share at least {}", "that the z of two views share"),
    }
    found, limited = [], []
    for quantity, (words, nothing) in subjects.items():
        if quantity not in result["quantities"] or quantity in doubts:
            continue
        js = result["quantities"][quantity]["js"]
        nats = f"{js['nats']:.2f} ± {js['error']:.2f} nats"
        limited += [quantity] if js["saturated"] else []
        if quantity in result["infinite"]:
            continue
        if js["nats"] > ERRORS * js["error"]:
            found.append(words.format(nats))
        else:
            found.append(f"no information was found {nothing} ({nats} is not above 0)")
    sentences = []
    if found:
        sentence = "; ".join(found)
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    if limited:
        sentences.append(f"Saturated, so not to be compared with anything: {', '.join(limited)}.")
    if unusable := [quantity for quantity in result["quantities"] if quantity in doubts]:
        sentences.append(f"Not reliable, because a self-check failed: {', '.join(unusable)}. Do not use these rows.")
    return sentences


def checks_in_words(checks: Sequence[SelfCheck]) -> list[str]:
    """Count the self-checks in one line, and name those that fail."""
    passed = [check["passed"] for check in checks]
    line = f"{passed.count(True)} of {len(checks)} self-checks hold"
    line += f", {passed.count(False)} fail" if False in passed else ""
    line += f", {passed.count(None)} inconclusive, as an estimate is saturated" if None in passed else ""
    failing = [f"fails: {each['check']} (found {each['found']})" for each in checks if each["passed"] is False]
    return [f"{line}.", *failing]


def mi_summary_table(rows: Sequence[SummaryRow]) -> Group:
    """Show a line per quantity and a column per row of `summarize_runs`, in nats."""
    table = table_of_rows("quantity", "nats", rows, [name for row in rows for name in row.metrics], _summary_cell)
    sentences = [f"{row.short_label()}: self-check FAILS: {check}." for row in rows for check in row.failed]
    lines = [
        "nats; mean ± std over seeds. >=: saturated, at least as large. ?: unreliable, a self-check failed.",
        "Compare only on the same images, and nothing that is saturated or unreliable.",
        WORDS,
    ]
    parts = [text_lines(sentences)] if sentences else []
    return Group(table, *parts, text_lines(lines, style="dim"))


def _estimates_table(result: MIResult) -> Table:
    doubts = unreliable_quantities(_failed(result["checks"]))
    table = plain_table(result_title(result))
    table.add_column("nats", no_wrap=True)
    for heading in ("js", "mine", "ceiling"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("remark", overflow="fold")
    for quantity, estimates in result["quantities"].items():
        shown = {name: estimates[name] for name in ("js", "mine")}
        cells = [f"{each['nats']:.2f} ± {each['error']:.2f}" for each in shown.values()]
        saturated = [name for name, each in shown.items() if each["saturated"]]
        remarks = [f"{UNRELIABLE}: {_number(len(doubts[quantity]))} failed"] if quantity in doubts else []
        remarks += [f"{' and '.join(saturated)} saturated"] if saturated else []
        remarks += ["infinite in theory"] if quantity in result["infinite"] else []
        ceiling = f"{estimates['js']['ceiling']:.2f}"
        table.add_row(quantity, *cells, ceiling, ", ".join(remarks), style="dim" if quantity in doubts else "")
    return table


def _number(checks: int) -> str:
    return "1 self-check" if checks == 1 else f"{checks} self-checks"


def _bounds_table(result: MIResult) -> Table:
    table = plain_table("from the known q")
    table.add_column("nats", overflow="fold")
    for heading in ("lower", "upper", "ceiling", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("remark", overflow="fold")
    for quantity, bound in result["bounds"].items():
        cells = [f"{bound[key]:.2f}" for key in ("lower", "upper", "ceiling", "rate")]
        table.add_row(quantity, *cells, "lower saturated" if bound["saturated"] else "")
    return table


def _checks_table(checks: Sequence[SelfCheck]) -> Table:
    table = plain_table("properties that must hold")
    table.add_column("self-check", overflow="fold")
    table.add_column("found", justify="right")
    table.add_column("result")
    for check in checks:
        table.add_row(check["check"], check["found"], VERDICTS[check["passed"]])
    return table


def _failed(checks: Sequence[SelfCheck]) -> list[str]:
    return [check["check"] for check in checks if check["passed"] is False]


def _summary_cell(row: SummaryRow, name: str) -> str:
    """Format the metric of this name, such as "I(V;H) js"."""
    if name not in row.metrics:
        return ""
    # The bounds of a known q are not estimates, so no self-check concerns them.
    doubtful = name.endswith((" js", " mine")) and name.split(" ")[0] in unreliable_quantities(row.failed)
    sign = ">= " if name in row.saturated else ""
    return sign + row.metrics[name].format("{:.2f}".format) + (" ?" if doubtful else "")
