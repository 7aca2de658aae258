"""The results of a model card: for each evaluation the metric that counts, with its interval and its file."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastssl.evaluation.metric_info import chance_levels, explanations, metric_info
from fastssl.evaluation.mutual_information import unreliable_quantities
from fastssl.evaluation.ood import summarized_detectors
from fastssl.evaluation.verdict import against_random_order
from fastssl.export.source import EvaluationSummary, MeasuredResult

UNRELIABLE = "not reliable: a self-check failed"
UPPER_BOUND = "chosen on these very images, so its AUROC is an upper bound"
MI_WORDS = "V: the image averaged to a few pixels; H: the representation h; Z: the embedding z; Z': z of another view."


@dataclass(frozen=True)
class CardRow:
    metric: str
    value: str
    remark: str = ""  # such as the name of a set, or why the value is not reliable


def card_rows(summary: EvaluationSummary) -> Iterator[CardRow]:
    """Return the rows of one evaluation."""
    result = summary.result
    if summary.name == "ood":
        yield from _ood_rows(result)
    elif summary.name == "mi":
        yield from _mi_rows(result)
    else:
        yield from (_metric_row(result, name) for name in _headline_metrics(result))


def card_legend(summaries: Sequence[EvaluationSummary]) -> str:
    """Explain in one line the names in the rows of the evaluations."""
    names: list[str] = []
    for summary in summaries:
        if summary.name not in ("ood", "mi"):
            names += _headline_metrics(summary.result)
    # The accuracy of kNN has k and T in its name; "accuracy" explains top-1 already.
    lines = explanations(names)
    lines += [MI_WORDS] if any(summary.name == "mi" for summary in summaries) else []
    return " ".join(lines)


def _headline_metrics(result: MeasuredResult) -> list[str]:
    """Return the accuracy, or what is known of an uncertainty; of other results the first metric."""
    uncertainty = [name for name in result.metrics if name in ("r_auroc", "aurc")]
    if uncertainty:
        return uncertainty
    accuracy = [name for name in result.metrics if name.startswith("accuracy")]
    return (accuracy or list(result.metrics))[:1]


def _metric_row(result: MeasuredResult, name: str) -> CardRow:
    info = metric_info(name)
    bounds = result.intervals.get(name)
    interval = f" ({' to '.join(info.format(bound, with_unit=False) for bound in bounds)})" if bounds else ""
    direction = " (lower is better)" if info.better == "down" else ""
    return CardRow(info.label + direction, info.format(result.metrics[name]) + interval, _chance(result, name))


def _chance(result: MeasuredResult, name: str) -> str:
    """Compare a metric with chance, as the screen does."""
    info = metric_info(name)
    chance = chance_levels(result.metrics, result.chance).get(name)
    if chance is None:
        return ""
    if name == "aurc":
        return f"{against_random_order(result.aurc_minus_error)} {info.format(chance)}"
    low, high = result.intervals.get(name, [result.metrics[name]] * 2)
    words = info.against_chance(low, high, chance)
    return f"inverted: {words}" if name == "r_auroc" and high < chance else words


def _ood_rows(result: MeasuredResult) -> Iterator[CardRow]:
    """Yield the run's own uncertainty, the best score without labels and the best one with labels, as on the screen."""
    sets = {"near": result.near, "far": result.far}
    inverted_on = {
        name: [each for each, found in detector.sets.items() if found.inverted]
        for name, detector in result.detectors.items()
    }
    inverted = [name for name, names in inverted_on.items() if names]
    for name, kinds in summarized_detectors(result.metrics, inverted).items():
        found, remarks = [], []
        for group, names in sets.items():
            key = f"{name} {group} auroc"
            if key not in result.metrics:
                continue
            bounds = result.intervals.get(key)
            interval = f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})" if bounds else ""
            found.append(f"{', '.join(names) or group} ({group}): {100 * result.metrics[key]:.1f} %{interval}")
            if name not in result.detectors and bounds and bounds[1] < 0.5:  # single sets are not known
                remarks.append(f"inverted on {group} sets")
        if inverted_on.get(name):
            remarks.append(f"inverted on {', '.join(inverted_on[name])}: do not use it there")
        if any(kind.startswith("best") for kind in kinds):
            remarks.append(UPPER_BOUND)
        yield CardRow(f"AUROC of {name}, {', '.join(kinds)}", "; ".join(found), "; ".join(remarks))


def _mi_rows(result: MeasuredResult) -> Iterator[CardRow]:
    doubts = unreliable_quantities(result.failed)
    for name, value in result.metrics.items():
        if re.fullmatch(r"I\([^()]+\) js", name):  # the main estimate
            quantity = name.removesuffix(" js")
            remarks = [UNRELIABLE] if quantity in doubts else []
            remarks += ["saturated: may be much larger"] if name in result.saturated else []
            # An estimate that failed a self-check, or is not above 0, bounds nothing.
            bound = "" if quantity in doubts or value <= 0 else "at least "
            yield CardRow(quantity, f"{bound}{value:.2f} nats", "; ".join(remarks))
