"""What each metric is called on a screen, its unit, which direction is better, and its value without information."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Whatever the labels are; by the first letters of the name.
CHANCE = {"r_auroc": 0.5, "crop_larger": 0.5, "spearman": 0.0}


@dataclass(frozen=True)
class MetricInfo:
    label: str
    unit: Literal["%", "nats", ""]  # "": a number from -1 to 1
    better: Literal["up", "down", ""]  # "": not known

    def format(self, value: float, with_unit: bool = True) -> str:
        """Format a share in percent, any other value as it is."""
        if self.unit == "%":
            return f"{100 * value:.1f}" + (" %" if with_unit else "")
        return f"{value:.2f}" + (f" {self.unit}" if with_unit and self.unit else "")

    def against_chance(self, low: float, high: float, chance: float) -> str:
        """Return what a 95 % interval says about chance: "chance is 10.0 %", or that the value is not better."""
        if not self.better:
            return f"chance is {self.format(chance)}"
        up = self.better == "up"
        if low > chance if up else high < chance:
            return f"chance is {self.format(chance)}"
        if high < chance if up else low > chance:
            return f"{'below' if up else 'above'} chance ({self.format(chance)})"
        return f"not better than chance ({self.format(chance)})"


INFO = {
    "accuracy": MetricInfo("top-1 accuracy", "%", "up"),
    "accuracy_top5": MetricInfo("top-5 accuracy", "%", "up"),
    "accuracy_macro": MetricInfo("mean accuracy of classes", "%", "up"),
    "ece": MetricInfo("ECE", "%", "down"),
    "ece_scaled": MetricInfo("ECE, scaled", "%", "down"),
    "nll": MetricInfo("NLL", "nats", "down"),
    "nll_scaled": MetricInfo("NLL, scaled", "nats", "down"),
    "r_auroc": MetricInfo("R-AUROC", "%", "up"),
    "recall_at_1": MetricInfo("recall@1", "%", "up"),
    "aurc": MetricInfo("AURC by uncertainty", "%", "down"),
    "e_aurc": MetricInfo("E-AURC by uncertainty", "%", "down"),
    "aurc_confidence": MetricInfo("AURC by confidence", "%", "down"),
    "e_aurc_confidence": MetricInfo("E-AURC by confidence", "%", "down"),
    "spearman_blur": MetricInfo("correlation with blur", "", "up"),
    "spearman_noise": MetricInfo("correlation with noise", "", "up"),
    "spearman_jpeg": MetricInfo("correlation with JPEG", "", "up"),
    "spearman_crop": MetricInfo("correlation with crop", "", "up"),
    "crop_larger": MetricInfo("crops more uncertain", "%", "up"),
}
# Explanations under a table, each for the metrics whose name begins with its key.
EXPLANATIONS = {
    "accuracy": "top-1, top-5: share of test images whose class is the most likely one, or among the five most likely.",
    "accuracy_macro": "mean accuracy of classes: each class counts the same, however many images it has.",
    "ece": "ECE: expected calibration error, the mean difference of confidence and accuracy over 15 bins.",
    "nll": "NLL: negative log-likelihood, the mean of -log(probability of the true class).",
    "ece_scaled": "scaled: after temperature scaling, with a temperature chosen on held-out training images.",
    "accuracy_k": "k: number of neighbors; T: temperature of their votes, exp(similarity / T).",
    "r_auroc": "R-AUROC: how often an image whose nearest neighbor has another class is more uncertain than one whose "
    "neighbor has the same. recall@1: share of images whose nearest neighbor has the same class.",
    "aurc": "AURC: mean error of a linear classifier on the 1, 2, ... least uncertain images. E-AURC: that minus the "
    "AURC of the best possible order. By confidence: ordered by the classifier's own probability.",
    "spearman": "correlation with blur, ...: rank correlation of uncertainty with the strength of the corruption, mean "
    "over images.",
    "crop_larger": "crops more uncertain: share of crops (of N % of the area) that are more uncertain than the image.",
}


def metric_info(name: str) -> MetricInfo:
    """Return what is known about a metric. A name from elsewhere is shown as it is."""
    if found := re.fullmatch(r"accuracy_k(\d+)_t([\d.e+-]+)", name):
        return MetricInfo(f"top-1, k = {found[1]}, T = {found[2]}", "%", "up")
    if found := re.fullmatch(r"crop_larger_(\d+)", name):
        return MetricInfo(f"crops of {found[1]} %", "%", "up")
    return INFO.get(name, MetricInfo(name, "", ""))


def explanations(names: list[str]) -> list[str]:
    """Return what the metrics of these names mean, one line each."""
    return [text for key, text in EXPLANATIONS.items() if any(name.startswith(key) for name in names)]


def chance_levels(values: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Return the values of metrics without any information about the image, as far as they are known.

    Args:
        values: the metrics.
        measured: those that follow from the labels: the field "chance" of a result.
    """
    chance = dict(measured)
    for name in values:
        for key, value in CHANCE.items():
            if name.startswith(key):
                chance[name] = value
    for suffix in ("", "_confidence"):
        area, excess = f"aurc{suffix}", f"e_aurc{suffix}"
        if "accuracy" in values and area in values and excess in values:
            chance[area] = 1 - values["accuracy"]  # the expected error in random order
            chance[excess] = chance[area] - (values[area] - values[excess])
    return {name: value for name, value in chance.items() if name in values}
