"""Read the paper's three claims off the runs of the study, and print them as Markdown.

python scripts/study_claims.py runs/study_cifar10 > records/study/claims.md

The rules below were written when two of the study's 20 runs had ended, so that no result could choose its rule.
Intervals are of 95 %, over seeds and test images, as in reports (`fastssl.reporting.differences`).
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.reporting.differences import Difference, mean_difference
from fastssl.reporting.measures import Measure, Values, compare_with_baseline, image_contributions
from fastssl.reporting.report import make_report
from fastssl.reporting.tables import mean_and_std
from fastssl.reporting.text import markdown_table
from fastssl.reporting.variants import Variant

RULES = {
    "Z-prob matches deterministic embeddings downstream": (
        "Supported if the interval of linear accuracy minus the deterministic one is above -1 point for every "
        "objective; not supported if it is below -1 point for one of them; else undecided."
    ),
    "H-prob loses, because its bottleneck keeps less information": (
        "Supported if the intervals of linear accuracy and of I(V;H), both minus the deterministic ones, are below 0 "
        "for every objective; not supported if for one of them that of the accuracy is above -1 point or that of "
        "I(V;H) above 0; else undecided."
    ),
    "The variance detects OOD images, often better than detectors that use labels": (
        "A case is one stochastic variant on near or on far sets. Supported if the AUROC of `sigma_mean` is above 50 "
        "in every case, and above that of MSP, the usual baseline with labels, in at least half of them; not supported "
        "if it is below 50 in one of them, or below that of MSP in more than half; else undecided."
    ),
}
MARGIN = 0.01  # of accuracy: a smaller loss counts as a match
DETECTORS = ("sigma_mean", "draws_disagreement", "msp", "energy", "mahalanobis", "mahalanobis_unlabelled")
UNKNOWN = Difference(math.nan, -math.inf, math.inf, 1.0, 0, 0)  # of fewer than two seeds
Row = list[str]


class Reading(NamedTuple):
    """What the runs say about one claim."""

    claim: str
    verdict: str  # supported, not supported, undecided
    rows: list[Row]  # the first one is the heading


def main() -> None:
    report = make_report([Path(path) for path in sys.argv[1:]])
    readings = read_claims(report.values, report.variants)
    print(*markdown_table(["claim", "verdict"], [[each.claim, f"**{each.verdict}**"] for each in readings]), sep="\n")
    for each in readings:
        print(f"## {each.claim}: {each.verdict}\n\n{RULES[each.claim]}\n")
        print(*markdown_table(each.rows[0], each.rows[1:]), sep="\n")


def read_claims(values: Values, variants: Sequence[Variant]) -> list[Reading]:
    """Return the readings of the three claims, in the paper's order."""
    z_prob, h_prob = (
        [each for each in variants if each.recipe.embedding.stochastic == where and each.baseline] for where in "zh"
    )
    if not z_prob or not h_prob:
        raise SystemExit("The claims are about Z-prob, H-prob and deterministic runs: give runs of all three.")
    matches, loses, detects = RULES
    return [
        _matches(matches, values, z_prob),
        _loses(loses, values, h_prob),
        _detects(detects, values, [*z_prob, *h_prob]),
    ]


def _matches(claim: str, values: Values, z_prob: Sequence[Variant]) -> Reading:
    linear = _to_baseline(values, z_prob, "linear sweep")
    verdict = _verdict(
        supported=all(each.low > -MARGIN for each in linear),
        refuted=any(each.high < -MARGIN for each in linear),
    )
    return Reading(claim, verdict, _comparison(values, z_prob))


def _loses(claim: str, values: Values, h_prob: Sequence[Variant]) -> Reading:
    linear = _to_baseline(values, h_prob, "linear sweep")
    information = _to_baseline(values, h_prob, "I(V;H) js")
    verdict = _verdict(
        supported=all(each.high < 0 for each in [*linear, *information]),
        refuted=any(each.low > -MARGIN for each in linear) or any(each.low > 0 for each in information),
    )
    return Reading(claim, verdict, _comparison(values, h_prob))


