"""Print what the variance of each stochastic run is worth for OOD detection, as a Markdown table.

python scripts/sigma_table.py runs/sigma_cifar10 > records/study/sigma.md

AUROC in percent, near / far, of three scores of the embedding's own uncertainty and of two detectors without labels;
rho: rank correlation of sigma_mean with the length of h, over ID images; R-AUROC: does the uncertainty tell which
nearest neighbors are wrong. Values are means over the seeds of a variant.
"""

import statistics
import sys
from pathlib import Path
from typing import cast

from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.reporting.report import make_report
from fastssl.reporting.runs import Run
from fastssl.reporting.text import markdown_table

OWN = ("sigma_mean", "draws_disagreement", "views_sigma")
WITHOUT_LABELS = ("mahalanobis_unlabelled", "layers_unlabelled")


def main() -> None:
    report = make_report([Path(path) for path in sys.argv[1:]])
    heads = ["variant", *OWN, "rho", "R-AUROC", *WITHOUT_LABELS]
    stochastic = [each for each in report.variants if each.recipe.embedding.stochastic != "none"]
    print(*markdown_table(heads, [[each.label, *cells(each.runs)] for each in stochastic]), sep="\n")


def cells(runs: list[Run]) -> list[str]:
    """Return the values of a variant, "–" for those that no run has."""
    ood = [result for run in runs for result in run.results.values() if result["evaluation"] == "ood"]
    uncertainty = [result for run in runs for result in run.results.values() if result["evaluation"] == "uncertainty"]
    detectors = [cast(OODResult, result)["detectors"] for result in ood]

    def aurocs(name: str) -> str:
        found = [each[name] for each in detectors if name in each]
        if not found:
            return "–"
        return " / ".join(mean([100 * each[where]["metrics"]["auroc"] for each in found]) for where in ("near", "far"))

    rho = [each["sigma_mean"]["norm_correlation"] for each in detectors if "sigma_mean" in each]
    r_auroc = [100 * result["metrics"]["r_auroc"] for result in uncertainty if "r_auroc" in result["metrics"]]
    return [*map(aurocs, OWN), mean(rho, digits=2), mean(r_auroc), *map(aurocs, WITHOUT_LABELS)]


def mean(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


if __name__ == "__main__":
    main()
