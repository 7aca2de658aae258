"""`fastssl eval ood`: every detector that a run allows, on one set of ID images and several of others."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import progress
from fastssl.evaluation.features import (
    CACHE_VERSION,
    Features,
    cached_features,
    eval_input,
    in_fp32,
    load_or_compute_features,
    valid_rows,
)
from fastssl.evaluation.linear import LinearClassifier, fit_lbfgs
from fastssl.evaluation.linear.lbfgs import PENALTIES
from fastssl.evaluation.metrics import LEVEL, RESAMPLES
from fastssl.evaluation.ood import distances, label_based, label_free, plots
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, detector
from fastssl.evaluation.ood.separation import bootstrap_metrics, metrics, resample
from fastssl.evaluation.ood.suites import Sets
from fastssl.evaluation.results import load_or_compute
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.models import Classifier, Model
from fastssl.models.ssl_model import evaluating
from fastssl.views import describe_eval_transform

FEWEST_INVERTED = 30  # images a side: of fewer, resamples vary too little to say "significantly"
SUMMARIZED = ("auroc", "fpr95_id_positive")  # of the means over near and over far sets, what a summary of runs shows
CONSTANTS = {
    "k": label_free.K,
    "posteriors": label_free.POSTERIORS,
    "k_posteriors": label_free.K_POSTERIORS,
    "draws": label_free.DRAWS,
    "clusters": label_free.CLUSTERS,
    "variance_kept": label_free.VARIANCE_KEPT,
    "gen": [label_based.GEN_GAMMA, label_based.GEN_CLASSES],
    "react_share": label_based.REACT_PERCENTILE,
    "odin": [label_based.ODIN_TEMPERATURE, label_based.ODIN_STEP],
    "ridge": distances.RIDGE,
    "fewest_inverted": FEWEST_INVERTED,
    "resamples": RESAMPLES,
    "features": CACHE_VERSION,
}


@dataclass(frozen=True)
class Arrays:
    """What detectors take of one set of images."""

    features: Features
    logits_NC: np.ndarray | None
    pair_h_N2D: np.ndarray | None = None  # of two augmented views
    odin_logits_NC: np.ndarray | None = None

    def of(self, name: str) -> dict:
        """The arrays that a detector of this name takes for its own."""
        return {
            "features": self.pair_h_N2D if name == "views_disagreement" else self.features.h,
            "logits": self.odin_logits_NC if name == "odin" else self.logits_NC,
            "sigma": self.features.sigma,
            "mu": self.features.mu,
        }


def evaluate_ood(encoder: RunEncoder, sets: Sets, *, seed: int = 0) -> dict:
    """Fit every detector on sets.fit, score all images, and compare; kept in RUN/eval/ood-NAME.json, with the scores
    and pictures beside it. Returns what that file holds.

    The detectors' settings are constants and their directions declared: nothing is chosen, on whatever data. Logits
    are the run's own for a supervised run, else those of a linear classifier (L-BFGS) on sets.fit. seed: of that
    classifier's split and of the resamples behind the intervals.
    """
    name = f"ood-{sets.name}{encoder.suffix}"

    def measure() -> dict:
        of_fit = cached_features(encoder, sets.fit)
        left_out = unusable(encoder.model, of_fit.label)
        names = [each for each in DETECTORS if each not in left_out]
        classifier = linear_classifier(encoder, of_fit, seed) if set(names) & set(LABEL_BASED) else None
        fit_arrays = Arrays(of_fit, logits_of(of_fit, classifier))
        arrays = {"id": arrays_of(encoder, sets.id, classifier, names)}
        arrays |= {other: arrays_of(encoder, data, classifier, names) for other, data in sets.others.items()}
        scores = {}
        with progress("Detectors", len(names), "detectors") as advance:
            for each in names:
                fitted = detector(each, prior=prior_of(encoder.model), classifier=classifier, device=encoder.device)
                labels = of_fit.label if each in LABEL_BASED else None
                try:
                    fitted.fit(labels=labels, **fit_arrays.of(each))
                    scores[each] = {part: fitted.score(**x.of(each)) for part, x in arrays.items()}
                except ValueError as error:  # it is undefined on these images; the others are not
                    left_out[each] = str(error)
                advance(1)
        keep_scores(encoder, name, scores, {part: x.features.index for part, x in arrays.items()})
        norm_N = np.linalg.norm(arrays["id"].features.h.astype(np.float64), axis=1)
        compared = compare(scores, sets, norm_N, seed)
        plots.draw(encoder.run_dir / "eval", name, scores, compared, sets)
        return {**compared, "skipped": left_out, "scores": f"{name}.scores.npz"}

    request = {
        "evaluation": "ood",
        "protocol": "detectors with constant settings and declared directions, fitted on training images",
        "settings": {**CONSTANTS, "pytorch_ood": label_based.pytorch_ood_version()},
        "augmentation": encoder.recipe.views.model_dump(mode="json"),  # views_disagreement is of two such views
        "seed": seed,
        **encoder.describe(),
        **sets.describe(),
    }
    return load_or_compute(encoder.run_dir, name, request, measure)


def unusable(model: Model, label_N: np.ndarray) -> dict[str, str]:
    """{detector: why it has nothing to work on}, with training images of these labels."""
    supervised = isinstance(model, Classifier)
    count_C = np.unique(label_N, return_counts=True)[1]
    labelled = label_N.min() >= 0 and len(count_C) > 1 and count_C.max() > 1
    why = {}
    for name, kind in DETECTORS.items():
        takes = kind.fit_arrays() | kind.score_arrays()
        if {"mu", "sigma"} & takes and not len(model.heads):
            why[name] = "the embedding is deterministic"
        elif kind.needs_supervised_encoder and not supervised:
            why[name] = "the encoder was trained without labels"
        elif not labelled and ("labels" in takes or ("logits" in takes and not supervised)):
            why[name] = "the images fitted on have no labels of two classes"
        elif kind.needs_pytorch_ood and label_based.pytorch_ood_version() is None:
            why[name] = "needs pytorch-ood: pip install pytorch-ood"
    return why


def prior_of(model: Model):
    """The prior of the embedding that `embed` gives: of h where that is stochastic, else of z."""
    spaces = [space for space in ("h", "z") if space in model.priors]
    return model.priors[spaces[0]] if spaces else None


def linear_classifier(encoder: RunEncoder, of_fit: Features, seed: int) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) on h, float64."""
    if isinstance(encoder.model, Classifier):
        head = encoder.model.classifier
        return head.weight.detach().double(), head.bias.detach().double()
    with progress("Logistic regressions", len(PENALTIES) + 1, "fits") as advance:
        fitted = fit_lbfgs(of_fit.h, of_fit.label, seed=seed, device=encoder.device, advance=advance)
    return affine(fitted.classifier)


