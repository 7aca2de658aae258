"""`fastssl eval ood`: fit all detectors that a run supports, score ID and OOD images, and compare the scores."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, TypeAdapter
from torch import Tensor

from fastssl.beton import read_header
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.evaluation.features import (
    CACHE_VERSION,
    Features,
    MakeInput,
    cached_features,
    eval_input,
    in_fp32,
    load_or_compute_features,
    valid_rows,
)
from fastssl.evaluation.linear import fit_lbfgs
from fastssl.evaluation.linear.lbfgs import PENALTIES
from fastssl.evaluation.metrics import RESAMPLES
from fastssl.evaluation.ood import distances, label_based, label_free, plots
from fastssl.evaluation.ood.base import LinearHead
from fastssl.evaluation.ood.detectors import DETECTORS, LABEL_BASED, detector
from fastssl.evaluation.ood.jacobian import DIRECTIONS, cached_jacobian_values
from fastssl.evaluation.ood.layers import MAX_LAYERS, cached_layers, has_layers
from fastssl.evaluation.ood.separation import MIN_INVERTED, DetectorResult, compare, without_missing
from fastssl.evaluation.ood.suites import OODSets, SetDescription
from fastssl.evaluation.results import EvaluationResult, load_or_compute
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import Batch, BetonLoader, SampleSelection
from fastssl.loading.samples import Samples, as_array
from fastssl.models import Classifier, Model
from fastssl.models.encoder_only import EncoderOnly
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
    "layers": MAX_LAYERS,
    "variance_kept": label_free.VARIANCE_KEPT,
    "gen": [label_based.GEN_GAMMA, label_based.GEN_CLASSES],
    "react_share": label_based.REACT_PERCENTILE,
    "odin": [label_based.ODIN_TEMPERATURE, label_based.ODIN_STEP],
    "ridge": distances.RIDGE,
    "jepa_directions": DIRECTIONS,
    "jepa_eps": label_free.SMALLEST_SINGULAR_VALUE,
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


def _check_sets(result: OODResult) -> OODResult:
    """Raise ValueError unless each detector has a result for each set, and for each group of sets."""
    for name, row in result["detectors"].items():
        groups = {group for group in ("near", "far") if result[group]}
        if row["sets"].keys() != result["near"].keys() | result["far"].keys() or not groups <= row.keys():
            raise ValueError(f"{name} lacks results of a set")
    return result


OOD_RESULT: TypeAdapter[OODResult] = TypeAdapter(Annotated[OODResult, AfterValidator(_check_sets)])


def evaluate_ood(
    encoder: RunEncoder, sets: OODSets, *, seed: int = 0, jepa_images: int = 0, jepa_exact: bool = False
) -> OODResult:
    """Evaluate all detectors, and write RUN/eval/ood-NAME.json with the scores of all images and three plots.

    The settings of the detectors are constants, and their directions are fixed: nothing is chosen on any data. Logits
    are those of a supervised run itself, otherwise of a linear classifier (L-BFGS) that is fitted on `sets.fit`.

    Args:
        encoder: of the run.
        sets: of `find_sets`.
        seed: of the held-out part of that classifier, and of the resamples for the intervals.
        jepa_images: images of each set, at most, that JEPA-SCORE is computed of; 0: it is skipped, as it is slow.
        jepa_exact: along all directions of the embedding, as published, in place of 64 random ones.
    """
    name = f"ood-{sets.name}{encoder.suffix}"

    def compute() -> dict[str, Any]:
        train = cached_features(encoder, sets.fit)
        skipped = unsupported_detectors(encoder.model, train.label)
        if not jepa_images:
            slow = [each for each, kind in DETECTORS.items() if kind.jacobian_of and each not in skipped]
            skipped |= dict.fromkeys(slow, "slow; --jepa-images 200 computes it, of 200 images a set")
        names = [each for each in DETECTORS if each not in skipped]
        classifier = linear_head(encoder, train, seed) if set(names) & set(LABEL_BASED) else None
        train_arrays = shared_arrays(train, classifier)
        if any("layers" in DETECTORS[each].arrays() for each in names):
            train_arrays["layers"] = cached_layers(encoder, sets.fit)
        parts = {"id": sets.id, **sets.ood}
        arrays = {
            part: detector_arrays(encoder, data, classifier, names, jepa_images, jepa_exact)
            for part, data in parts.items()
        }
        scores: dict[str, dict[str, np.ndarray]] = {}
        with encoder.progress("detectors", len(names), "detectors") as advance:
            for each in names:
                prior = embedding_prior(encoder.model)
                fitted = detector(each, prior=prior, classifier=classifier, device=encoder.device)
                labels = train.label if each in LABEL_BASED else None
                try:
                    fitted.fit(labels=labels, **train_arrays)
                    found = {part: fitted.score(**arrays[part][each]) for part in parts}
                    if DETECTORS[each].jacobian_of:
                        found = {part: on_all_images(parts[part], found[part], jepa_images) for part in parts}
                    scores[each] = found
                except ValueError as error:  # this detector is undefined on these images
                    skipped[each] = str(error)
                advance(1)
        # The scores of all images as SET/DETECTOR (JEPA-SCORE: NaN for images without one) and their ids as SET/index,
        # in the order of the files.
        columns = {f"{part}/index": cached_features(encoder, data).index for part, data in parts.items()}
        columns |= {f"{part}/{each}": score_N for each, found in scores.items() for part, score_N in found.items()}
        path = encoder.run_dir / "eval" / f"{name}.scores.npz"
        with explain_write_errors(path):
            write_atomically(path, lambda temporary: np.savez(temporary, **columns))  # type: ignore[arg-type]
        id_norm_N = np.linalg.norm(cached_features(encoder, sets.id).h.astype(np.float64), axis=1)
        groups = {"near": list(sets.near), "far": list(sets.far)}
        with encoder.progress("intervals", len(scores), "detectors") as advance:
            comparison = compare(scores, groups, id_norm_N, seed, advance)
        scored = {each: without_missing(found) for each, found in scores.items()}
        plots.draw_ood_plots(encoder.run_dir / "eval", name, scored, comparison["detectors"], sets)
        return {**comparison, "skipped": skipped, "scores": path.name}

    request = {
        "evaluation": "ood",
        "protocol": "detectors with constant settings and fixed directions, fitted on training images",
        "settings": {
            **CONSTANTS,
            "pytorch_ood": label_based.pytorch_ood_version(),
            "jepa_images": jepa_images,
            "jepa_exact": jepa_exact,
        },
        "augmentation": encoder.recipe.views.model_dump(mode="json"),  # of the two views of detectors with `of_views`
        "seed": seed,
        **encoder.describe(),
        **sets.describe(),
    }
    return load_or_compute(encoder.run_dir, name, request, compute, OOD_RESULT)


def unsupported_detectors(model: Model | EncoderOnly, label_N: np.ndarray) -> dict[str, str]:
    """Return the detectors that cannot run, each with the reason, for training images with these labels."""
    supervised = isinstance(model, Classifier)
    count_C = np.unique(label_N, return_counts=True)[1]
    unlabelled = int((label_N < 0).sum())
    labeled = unlabelled == 0 and len(count_C) > 1 and count_C.max() > 1
    problem = f"{unlabelled:,} of the {len(label_N):,} training images have no label"
    reasons = {}
    for name, kind in DETECTORS.items():
        arrays = kind.arrays()
        if ({"mu", "sigma"} & arrays or kind.jacobian_of == "mu") and not len(model.heads):
            reasons[name] = "the embedding is deterministic"
        elif kind.jacobian_of == "mu" and "h" in model.heads:
            reasons[name] = "mu is h, so it is jepa_score"
        elif "layers" in arrays and not has_layers(model.encoder):
            reasons[name] = "timm does not return the intermediate layers of this backbone"
        elif kind.needs_supervised_encoder and not supervised:
            known = not isinstance(model, EncoderOnly)
            reasons[name] = "the encoder was trained without labels" if known else "needs a supervised run"
        elif not labeled and ("labels" in arrays or ("logits" in arrays and not supervised)):
            reasons[name] = problem if unlabelled else "the training images have no labels of two classes"
        elif kind.needs_pytorch_ood and label_based.pytorch_ood_version() is None:
            reasons[name] = "needs pytorch-ood: pip install pytorch-ood"
    return reasons


def embedding_prior(model: Model | EncoderOnly) -> Prior | None:
    """Return the prior of the embedding that `embed` returns: that of h if h is stochastic, otherwise that of z."""
    priors = [cast(Prior, model.priors[space]) for space in ("h", "z") if space in model.priors]
    return priors[0] if priors else None


def linear_head(encoder: RunEncoder, train: Features, seed: int) -> LinearHead:
    """Return the classifier of a supervised run, otherwise one that is fitted on h; float64."""
    if isinstance(encoder.model, Classifier):
        layer = encoder.model.classifier
        return LinearHead(layer.weight.detach().double(), layer.bias.detach().double())
    with encoder.progress("logistic regressions", len(PENALTIES) + 1, "fits") as advance:
        fitted = fit_lbfgs(train.h, train.label, seed=seed, device=encoder.device, advance=advance)
    # The classifier of standardized features, as one of the features themselves.
    mean_D, std_D = fitted.classifier.mean_D, fitted.classifier.std_D
    assert mean_D is not None and std_D is not None
    weight_CD = fitted.classifier.weight_CD.double() / std_D.double()
    return LinearHead(weight_CD, fitted.classifier.bias_C.double() - weight_CD @ mean_D.double())


def shared_arrays(features: Features, classifier: LinearHead | None) -> dict[str, Any]:
    """Return the arguments of `Detector.fit` and `Detector.score` that most detectors share."""
    logits_NC = None
    if classifier is not None:
        weight_CD, bias_C = (x.cpu().numpy() for x in classifier)
        logits_NC = features.h.astype(np.float64) @ weight_CD.T + bias_C
    return {"features": features.h, "logits": logits_NC, "sigma": features.sigma, "mu": features.mu}


def detector_arrays(
    encoder: RunEncoder,
    data: BetonSubset,
    classifier: LinearHead | None,
    detector_names: list[str],
    jepa_images: int | None = None,
    jepa_exact: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the arguments of `Detector.score` for each detector; some have arrays of their own.

    jepa_images: of how many images, at most, there are singular values; None: of all.
    jepa_exact: whether they are those of whole Jacobians.
    """
    shared = shared_arrays(cached_features(encoder, data), classifier)
    arrays = dict.fromkeys(detector_names, shared)
    if of_layers := [name for name in detector_names if "layers" in DETECTORS[name].arrays()]:
        arrays |= dict.fromkeys(of_layers, shared | {"layers": cached_layers(encoder, data)})
    if of_views := [name for name in detector_names if DETECTORS[name].of_views]:
        arrays |= dict.fromkeys(of_views, shared_arrays(cached_features(encoder, data, augmented=True), None))
    if classifier is not None and "odin" in arrays:
        arrays["odin"] = {**arrays["odin"], "logits": odin_logits(encoder, data, classifier)}
    if spaces := {name: space for name in detector_names if (space := DETECTORS[name].jacobian_of)}:
        values = cached_jacobian_values(encoder, dataclasses.replace(data, limit=jepa_images), jepa_exact)
        arrays |= {name: {"features": values[space]} for name, space in spaces.items()}
    return arrays


