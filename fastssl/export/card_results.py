"""The results of a model card: for each evaluation the metric that counts, with its interval and its file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fastssl.evaluation.metric_info import metric_info
from fastssl.evaluation.mutual_information import unreliable_quantities
from fastssl.evaluation.ood import summarized_detectors
from fastssl.export.source import EvaluationSummary, MeasuredResult

UNRELIABLE = "not reliable: a self-check failed"


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
    remark = f"chance {info.format(result.chance[name])}" if name in result.chance else ""
    return CardRow(info.label, info.format(result.metrics[name]) + interval, remark)


def _ood_rows(result: MeasuredResult) -> Iterator[CardRow]:
    """Yield the run's own uncertainty, the best score without labels and the best one with labels, as on the screen."""
    sets = {"near": result.near, "far": result.far}
    for name, kinds in summarized_detectors(result.metrics).items():
        found, remarks = [], []
        for group, names in sets.items():
            key = f"{name} {group} auroc"
            if key not in result.metrics:
                continue
            bounds = result.intervals.get(key)
            interval = f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})" if bounds else ""
            found.append(f"{', '.join(names) or group} ({group}): {100 * result.metrics[key]:.1f} %{interval}")
            if bounds and bounds[1] < 0.5:
                remarks.append(f"inverted on {group} sets")
        yield CardRow(f"AUROC of {name}, {', '.join(kinds)}", "; ".join(found), "; ".join(remarks))


def _mi_rows(result: MeasuredResult) -> Iterator[CardRow]:
    doubts = unreliable_quantities(result.failed)
    for name, value in result.metrics.items():
        if re.fullmatch(r"I\([^()]+\) js", name):  # the main estimate
            quantity = name.removesuffix(" js")
            remarks = [UNRELIABLE] if quantity in doubts else []
            remarks += ["saturated: may be much larger"] if name in result.saturated else []
            yield CardRow(quantity, f"at least {value:.2f} nats", "; ".join(remarks))
