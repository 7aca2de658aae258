"""Sentences under the OOD table: which detector to use for this run, and whether sigma helps, from the intervals."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, OWN_UNCERTAINTY
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.ood.separation import DetectorResult, SeparationResult
from fastssl.evaluation.tables import SummaryRow, percent

GROUPS: tuple[Literal["near"], Literal["far"]] = ("near", "far")
MOSTLY_LENGTH = 0.8  # rank correlation with the length of h from which on a score is little more than that length
NO_LABELS = "without labels"
LABELS = "with labels of the training images"


@dataclass(frozen=True)
class Candidate:
    """A detector that may be recommended, for one run or for runs that differ in their seed alone."""

    name: str
    mean_auroc: float  # of near and far
    aurocs: str  # in words
    above_chance: dict[str, bool]  # by group
    inverted: list[str]  # sets

    @property
    def useful(self) -> bool:
        """Whether it is inverted on no set, and above chance on near or on far sets."""
        return not self.inverted and any(self.above_chance.values())


def ood_verdict(result: OODResult) -> list[str]:
    """Say which detector to use for this run, and whether sigma helps."""
    rows = result["detectors"]
    candidates = _candidates(result)
    label_free = [each for each in candidates if not rows[each.name]["labels"]]
    label_based = [each for each in candidates if rows[each.name]["labels"]]
    sentences = [_which_to_use(label_free, NO_LABELS) + _overlapping(rows, label_free)]
    if label_based:
        sentences.append(_which_to_use(label_based, LABELS))
    return [*sentences, *_whether_sigma_helps(result, label_free)]


def runs_verdict(rows: Sequence[SummaryRow]) -> list[str]:
    """Say for each row of a table of several runs which detectors to use, by the same rule as for one run."""
    sentences = []
    for row in rows:
        names = [name for name in detectors_of(row.metrics) if not is_of_some_images(name)]
        candidates = [_candidate_of_runs(row, name) for name in names]
        for kind in (NO_LABELS, LABELS):
            if of_kind := [each for each in candidates if (each.name in LABEL_BASED) == (kind == LABELS)]:
                sentences.append(f"{row.short_label()}: {_which_to_use(of_kind, kind)}")
    return sentences


def recommended_detector(result: OODResult) -> str | None:
    """Return the detector without labels that `ood_verdict` says to use, None if it says to use none."""
    best = _best([each for each in _candidates(result) if not result["detectors"][each.name]["labels"]])
    return best.name if best and best.useful else None


def detectors_of(metrics: Iterable[str]) -> list[str]:
    """Return the detectors that metrics such as "energy near auroc" are of."""
    return list(dict.fromkeys(name.split(" ")[0] for name in metrics))


def best_detector(metrics: dict[str, float], names: Sequence[str]) -> str:
    """Return the name with the highest mean of the near and far AUROC, from metrics such as "energy near auroc"."""
    return max(names, key=lambda name: _mean_auroc(metrics, name))


def inverted_sets(row: DetectorResult) -> list[str]:
    return [name for name, found in row["sets"].items() if found["inverted"]]


def group_mean(row: DetectorResult, group: str) -> SeparationResult:
    return row["near"] if group == "near" else row["far"]


def _candidates(result: OODResult) -> list[Candidate]:
    """Return what may be recommended: not JEPA-SCORE, which is of some images only and takes up to a second of each."""
    groups = _groups(result)
    return [
        Candidate(
            name,
            _mean_auroc(result["metrics"], name),
            ", ".join(_auroc(row, group) for group in groups),
            {group: _interval(row, group)[0] > 0.5 for group in groups},
            inverted_sets(row),
        )
        for name, row in result["detectors"].items()
        if not is_of_some_images(name)
    ]


def is_of_some_images(name: str) -> bool:
    """Whether a detector is computed of a part of the images, so that it is not compared with the others."""
    return name in DETECTORS and DETECTORS[name].jacobian_of is not None


def _candidate_of_runs(row: SummaryRow, name: str) -> Candidate:
    """Return a detector's results in several runs: above chance means that the interval of their mean is."""
    found = {group: row.metrics[key] for group in GROUPS if (key := f"{name} {group} auroc") in row.metrics}
    return Candidate(
        name,
        _mean_auroc({key: metric.mean for key, metric in row.metrics.items()}, name),
        ", ".join(f"{group} {metric.format(percent)}" for group, metric in found.items()),
        {group: row.noise(f"{name} {group} auroc")[0] > 0.5 for group in found},
        row.inverted.get(name, []),
    )


