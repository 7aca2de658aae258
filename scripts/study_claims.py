"""Read the paper's three claims off the runs of the study, and print them as Markdown.

python scripts/study_claims.py runs/study_cifar10 > records/study/claims.md
python scripts/study_claims.py runs/study_cifar10 --summary    # the table of README.md

The rules below were written when two of the study's 20 runs had ended, so that no result could choose its rule.
Intervals are of 95 %, over seeds and test images, as in reports (`fastssl.reporting.differences`).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.common.errors import UserError
from fastssl.reporting.differences import Difference, mean_difference
from fastssl.reporting.measures import Measure, Values, compare_with_baseline, image_contributions
from fastssl.reporting.report import make_report
from fastssl.reporting.tables import NONE, comparison_table, mean_and_std
from fastssl.reporting.text import cells_as_markdown, markdown_table
from fastssl.reporting.variants import Variant

RULES = {
    "Z-prob matches deterministic embeddings downstream": (
        "Supported if the interval of linear accuracy minus the deterministic one is above -1 point for every "
        "objective; not supported if it is below -1 point for one of them; else undecided."
    ),
    "H-prob loses, because its bottleneck keeps less information": (
        "Not supported if for one objective the interval of linear accuracy minus the deterministic one is above -1 "
        "point, or that of I(V;H) above 0; otherwise supported if both intervals are below 0 for every objective; else "
        "undecided."
    ),
    "The variance detects OOD images, often better than detectors that use labels": (
        "A case is one stochastic variant on near or on far sets. Supported if the AUROC of `sigma_mean` is above 50 "
        "in every case, and above that of MSP, the usual baseline with labels, in at least half of them; not supported "
        "if it is below 50 in one of them, or below that of MSP in more than half; else undecided. Means and "
        "differences in points of AUROC."
    ),
}
MARGIN = 0.01  # of accuracy: a smaller loss counts as a match
DETECTORS = ("sigma_mean", "draws_disagreement", "msp", "energy", "mahalanobis", "mahalanobis_unlabelled")
SUMMARY = {  # titles of measures, and the headings in README.md
    "linear sweep": "linear",
    "kNN k = 20, T = 0.07": "kNN",
    "10 % of the labels": "10 % of labels",
    "I(V;H) js": "I(V;H)",
    "sigma_mean near": "OOD by sigma, near",
    "sigma_mean far": "far",
    "layers_unlabelled near": "OOD by features, near",
    "layers_unlabelled far": "far",
}
UNKNOWN = Difference(math.nan, -math.inf, math.inf, 1.0, 0, 0)  # of fewer than two seeds, or without evaluations
OBJECTIVES = ("barlow_twins", "vicreg")  # that the claims are about
INFORMATION = "I(V;H) js"  # metric and title
Row = list[str]


class Reading(NamedTuple):
    """What the runs say about one claim."""

    claim: str
    verdict: str  # supported, not supported, undecided
    rows: list[Row]  # the first one is the heading


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="run directories, or folders of them")
    arguments.add_argument("--summary", action="store_true", help="print one table of the variants instead")
    options = arguments.parse_args()
    try:
        report = make_report(options.runs)
    except UserError as error:
        sys.exit(str(error))
    if options.summary:
        print(*summary(report.values, report.variants), sep="\n")
        return
    readings = read_claims(report.values, report.variants)
    print(*markdown_table(["claim", "verdict"], [[each.claim, f"**{each.verdict}**"] for each in readings]), sep="\n")
    for each in readings:
        print(f"## {each.claim}: {each.verdict}\n\n{RULES[each.claim]}\n")
        print(*markdown_table(each.rows[0], each.rows[1:]), sep="\n")
    for remark in report.remarks:
        print(f"* {remark}")


def summary(values: Values, variants: Sequence[Variant]) -> list[str]:
    """Return the lines of a Markdown table with a row for each variant, marked as in reports."""
    measures = {title: the_only_measure(values, title) for title in SUMMARY}
    found = {title: measure for title, measure in measures.items() if measure}
    table = comparison_table("", "", "variant", list(found.values()), values, variants)
    return cells_as_markdown(replace(table, columns=[SUMMARY[title] for title in found]))[:-1]


def read_claims(values: Values, variants: Sequence[Variant]) -> list[Reading]:
    """Return the readings of the three claims, in the paper's order."""
    z_prob, h_prob = ([each for each in variants if each.recipe.embedding.stochastic == where] for where in "zh")
    matches, loses, detects = RULES
    return [
        _matches(matches, values, z_prob),
        _loses(loses, values, h_prob),
        _detects(detects, values, [*z_prob, *h_prob]),
    ]


def _matches(claim: str, values: Values, z_prob: Sequence[Variant]) -> Reading:
    linear = [*_to_baseline(values, z_prob, "linear sweep"), *_missing(z_prob)]
    verdict = _verdict(
        supported=all(each.low > -MARGIN for each in linear),
        refuted=any(each.high < -MARGIN for each in linear),
    )
    return Reading(claim, verdict, _comparison(values, z_prob))


def _loses(claim: str, values: Values, h_prob: Sequence[Variant]) -> Reading:
    linear = [*_to_baseline(values, h_prob, "linear sweep"), *_missing(h_prob)]
    information = _to_baseline(values, h_prob, INFORMATION)
    verdict = _verdict(
        supported=all(each.high < 0 for each in [*linear, *information]),
        refuted=any(each.low > -MARGIN for each in linear) or any(each.low > 0 for each in information),
    )
    return Reading(claim, verdict, _comparison(values, h_prob))