def affine(classifier: LinearClassifier) -> tuple[Tensor, Tensor]:
    """A classifier of standardised features as one of the features themselves, float64."""
    weight_CD = classifier.weight_CD.double() / classifier.std_D.double()
    return weight_CD, classifier.bias_C.double() - weight_CD @ classifier.mean_D.double()


def logits_of(features: Features, classifier: tuple[Tensor, Tensor] | None) -> np.ndarray | None:
    if classifier is None:
        return None
    weight_CD, bias_C = (x.cpu().numpy() for x in classifier)
    return features.h.astype(np.float64) @ weight_CD.T + bias_C


def arrays_of(
    encoder: RunEncoder, data: BetonSubset, classifier: tuple[Tensor, Tensor] | None, names: list[str]
) -> Arrays:
    """All that is scored of one file: from RUN/features/, or made now."""
    features = cached_features(encoder, data)
    pair_h_N2D = cached_features(encoder, data, augmented=True).h
    odin_logits_NC = odin_logits(encoder, data, classifier) if "odin" in names else None
    return Arrays(features, logits_of(features, classifier), pair_h_N2D, odin_logits_NC)


def odin_logits(encoder: RunEncoder, data: BetonSubset, classifier: tuple[Tensor, Tensor]) -> np.ndarray:
    """(N, C): logits of ODIN's perturbed images, kept in RUN/features/ as features are."""
    depends_on = {
        "view": describe_eval_transform(encoder.recipe.views),
        "odin": [*CONSTANTS["odin"], label_based.pytorch_ood_version()],
        "classifier": [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in classifier],
    }

    def compute(loader, advance) -> Iterator[Features]:
        return perturbed(encoder, loader, classifier, advance)

    return load_or_compute_features(encoder, data, depends_on, f"ODIN on {data.path}", compute).h


