"""One sentence on a result: what its first metric says, and whether it is better than chance."""

from collections.abc import Sequence

from fastssl.evaluation.metric_info import chance_levels, metric_info
from fastssl.evaluation.results import EvaluationResult


def result_verdict(result: EvaluationResult) -> list[str]:
    """Say in plain words what a result shows. Everything follows from the metrics and their intervals."""
    if result["evaluation"] == "uncertainty":
        return uncertainty_verdict(result)
    return [classification_verdict(result)]


def classification_verdict(result: EvaluationResult) -> str:
    name = headline_metric(result)
    info = metric_info(name)
    frozen = "untrained" if result["weights"] == "untrained" else "frozen"
    subject = f"A linear classifier on the {frozen} encoder"
    if result["evaluation"] == "knn":
        subject = f"A kNN classifier on the {frozen} encoder ({info.label.removeprefix('top-1, ')})"
    elif "folder" in result:
        subject = "The fine-tuned encoder"
    sentence = f"{subject} classifies {with_interval(result, name)} of the test images correctly"
    chance = chance_levels(result["metrics"], result.get("chance", {})).get(name)
    if chance is None:
        return f"{sentence}."
    value = result["metrics"][name]
    low, high = result.get("intervals", {}).get(name, [value, value])
    return f"{sentence}; {info.against_chance(low, high, chance)}."


def uncertainty_verdict(result: EvaluationResult) -> list[str]:
    """Say whether uncertainty predicts wrong neighbors and wrong predictions."""
    score, values = result["settings"]["score"], result["metrics"]
    sentences = []
    if "r_auroc" in values:
        low, high = result["intervals"]["r_auroc"]
        says = (
            "predicts which nearest neighbors are wrong" if low > 0.5 else "does not predict which neighbors are wrong"
        )
        if high < 0.5:
            says = "is inverted: images with a wrong nearest neighbor have less of it"
        sentences.append(f"The {score} {says} (R-AUROC {with_interval(result, 'r_auroc')}; chance is 50 %).")
    else:
        sentences.append("R-AUROC is not defined: the nearest neighbors of all images are right, or all wrong.")
    show = metric_info("aurc").format
    bounds = result.get("aurc_minus_error")
    difference = f" (difference {' to '.join(show(bound, with_unit=False) for bound in bounds)})" if bounds else ""
    sentences.append(
        "If the least uncertain images are answered first, the mean error of a linear classifier over all coverages is "
        f"{with_interval(result, 'aurc')} (AURC), {against_random_order(bounds)} {show(1 - values['accuracy'])}"
        f"{difference}; ordered by its own confidence it is {show(values['aurc_confidence'])}."
    )
    return sentences


def against_random_order(bounds: Sequence[float] | None) -> str:
    """Return how an AURC compares with that of a random order, the error of the classifier.

    bounds: 95 % interval of their difference on the same images. None: not known, as in a result of an older version.
    """
    if bounds is None:
        return "that of a random order"
    low, high = bounds
    return ("below" if high < 0 else "above" if low > 0 else "not different from") + " that of a random order,"


def headline_metric(result: EvaluationResult) -> str:
    """Return the name of the metric that a result is summarized by: the first one."""
    return next(iter(result["metrics"]))


def with_interval(result: EvaluationResult, name: str) -> str:
    """Return a metric with its interval, such as "91.9 % (90.0 to 93.6)"."""
    info = metric_info(name)
    bounds = result.get("intervals", {}).get(name)
    interval = f" ({' to '.join(info.format(bound, with_unit=False) for bound in bounds)})" if bounds else ""
    return info.format(result["metrics"][name]) + interval
