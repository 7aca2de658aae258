"""Print what the variance of each stochastic run is worth for OOD detection, as a Markdown table.

python scripts/sigma_table.py runs/sigma_cifar10 > records/study/sigma.md

AUROC in percent, near / far, of three scores of the embedding's own uncertainty and of two detectors without labels;
rho: rank correlation of sigma_mean with the length of h, over ID images; R-AUROC: does the uncertainty tell which
nearest neighbors are wrong. Mean ± standard deviation over the seeds of a variant; of rho the mean.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import cast

from study_claims import the_only_measure

from fastssl.common.errors import UserError
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.reporting.measures import Values
from fastssl.reporting.report import make_report
from fastssl.reporting.tables import NONE, mean_and_std
from fastssl.reporting.text import markdown_table
from fastssl.reporting.variants import Variant

OWN = ("sigma_mean", "draws_disagreement", "views_sigma")
WITHOUT_LABELS = ("mahalanobis_unlabelled", "layers_unlabelled")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="run directories, or folders of them")
    try:
        report = make_report(arguments.parse_args().runs)
    except UserError as error:
        sys.exit(str(error))
    heads = ["variant", *OWN, "rho", "R-AUROC", *WITHOUT_LABELS]
    stochastic = [each for each in report.variants if each.recipe.embedding.stochastic != "none"]
    print(*markdown_table(heads, [[each.label, *cells(report.values, each)] for each in stochastic]), sep="\n")


def cells(values: Values, variant: Variant) -> list[str]:
    """Return the values of a variant, a dash for those that no run has."""

    def shown(metric: str) -> str:
        measure = the_only_measure(values, metric)
        if measure is None:
            return NONE
        found = values[measure]
        return mean_and_std([found[run.dir].value for run in variant.runs if run.dir in found], measure)

    def aurocs(detector: str) -> str:
        return " / ".join(shown(f"{detector} {where} auroc") for where in ("near", "far"))

    return [*map(aurocs, OWN), _correlation(values, variant), shown("r_auroc"), *map(aurocs, WITHOUT_LABELS)]


def _correlation(values: Values, variant: Variant) -> str:
    """Return the mean rank correlation of sigma_mean with the length of h."""
    if measure := the_only_measure(values, "sigma_mean near auroc"):
        found = values[measure]
        results = [cast(OODResult, found[run.dir].result) for run in variant.runs if run.dir in found]
        if results:
            return f"{statistics.fmean(each['detectors']['sigma_mean']['norm_correlation'] for each in results):.2f}"
    return NONE


if __name__ == "__main__":
    main()