def perturbed(encoder: RunEncoder, loader, classifier: tuple[Tensor, Tensor], advance) -> Iterator[Features]:
    """Batch by batch, with the logits in the place of h."""
    model, views = encoder.model, encoder.recipe.views
    make_input = eval_input(views)
    weight_CD, bias_C = (x.float() for x in classifier)

    def with_gradients(images: Tensor) -> Tensor:
        """The logits, by way of h as `embed` gives it."""
        h = model.encoder(images)
        return F.linear(model.heads["h"](h).mu if "h" in model.heads else h, weight_CD, bias_C)

    with evaluating(model):
        for batch in loader:
            with in_fp32(batch.image.device):
                images = make_input(batch)
                moved = label_based.perturb_for_odin(with_gradients, images, views.std)
                with torch.no_grad():
                    logits = with_gradients(moved)
            features = Features(
                valid_rows(logits, batch), valid_rows(batch.label, batch), valid_rows(batch.index, batch)
            )
            yield features
            advance(len(features.label))


def compare(scores: dict[str, dict[str, np.ndarray]], sets: Sets, id_norm_N: np.ndarray, seed: int) -> dict:
    """scores: by detector, of "id" and of each other set. Figures of each detector on each set, and means over sets.

    Intervals are 95 %, over resampled images of both sides. `inverted`: the interval of AUROC lies below one half, and
    no side has fewer than 30 images, so the opposite direction would be right. norm_correlation: Spearman's, of the
    score with the length of h, over the ID images: near 1 or -1, the score says little else.
    """
    id_rows_RN = resample(len(id_norm_N), [seed, 0])
    groups = {"near": list(sets.near), "far": list(sets.far)}
    drawn = {
        other: resample(len(next(iter(scores.values()))[other]), [seed, 1 + place])
        for place, other in enumerate(sets.others)
    }
    size = {other: min(rows_RM.shape[1], len(id_norm_N)) for other, rows_RM in drawn.items()}
    table, figures, intervals = {}, {}, {}
    with progress("Intervals", len(scores), "detectors") as advance:
        for name, of in scores.items():
            resampled = {other: bootstrap_metrics(of["id"], of[other], id_rows_RN, drawn[other]) for other in drawn}
            each = {other: metrics(of["id"], of[other]) for other in drawn}
            table[name] = {
                "labels": name in LABEL_BASED,
                "norm_correlation": correlation(of["id"], id_norm_N),
                "sets": {other: entry(each[other], resampled[other], size[other]) for other in drawn},
            }
            for group, others in groups.items():
                if others:
                    mean = {key: float(np.mean([each[other][key] for other in others])) for key in each[others[0]]}
                    means = {key: np.mean([resampled[other][key] for other in others], axis=0) for key in mean}
                    table[name][group] = entry(mean, means, min(size[other] for other in others))
                    for key in SUMMARIZED:
                        figures[f"{name} {group} {key}"] = mean[key]
                        intervals[f"{name} {group} {key}"] = table[name][group]["intervals"][key]
            advance(1)
    return {"detectors": table, "metrics": figures, "intervals": intervals}


def entry(figures: dict[str, float], resampled: dict[str, np.ndarray], images: int) -> dict:
    """images: of the smallest set."""
    intervals = {key: np.percentile(values, LEVEL).tolist() for key, values in resampled.items()}
    inverted = intervals["auroc"][1] < 0.5 and images >= FEWEST_INVERTED
    return {"metrics": figures, "intervals": intervals, "inverted": inverted}


def correlation(score_N: np.ndarray, norm_N: np.ndarray) -> float:
    """Spearman's; 0 where one of them is constant."""
    if np.ptp(score_N) == 0 or np.ptp(norm_N) == 0:
        return 0.0
    return float(spearmanr(score_N, norm_N).statistic)


def keep_scores(encoder: RunEncoder, name: str, scores: dict, indices: dict[str, np.ndarray]) -> None:
    """RUN/eval/NAME.scores.npz: SET/DETECTOR and SET/index, in the order of the file."""
    arrays = {f"{part}/index": index for part, index in indices.items()}
    arrays |= {f"{part}/{each}": score for each, parts in scores.items() for part, score in parts.items()}
    path = encoder.run_dir / "eval" / f"{name}.scores.npz"

    def write(beside):
        with open(beside, "wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **arrays)

    with explain_write_errors(path):
        write_atomically(path, write)