def _best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the best of those that are inverted on no set; one that is above chance comes before the others."""
    sound = [each for each in candidates if not each.inverted]
    return max(sound, key=lambda each: (each.useful, each.mean_auroc), default=None)


def _that_is_sound(candidates: Sequence[Candidate], best: Candidate) -> str:
    """Say so if `best` is the best only because others, inverted on some set, do not count."""
    excluded = [each for each in candidates if each.inverted]
    higher = any(each.mean_auroc >= best.mean_auroc for each in excluded)
    only_above_chance = not best.useful and any(any(each.above_chance.values()) for each in excluded)
    return " that is inverted on no set" if higher or only_above_chance else ""


def _which_to_use(candidates: Sequence[Candidate], kind: str) -> str:
    """Name the best of the candidates that are inverted on no set, unless it is not above chance."""
    best = _best(candidates)
    if best is None:
        return f"Every detector {kind} is inverted on some set: use none of them."
    that = _that_is_sound(candidates, best)
    if not best.useful:
        return f"No detector {kind}{that} is above chance (50): the best is {best.name}, {best.aurocs}."
    at_chance = [group for group, above in best.above_chance.items() if not above]
    but = f"; on {at_chance[0]} sets it is not above chance (50)" if at_chance else ""
    if kind == LABELS:
        return f"The best detector {kind}{that} is {best.name}: {best.aurocs}{but}."
    return f"Use {best.name}, the best detector {kind}{that}: {best.aurocs}{but}."


def _overlapping(rows: dict[str, DetectorResult], candidates: Sequence[Candidate]) -> str:
    """Name the other useful detectors whose intervals overlap with those of the best one on near and on far sets."""
    best = _best(candidates)
    if best is None or not best.useful:
        return ""
    groups = list(best.above_chance)
    names = [
        each.name
        for each in candidates
        if each.useful and each != best and not any(_order(rows[each.name], rows[best.name], groups).values())
    ]
    if not names:
        return ""
    joined = ", ".join(names[:2]) + f" and {len(names) - 2} more" if len(names) > 2 else " and ".join(names)
    return f" Its intervals overlap with those of {joined}."


def _whether_sigma_helps(result: OODResult, label_free: Sequence[Candidate]) -> list[str]:
    """Compare the best detector that uses sigma with the best one that does not, and sigma_mean with chance."""
    rows = result["detectors"]
    with_sigma = [each for each in label_free if each.name in DETECTORS and "sigma" in DETECTORS[each.name].arrays()]
    if not with_sigma:
        reason = result["skipped"].get(OWN_UNCERTAINTY, "no detector that uses it was measured")
        return [f"There is no sigma to use: {reason}."]
    own = _best(with_sigma)
    if own is None:
        sentence = "Sigma does not help: every detector that uses it is inverted on some set."
    else:
        sentence = _compare_sigma(rows, own, with_sigma, [each for each in label_free if each not in with_sigma])
        rho = rows[own.name]["norm_correlation"]
        if abs(rho) >= MOSTLY_LENGTH:
            sentence += f" Its score has a rank correlation of {rho:.2f} with the length of h: it mostly measures that."
    if "sigma_mean" not in rows or (own is not None and own.name == "sigma_mean"):
        return [sentence]
    return [sentence, f"sigma_mean alone: {_against_chance(rows['sigma_mean'], _groups(result))}."]


def _compare_sigma(
    rows: dict[str, DetectorResult], own: Candidate, with_sigma: Sequence[Candidate], without: Sequence[Candidate]
) -> str:
    """Compare the best detector with sigma, `own`, with the best one without."""
    found = f"The best detector with sigma{_that_is_sound(with_sigma, own)} is {own.name}: {own.aurocs}"
    found += "" if own.useful else ", not above chance (50)"
    other = _best(without)
    if other is None:
        start = "" if own.useful else "Sigma does not help. "
        return f"{start}{found}. There is no detector without sigma, inverted on no set, to compare it with."
    order = _order(rows[own.name], rows[other.name], list(own.above_chance))
    helps_on = [group for group, sign in order.items() if sign > 0 and own.above_chance[group]]
    if len(helps_on) == len(order):
        verdict = "Sigma helps."
    elif helps_on:
        verdict = f"Sigma helps on {helps_on[0]} sets."
    elif 0 in order.values() and own.useful:
        verdict = "It is not shown that sigma helps."
    else:
        verdict = "Sigma does not help."
    words = {1: "better", 0: "intervals overlap", -1: "worse"}
    compared = ", ".join(f"{words[sign]} on {group}" for group, sign in order.items())
    that = _that_is_sound(without, other)
    return f"{verdict} {found}. Compared with {other.name}, the best without sigma{that}: {compared}."


def _against_chance(row: DetectorResult, groups: Sequence[str]) -> str:
    found = []
    for group in groups:
        low, high = _interval(row, group)
        words = "above chance" if low > 0.5 else "inverted" if high < 0.5 else "at chance"
        found.append(f"{_auroc(row, group)}, {words}")
    return "; ".join(found)


def _order(one: DetectorResult, other: DetectorResult, groups: Sequence[str]) -> dict[str, int]:
    """Return for each group 1 if the interval of `one` is above that of `other`, -1 if below, 0 if they overlap.

    Overlapping intervals do not mean equal detectors: both score the same images, so their difference varies less.
    """
    order = {}
    for group in groups:
        (low, high), (other_low, other_high) = _interval(one, group), _interval(other, group)
        order[group] = 1 if low > other_high else -1 if high < other_low else 0
    return order


def _groups(result: OODResult) -> list[str]:
    return [group for group in GROUPS if result[group]]


def _mean_auroc(metrics: dict[str, float], name: str) -> float:
    found = [metrics[key] for group in GROUPS if (key := f"{name} {group} auroc") in metrics]
    return sum(found) / len(found)


def _interval(row: DetectorResult, group: str) -> list[float]:
    return group_mean(row, group)["intervals"]["auroc"]


def _auroc(row: DetectorResult, group: str) -> str:
    low, high = _interval(row, group)
    return f"{group} {percent(group_mean(row, group)['metrics']['auroc'])} ({percent(low)}-{percent(high)})"