def _detects(claim: str, values: Values, stochastic: Sequence[Variant]) -> Reading:
    of_metric = {measure.metric: measure for measure in values if measure.group == "ood"}
    rows = [["variant", "sets", *DETECTORS, "sigma_mean - 50", "sigma_mean - msp"]]
    above_chance, above_msp = [], []
    for variant in stochastic:
        for where in ("near", "far"):
            sigma, msp = (of_metric[f"{detector} {where} auroc"] for detector in ("sigma_mean", "msp"))
            above_chance.append(_score_difference(values, variant, sigma, None))
            above_msp.append(_score_difference(values, variant, sigma, msp))
            means = [_mean(values, variant, of_metric[f"{detector} {where} auroc"]) for detector in DETECTORS]
            rows.append([variant.label, where, *means, _shown(above_chance[-1], sigma), _shown(above_msp[-1], sigma)])
    better = sum(each.low > 0 for each in above_msp)
    worse = sum(each.high < 0 for each in above_msp)
    verdict = _verdict(
        supported=all(each.low > 0 for each in above_chance) and 2 * better >= len(above_msp),
        refuted=any(each.high < 0 for each in above_chance) or 2 * worse > len(above_msp),
    )
    return Reading(claim, verdict, rows)


def _verdict(supported: bool, refuted: bool) -> str:
    return "not supported" if refuted else "supported" if supported else "undecided"


def _comparison(values: Values, variants: Sequence[Variant]) -> list[Row]:
    """Return a table of each measure of accuracy, and of I(V;H): deterministic, stochastic, difference."""
    heads = [head for each in variants for head in (_baseline(each).label, each.label, "difference")]
    rows = [["measure", *heads]]
    for measure in values:
        if measure.group == "accuracy" or measure.metric == "I(V;H) js":
            cells = [
                cell for each, difference in zip(variants, _to_baseline(values, variants, measure.title))
                for cell in (
                    _mean(values, _baseline(each), measure), _mean(values, each, measure), _shown(difference, measure)
                )
            ]  # fmt: skip
            rows.append([measure.title, *cells])
    return rows


def _baseline(variant: Variant) -> Variant:
    assert variant.baseline is not None
    return variant.baseline


def _to_baseline(values: Values, variants: Sequence[Variant], title: str) -> list[Difference]:
    """Return each variant's difference to its deterministic one."""
    (measure,) = [measure for measure in values if measure.title == title]
    return [compare_with_baseline(measure, variant, values[measure]) or UNKNOWN for variant in variants]


def _score_difference(values: Values, variant: Variant, measure: Measure, other: Measure | None) -> Difference:
    """Return the difference of two AUROCs of the same runs and images; of the first one to 50 % if `other` is None."""
    own, others = values[measure], values[other] if other else {}
    runs = [run for run in variant.runs if run.dir in own]
    values_S2 = np.array([[own[run.dir].value, others[run.dir].value if other else 0.5] for run in runs])
    images: list[np.ndarray] = []  # by kind: what each image contributes, as a mean over the runs
    for run in runs:
        parts = image_contributions(measure, run, own[run.dir].result)
        if other:
            parts = [a - b for a, b in zip(parts, image_contributions(other, run, others[run.dir].result))]
        if not parts:  # the run has no scores of images
            return mean_difference(values_S2, []) or UNKNOWN
        parts = [part / len(runs) for part in parts]
        images = [a + b for a, b in zip(images, parts)] if images else parts
    return mean_difference(values_S2, images) or UNKNOWN


def _mean(values: Values, variant: Variant, measure: Measure) -> str:
    found = values[measure]
    return mean_and_std([found[run.dir].value for run in variant.runs if run.dir in found], measure)


def _shown(difference: Difference, measure: Measure) -> str:
    if difference is UNKNOWN:
        return "–"
    mean, low, high = (measure.info.format(value, with_unit=False) for value in difference[:3])
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
