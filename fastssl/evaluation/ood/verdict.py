"""Sentences under the OOD table: which score to use for this run, and whether sigma helps, from the intervals."""

from collections.abc import Iterable, Sequence
from typing import Literal

from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, OWN_UNCERTAINTY
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.ood.separation import DetectorResult, SeparationResult
from fastssl.evaluation.tables import SummaryRow, percent

GROUPS: tuple[Literal["near"], Literal["far"]] = ("near", "far")
MOSTLY_LENGTH = 0.8  # rank correlation with the length of h from which on a score is little more than that length


def ood_verdict(result: OODResult) -> list[str]:
    """Say which score to use for this run, and whether sigma helps."""
    rows = result["detectors"]
    groups = [group for group in GROUPS if result[group]]
    label_free = [name for name, row in rows.items() if not row["labels"]]
    sound = [name for name in label_free if not inverted_sets(rows[name])]
    sentences = []
    if sound:
        best = best_detector(result["metrics"], sound)
        sentences.append(_which_to_use(rows, groups, best, sound))
    else:
        sentences.append("No score without labels is right on every set: use none of them for this run.")
    if label_based := [name for name in rows if name in LABEL_BASED]:
        best = best_detector(result["metrics"], label_based)
        sentences.append(f"With labels of the training images, the best is {best}: {_aurocs(rows[best], groups)}.")
    return [*sentences, *_whether_sigma_helps(result, groups, label_free)]


def runs_verdict(rows: Sequence[SummaryRow]) -> list[str]:
    """Say for each row of a table of several runs which score without labels is the best on average."""
    sentences = []
    for row in rows:
        means = {name: metric.mean for name, metric in row.metrics.items()}
        label_free = [name for name in detectors_of(means) if name not in LABEL_BASED]
        if label_free:
            best = best_detector(means, label_free)
            found = [f"{group} {percent(means[key])}" for group in GROUPS if (key := f"{best} {group} auroc") in means]
            sentences.append(f"{row.short_label()}: the best score without labels is {best} ({', '.join(found)}).")
    return sentences


def detectors_of(metrics: Iterable[str]) -> list[str]:
    """Return the detectors that metrics such as "energy near auroc" are of."""
    return list(dict.fromkeys(name.split(" ")[0] for name in metrics))


def best_detector(metrics: dict[str, float], names: Sequence[str]) -> str:
    """Return the name with the highest mean of the near and far AUROC, from metrics such as "energy near auroc"."""

    def mean_auroc(name: str) -> float:
        found = [metrics[key] for group in GROUPS if (key := f"{name} {group} auroc") in metrics]
        return sum(found) / len(found)

    return max(names, key=mean_auroc)


def inverted_sets(row: DetectorResult) -> list[str]:
    return [name for name, found in row["sets"].items() if found["inverted"]]


def _which_to_use(rows: dict[str, DetectorResult], groups: Sequence[str], best: str, sound: Sequence[str]) -> str:
    """Name the best of the scores without labels, and those that are as good within the intervals."""
    at_chance = [group for group in groups if _interval(rows[best], group)[0] <= 0.5]
    if at_chance == groups:
        return f"No score without labels is above chance (50): the best is {best}, {_aurocs(rows[best], groups)}."
    equal = [name for name in sound if name != best and not any(_order(rows[name], rows[best], groups))]
    sentence = f"Use {best}, the best score without labels: {_aurocs(rows[best], groups)}"
    if at_chance:
        sentence += f"; on {at_chance[0]} sets it is not above chance (50)"
    if equal:
        more = f" and {len(equal) - 2} more are" if len(equal) > 2 else " are" if len(equal) == 2 else " is"
        joined = (", " if len(equal) > 2 else " and ").join(equal[:2])
        sentence += f". Within the intervals, {joined}{more} as good"
    return sentence + "."


def _whether_sigma_helps(result: OODResult, groups: Sequence[str], label_free: Sequence[str]) -> list[str]:
    """Compare the best score that uses sigma with the best one that does not, and sigma_mean with chance."""
    rows = result["detectors"]
    with_sigma = [name for name in label_free if name in DETECTORS and "sigma" in DETECTORS[name].arrays()]
    without = [name for name in label_free if name not in with_sigma]
    if not with_sigma:
        reason = result["skipped"].get(OWN_UNCERTAINTY, "no score that uses it was measured")
        return [f"There is no sigma to use: {reason}."]
    own = best_detector(result["metrics"], with_sigma)
    sentence = f"The best score that uses it is {own}: {_aurocs(rows[own], groups)}"
    if without:
        other = best_detector(result["metrics"], without)
        order = _order(rows[own], rows[other], groups)
        sentence = f"{_sigma_in_words(order, groups)} {sentence}, {_compared(order, groups, other)}"
    sentence += "."
    if inverted := inverted_sets(rows[own]):
        sentence += f" It is inverted on {', '.join(inverted)}."
    rho = rows[own]["norm_correlation"]
    if abs(rho) >= MOSTLY_LENGTH:
        sentence += f" Its rank correlation with the length of h is {rho:.2f}: it mostly measures that length."
    sentences = [sentence]
    if "sigma_mean" in rows and own != "sigma_mean":
        sentences.append(f"sigma_mean alone: {_against_chance(rows['sigma_mean'], groups)}.")
    return sentences


def _sigma_in_words(order: Sequence[int], groups: Sequence[str]) -> str:
    better = [group for group, sign in zip(groups, order, strict=True) if sign > 0]
    if not better:
        return "Sigma does not help."
    return "Sigma helps." if min(order) >= 0 else f"Sigma helps on {better[0]} sets only."


def _compared(order: Sequence[int], groups: Sequence[str], other: str) -> str:
    words = {1: "better than", 0: "as good within the intervals as", -1: "worse than"}
    if len(set(order)) == 1:
        return f"{words[order[0]]} {other}" + (" on both" if len(groups) == 2 else "")
    return " and ".join(f"{words[sign]} {other} on {group}" for group, sign in zip(groups, order, strict=True))


def _against_chance(row: DetectorResult, groups: Sequence[str]) -> str:
    found = []
    for group in groups:
        low, high = _interval(row, group)
        words = "above chance" if low > 0.5 else "inverted" if high < 0.5 else "at chance"
        found.append(f"{_auroc(row, group)}, {words}")
    return "; ".join(found)


def _order(one: DetectorResult, other: DetectorResult, groups: Sequence[str]) -> list[int]:
    """Return for each group 1 if `one` is better beyond the intervals, -1 if it is worse, else 0."""
    signs = []
    for group in groups:
        (low, high), (other_low, other_high) = _interval(one, group), _interval(other, group)
        signs.append(1 if low > other_high else -1 if high < other_low else 0)
    return signs


def group_mean(row: DetectorResult, group: str) -> SeparationResult:
    return row["near"] if group == "near" else row["far"]


def _interval(row: DetectorResult, group: str) -> list[float]:
    return group_mean(row, group)["intervals"]["auroc"]


def _auroc(row: DetectorResult, group: str) -> str:
    low, high = _interval(row, group)
    return f"{group} {percent(group_mean(row, group)['metrics']['auroc'])} ({percent(low)}-{percent(high)})"


def _aurocs(row: DetectorResult, groups: Sequence[str]) -> str:
    return ", ".join(_auroc(row, group) for group in groups)