def on_all_images(data: BetonSubset, score_M: np.ndarray, jepa_images: int) -> np.ndarray:
    """Return the scores (N,) of all images of a set from those of the drawn ones, NaN for the others."""
    samples = Samples.read(read_header(data.path))
    row_N, drawn_M = (as_array(SampleSelection(data.subset, limit).rows(samples)) for limit in (None, jepa_images))
    score_N = np.full(len(row_N), np.nan)
    score_N[np.isin(row_N, drawn_M)] = score_M
    return score_N


def odin_logits(encoder: RunEncoder, data: BetonSubset, classifier: LinearHead) -> np.ndarray:
    """Return the logits (N, C) of images that are perturbed for ODIN, cached in RUN/features/ like features."""
    depends_on = {
        "view": describe_eval_transform(encoder.recipe.views),
        "odin": [label_based.ODIN_TEMPERATURE, label_based.ODIN_STEP, label_based.pytorch_ood_version()],
        "classifier": [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in classifier],
    }

    def compute(loader: BetonLoader, advance: Callable[[int], object]) -> Iterator[Features]:
        make_input = eval_input(encoder.recipe.views)
        for batch in loader:
            logits = logits_after_odin(encoder, batch, make_input, classifier)
            label, index = valid_rows(batch.label, batch), valid_rows(batch.index, batch)
            yield Features(logits, label, index)
            advance(len(label))

    return load_or_compute_features(encoder, data, depends_on, f"ODIN on {data.path}", compute).h


def logits_after_odin(encoder: RunEncoder, batch: Batch, make_input: MakeInput, classifier: LinearHead) -> np.ndarray:
    """Return the logits (B, C) of the valid images of a batch, perturbed for ODIN."""
    weight_CD, bias_C = (x.float() for x in classifier)

    def logits_with_gradient(images: Tensor) -> Tensor:
        h = encoder.model.encoder(images)
        if "h" in encoder.model.heads:
            h = encoder.model.heads["h"](h).mu  # the h that `embed` returns
        return F.linear(h, weight_CD, bias_C)

    with evaluating(encoder.model), in_fp32(batch.index.device):
        images = make_input(batch)
        moved = label_based.perturb_for_odin(logits_with_gradient, images, encoder.recipe.views.std)
        with torch.no_grad():
            return valid_rows(logits_with_gradient(moved), batch)
