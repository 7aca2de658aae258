"""One sentence on a result: what its first metric says, and whether it is better than chance."""

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
    value = with_interval(result, name)
    frozen = "untrained" if result["weights"] == "untrained" else "frozen"
    subject = f"A linear classifier on the {frozen} encoder"
    if result["evaluation"] == "knn":
        subject = f"A kNN classifier on the {frozen} encoder ({info.label.removeprefix('top-1, ')})"
    elif "folder" in result:
        subject = "The fine-tuned encoder"
    sentence = f"{subject} classifies {value} of the test images correctly"
    chance = chance_levels(result).get(name)
    if chance is None:
        return f"{sentence}."
    low = result.get("intervals", {}).get(name, [result["metrics"][name]])[0]
    compared = "; chance is" if low > chance else ", not better than chance:"
    return f"{sentence}{compared} {info.format(chance)}."


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
    low, high = result["intervals"]["aurc"]
    error = 1 - values["accuracy"]
    compared = "below" if high < error else "above" if low > error else "not different from"
    sentences.append(
        f"Answering the least uncertain images first, a linear classifier errs on {with_interval(result, 'aurc')} "
        f"(AURC), {compared} the {metric_info('aurc').format(error)} of a random order; ordered by its own confidence "
        f"{metric_info('aurc').format(values['aurc_confidence'])}."
    )
    return sentences


def headline_metric(result: EvaluationResult) -> str:
    """Return the name of the metric that a result is summarized by: the first one."""
    return next(iter(result["metrics"]))


def with_interval(result: EvaluationResult, name: str) -> str:
    """Return a metric with its interval, such as "91.9 % (90.0 to 93.6)"."""
    info = metric_info(name)
    bounds = result.get("intervals", {}).get(name)
    interval = f" ({' to '.join(info.format(bound, with_unit=False) for bound in bounds)})" if bounds else ""
    return info.format(result["metrics"][name]) + interval
