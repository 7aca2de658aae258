"""`fastssl eval ood`: fit all detectors that a run supports, score ID and OOD images, and compare the scores."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
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
from fastssl.evaluation.metrics import RESAMPLES
from fastssl.evaluation.ood import distances, label_based, label_free, plots
from fastssl.evaluation.ood.base import LinearHead
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, detector
from fastssl.evaluation.ood.separation import MIN_INVERTED, DetectorResult, compare
from fastssl.evaluation.ood.suites import OODSets, SetDescription
from fastssl.evaluation.results import EvaluationResult, load_or_compute
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import BetonLoader
from fastssl.models import Classifier, Model
from fastssl.models.gaussian import Prior
from fastssl.models.ssl_model import evaluating
from fastssl.views import describe_eval_transform

# All that scores and intervals depend on, recorded in the result.
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
    "min_inverted": MIN_INVERTED,
    "resamples": RESAMPLES,
    "features": CACHE_VERSION,
}


class OODResult(EvaluationResult):
    """RUN/eval/ood-NAME.json."""

    near: dict[str, SetDescription]
    far: dict[str, SetDescription]
    detectors: dict[str, DetectorResult]
    skipped: dict[str, str]  # detector -> reason
    scores: str  # name of the file with the scores of all images


@dataclass(frozen=True)
class DetectorInputs:
    """The arrays of one set of images."""

    features: Features
    logits_NC: np.ndarray | None  # None if no detector needs logits
    view_h_N2D: np.ndarray | None = None  # h of two augmented views, for views_disagreement
    odin_logits_NC: np.ndarray | None = None  # logits of perturbed images, for odin

    def arguments(self, detector_name: str) -> dict[str, Any]:
        """Return the arguments of `Detector.fit` and `Detector.score`. Two detectors get arrays of their own."""
        return {
            "features": self.view_h_N2D if detector_name == "views_disagreement" else self.features.h,
            "logits": self.odin_logits_NC if detector_name == "odin" else self.logits_NC,
            "sigma": self.features.sigma,
            "mu": self.features.mu,
        }


def evaluate_ood(encoder: RunEncoder, sets: OODSets, *, seed: int = 0) -> OODResult:
    """Evaluate all detectors, and write RUN/eval/ood-NAME.json with the scores of all images and three plots.

    The settings of the detectors are constants, and their directions are fixed: nothing is chosen on any data. Logits
    are those of a supervised run itself, otherwise of a linear classifier (L-BFGS) that is fitted on `sets.fit`.

    Args:
        encoder: of the run.
        sets: of `find_sets`.
        seed: of the held-out part of that classifier, and of the resamples for the intervals.
    """
    name = f"ood-{sets.name}{encoder.suffix}"

    def compute() -> dict[str, Any]:
        train = cached_features(encoder, sets.fit)
        skipped = unsupported_detectors(encoder.model, train.label)
        names = [each for each in DETECTORS if each not in skipped]
        classifier = linear_head(encoder, train, seed) if set(names) & set(LABEL_BASED) else None
        train_inputs = DetectorInputs(train, logits_of(train, classifier))
        inputs = {
            part: compute_inputs(encoder, data, classifier, names) for part, data in {"id": sets.id, **sets.ood}.items()
        }
        scores: dict[str, dict[str, np.ndarray]] = {}
        with progress("Detectors", len(names), "detectors") as advance:
            for each in names:
                fitted = detector(
                    each, prior=embedding_prior(encoder.model), classifier=classifier, device=encoder.device
                )
                labels = train.label if each in LABEL_BASED else None
                try:
                    fitted.fit(labels=labels, **train_inputs.arguments(each))
                    scores[each] = {part: fitted.score(**x.arguments(each)) for part, x in inputs.items()}
                except ValueError as error:  # this detector is undefined on these images
                    skipped[each] = str(error)
                advance(1)
        save_scores(encoder, name, scores, {part: x.features.index for part, x in inputs.items()})
        id_norm_N = np.linalg.norm(inputs["id"].features.h.astype(np.float64), axis=1)
        comparison = compare(scores, {"near": list(sets.near), "far": list(sets.far)}, id_norm_N, seed)
        plots.draw_ood_plots(encoder.run_dir / "eval", name, scores, comparison["detectors"], sets)
        return {**comparison, "skipped": skipped, "scores": f"{name}.scores.npz"}

    request = {
        "evaluation": "ood",
        "protocol": "detectors with constant settings and fixed directions, fitted on training images",
        "settings": {**CONSTANTS, "pytorch_ood": label_based.pytorch_ood_version()},
        "augmentation": encoder.recipe.views.model_dump(mode="json"),  # of the two views of views_disagreement
        "seed": seed,
        **encoder.describe(),
        **sets.describe(),
    }
    return cast(OODResult, load_or_compute(encoder.run_dir, name, request, compute))


def unsupported_detectors(model: Model, label_N: np.ndarray) -> dict[str, str]:
    """Return the detectors that cannot run, each with the reason, for training images with these labels."""
    supervised = isinstance(model, Classifier)
    count_C = np.unique(label_N, return_counts=True)[1]
    labeled = label_N.min() >= 0 and len(count_C) > 1 and count_C.max() > 1
    reasons = {}
    for name, kind in DETECTORS.items():
        arrays = kind.arrays()
        if {"mu", "sigma"} & arrays and not len(model.heads):
            reasons[name] = "the embedding is deterministic"
        elif kind.needs_supervised_encoder and not supervised:
            reasons[name] = "the encoder was trained without labels"
        elif not labeled and ("labels" in arrays or ("logits" in arrays and not supervised)):
            reasons[name] = "the training images have no labels of two classes"
        elif kind.needs_pytorch_ood and label_based.pytorch_ood_version() is None:
            reasons[name] = "needs pytorch-ood: pip install pytorch-ood"
    return reasons


def embedding_prior(model: Model) -> Prior | None:
    """Return the prior of the embedding that `embed` returns: that of h if h is stochastic, otherwise that of z."""
    for space in ("h", "z"):
        if space in model.priors:
            return cast(Prior, model.priors[space])
    return None


def linear_head(encoder: RunEncoder, train: Features, seed: int) -> LinearHead:
    """Return the classifier of a supervised run, otherwise one that is fitted on h; float64."""
    if isinstance(encoder.model, Classifier):
        layer = encoder.model.classifier
        return LinearHead(layer.weight.detach().double(), layer.bias.detach().double())
    with progress("Logistic regressions", len(PENALTIES) + 1, "fits") as advance:
        fitted = fit_lbfgs(train.h, train.label, seed=seed, device=encoder.device, advance=advance)
    return head_of_features(fitted.classifier)


def head_of_features(classifier: LinearClassifier) -> LinearHead:
    """Convert a classifier of standardized features into one of the features themselves; float64."""
    assert classifier.mean_D is not None and classifier.std_D is not None
    weight_CD = classifier.weight_CD.double() / classifier.std_D.double()
    return LinearHead(weight_CD, classifier.bias_C.double() - weight_CD @ classifier.mean_D.double())


def logits_of(features: Features, classifier: LinearHead | None) -> np.ndarray | None:
    if classifier is None:
        return None
    weight_CD, bias_C = (x.cpu().numpy() for x in classifier)
    return features.h.astype(np.float64) @ weight_CD.T + bias_C


def compute_inputs(
    encoder: RunEncoder, data: BetonSubset, classifier: LinearHead | None, detector_names: list[str]
) -> DetectorInputs:
    """Compute the arrays of one set of images, or read them from RUN/features/."""
    features = cached_features(encoder, data)
    view_h_N2D = cached_features(encoder, data, augmented=True).h
    odin_logits_NC = None
    if classifier is not None and "odin" in detector_names:
        odin_logits_NC = odin_logits(encoder, data, classifier)
    return DetectorInputs(features, logits_of(features, classifier), view_h_N2D, odin_logits_NC)


def odin_logits(encoder: RunEncoder, data: BetonSubset, classifier: LinearHead) -> np.ndarray:
    """Return the logits (N, C) of images that are perturbed for ODIN, cached in RUN/features/ like features."""
    depends_on = {
        "view": describe_eval_transform(encoder.recipe.views),
        "odin": [label_based.ODIN_TEMPERATURE, label_based.ODIN_STEP, label_based.pytorch_ood_version()],
        "classifier": [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in classifier],
    }

    def compute(loader: BetonLoader, advance: Callable[[int], object]) -> Iterator[Features]:
        return perturbed_batches(encoder, loader, classifier, advance)

    return load_or_compute_features(encoder, data, depends_on, f"ODIN on {data.path}", compute).h


def perturbed_batches(
    encoder: RunEncoder, loader: BetonLoader, classifier: LinearHead, advance: Callable[[int], object]
) -> Iterator[Features]:
    """Yield `Features` of each batch that have the logits of perturbed images as h."""
    model = encoder.model
    make_input = eval_input(encoder.recipe.views)
    weight_CD, bias_C = (x.float() for x in classifier)

    def logits_with_gradient(images: Tensor) -> Tensor:
        h = model.encoder(images)
        if "h" in model.heads:
            h = model.heads["h"](h).mu  # the h that `embed` returns
        return F.linear(h, weight_CD, bias_C)

    with evaluating(model):
        for batch in loader:
            with in_fp32(batch.image.device):
                images = make_input(batch)
                moved = label_based.perturb_for_odin(logits_with_gradient, images, encoder.recipe.views.std)
                with torch.no_grad():
                    logits = logits_with_gradient(moved)
            label, index = valid_rows(batch.label, batch), valid_rows(batch.index, batch)
            yield Features(valid_rows(logits, batch), label, index)
            advance(len(label))


def save_scores(
    encoder: RunEncoder, name: str, scores: Mapping[str, Mapping[str, np.ndarray]], indices: Mapping[str, np.ndarray]
) -> None:
    """Write RUN/eval/NAME.scores.npz with the arrays SET/DETECTOR and SET/index, in the order of the files."""
    arrays = {f"{part}/index": index for part, index in indices.items()}
    arrays |= {f"{part}/{each}": score for each, parts in scores.items() for part, score in parts.items()}
    path = encoder.run_dir / "eval" / f"{name}.scores.npz"
    with explain_write_errors(path):
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))  # type: ignore[arg-type]