def _detects(claim: str, values: Values, stochastic: Sequence[Variant]) -> Reading:
    rows = [["variant", "sets", *DETECTORS, "sigma_mean - 50", "sigma_mean - msp"]]
    missing = 2 * len(OBJECTIVES) - len(stochastic)  # variants: Z-prob and H-prob of each
    above_chance = [UNKNOWN] * (2 * missing)
    above_msp = above_chance.copy()
    for variant in stochastic:
        for where in ("near", "far"):
            by_detector = [the_only_measure(values, f"{detector} {where} auroc") for detector in DETECTORS]
            sigma, msp = by_detector[DETECTORS.index("sigma_mean")], by_detector[DETECTORS.index("msp")]
            above_chance.append(_score_difference(values, variant, sigma, None) if sigma else UNKNOWN)
            above_msp.append(_score_difference(values, variant, sigma, msp) if sigma and msp else UNKNOWN)
            means = [_mean(values, variant, measure) for measure in by_detector]
            rows.append([variant.label, where, *means, _shown(above_chance[-1]), _shown(above_msp[-1])])
    better = sum(each.low > 0 for each in above_msp)
    worse = sum(each.high < 0 for each in above_msp)
    verdict = _verdict(
        supported=len(stochastic) > 0 and all(each.low > 0 for each in above_chance) and 2 * better >= len(above_msp),
        refuted=any(each.high < 0 for each in above_chance) or 2 * worse > len(above_msp),
    )
    return Reading(claim, verdict, rows)


def _verdict(supported: bool, refuted: bool) -> str:
    return "not supported" if refuted else "supported" if supported else "undecided"


def _comparison(values: Values, variants: Sequence[Variant]) -> list[Row]:
    """Return a table of each measure of accuracy, and of I(V;H): deterministic, stochastic, difference."""
    rows = [["measure", *(head for each in variants for head in ("deterministic", each.label, "difference"))]]
    for measure in values:
        if measure.group == "accuracy" or measure.metric == INFORMATION:
            row = [measure.title]
            for variant in variants:
                difference = compare_with_baseline(measure, variant, values[measure]) or UNKNOWN
                row += [_mean(values, each, measure) for each in (variant.baseline, variant)]
                row.append(_shown(difference, 1 if measure.group == "mi" else 100))
            rows.append(row)
    return rows


def the_only_measure(values: Values, metric: str) -> Measure | None:
    """Return the measure of a metric, None without any. Ends the program if there are several, of different images."""
    measures = [measure for measure in values if metric in (measure.metric, measure.title)]
    if len(measures) > 1:
        sys.exit(f"The runs have {metric} of different images, which cannot be averaged: delete the other results.")
    return measures[0] if measures else None


def _to_baseline(values: Values, variants: Sequence[Variant], title: str) -> list[Difference]:
    """Return each variant's difference to its deterministic one, UNKNOWN where there is none to compare."""
    measure = the_only_measure(values, title)
    if measure is None:
        return [UNKNOWN] * len(variants)
    return [compare_with_baseline(measure, variant, values[measure]) or UNKNOWN for variant in variants]


def _missing(variants: Sequence[Variant]) -> list[Difference]:
    """Return UNKNOWN for each objective without a variant: no claim about every objective is then supported."""
    found = {variant.recipe.objective.name for variant in variants}
    return [UNKNOWN for objective in OBJECTIVES if objective not in found]


def _score_difference(values: Values, variant: Variant, measure: Measure, other: Measure | None) -> Difference:
    """Return the difference of two AUROCs of the same runs and images; of the first one to 50 % if `other` is None."""
    own, others = values[measure], values[other] if other else {}
    runs = [run for run in variant.runs if run.dir in own and (other is None or run.dir in others)]
    values_S2 = np.array([[own[run.dir].value, others[run.dir].value if other else 0.5] for run in runs])
    images: list[np.ndarray] = []  # by kind: what each image contributes, as a mean over the runs
    for run in runs:
        parts = image_contributions(measure, run, own[run.dir].result)
        if other:
            theirs = image_contributions(other, run, others[run.dir].result)
            parts = [a - b for a, b in zip(parts, theirs) if len(a) == len(b)]
        if not parts or (images and [len(x) for x in images] != [len(x) for x in parts]):  # scores are missing
            return mean_difference(values_S2, []) or UNKNOWN
        parts = [part / len(runs) for part in parts]
        images = [a + b for a, b in zip(images, parts)] if images else parts
    return mean_difference(values_S2, images) or UNKNOWN


def _mean(values: Values, variant: Variant | None, measure: Measure | None) -> str:
    if variant is None or measure is None:
        return NONE
    found = values[measure]
    return mean_and_std([found[run.dir].value for run in variant.runs if run.dir in found], measure)


def _shown(difference: Difference, factor: float = 100) -> str:
    """Return a difference with its interval and the number of seeds; in points if the values are shares."""
    if difference.seeds == 0:
        return NONE
    mean, low, high = (f"{factor * value:+.{1 if factor == 100 else 2}f}" for value in difference[:3])
    return f"{mean} ({low} to {high}; {difference.seeds} seeds)"


if __name__ == "__main__":
    main()
