"""`fastssl eval linear`: one of the protocols on the features of a run."""

from typing import Literal

from fastssl.common.terminal import progress
from fastssl.evaluation.features import CACHE_VERSION, DType, Features, cached_features, mean_of_draws
from fastssl.evaluation.linear import lbfgs, reference, sweep
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.linear.reference import SCHEDULES, ScheduleName, fit_reference
from fastssl.evaluation.linear.sweep import fit_sweep
from fastssl.evaluation.metrics import ClassificationResult, classification_metrics
from fastssl.evaluation.results import EvaluationResult, load_or_compute, save_classification
from fastssl.evaluation.runs import EvaluationData, RunEncoder, check_draws

Protocol = Literal["sweep", "reference", "lbfgs"]
PROTOCOLS: dict[str, str] = {
    "sweep": "softmax classifiers on standardised h, SGD with cosine, rate and decay chosen on held-out training "
    "images, trained again on all of them",
    "reference": "linear layer on h of length 1, AdamW with step decay, the last epoch's weights",
    "lbfgs": "logistic regression on standardised h, penalty chosen on held-out training images, fitted again on all "
    "of them",
}


def evaluate_linear(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    protocol: Protocol = "sweep",
    schedule: ScheduleName = "imagenet",
    draws: int | None = None,
    dtype: DType = "float32",
    seed: int = 0,
) -> EvaluationResult:
    """A classifier trained on data.train and tested on data.val, kept in RUN/eval/linear-PROTOCOL.json; returns what
    that file holds.

    schedule: the reference protocol's. draws: see `linear_settings`.
    """
    settings = linear_settings(encoder, protocol, draws, dtype, schedule)
    evaluation = f"linear-{protocol}"
    parts = [
        f"-{schedule}" if protocol == "reference" and schedule != "imagenet" else "",
        "" if draws is None else f"-draws{draws}",
        "" if seed == 0 else f"-seed{seed}",
    ]
    name = evaluation + "".join(parts) + encoder.suffix + data.suffix

    def measure() -> dict:
        of_train, of_test = (cached_features(encoder, part, dtype) for part in (data.train, data.val))
        fitted, scores = fit_and_score(encoder, of_train, of_test, protocol, settings, seed)
        return {**save_classification(encoder.run_dir, name, scores, data.val.path), **fitted}

    request = {
        "evaluation": evaluation,
        "protocol": PROTOCOLS[protocol],
        "settings": settings,
        "seed": seed,
        **encoder.describe(),
        **data.describe(),
    }
    return load_or_compute(encoder.run_dir, name, request, measure)


def linear_settings(
    encoder: RunEncoder, protocol: Protocol, draws: int | None, dtype: DType, schedule: str = "imagenet"
) -> dict:
    """What a result depends on beside encoder and data: a kept one with other settings is measured again.

    draws: average the logits over so many draws of a stochastic h, in training and in testing; 0: classify mu. None: as
    published, embedding.samples draws for the reference protocol, mu for the others. schedule: of the reference
    protocol; a name that has none of its own means ImageNet's.
    """
    check_draws(encoder, draws)
    stochastic = "h" in encoder.recipe.embedding.stochastic
    if draws is None:
        draws = encoder.recipe.embedding.samples if stochastic and protocol == "reference" else 0
    settings = {"draws": draws, "dtype": dtype, "features": CACHE_VERSION}
    if protocol == "reference":
        name = schedule if schedule in SCHEDULES else "imagenet"
        return {**settings, "schedule": name, **SCHEDULES[name]._asdict(), **reference.CONSTANTS}
    return {**settings, **(sweep.CONSTANTS if protocol == "sweep" else lbfgs.CONSTANTS)}


def fit_and_score(
    encoder: RunEncoder, of_train: Features, of_test: Features, protocol: Protocol, settings: dict, seed: int
) -> tuple[dict, ClassificationResult]:
    """Fit on the one, test on the other: what the protocol did, for the result, and the scores."""
    draws = settings["draws"]

    def representation(features: Features):
        if draws:
            unit = protocol == "reference"
            return mean_of_draws(features, draws, encoder.recipe.seed, normalize=unit, device=encoder.device)
        return features.h

    x_ND, label_N = representation(of_train), of_train.label
    common = {"seed": seed, "device": encoder.device}
    if protocol == "reference":
        with progress("Linear classifier", settings["epochs"], "epochs") as advance:
            # Of draws, each one has been brought to length 1.
            fitted = fit_reference(
                x_ND, label_N, schedule=settings["schedule"], normalize=not draws, advance=advance, **common
            )
    elif protocol == "sweep":
        with progress("Linear classifiers", 2 * settings["epochs"], "epochs") as advance:
            fitted = fit_sweep(x_ND, label_N, epochs=settings["epochs"], advance=advance, **common)
    else:
        with progress("Logistic regressions", len(settings["penalties"]) + 1, "fits") as advance:
            fitted = fit_lbfgs(x_ND, label_N, advance=advance, **common)

    logits_MC, class_C = fitted.classifier.logits(representation(of_test)), fitted.classifier.class_C
    scores = classification_metrics(logits_MC, of_test.label, class_C, seed=seed)
    return {"hyperparameters": fitted.settings, "chosen": fitted.chosen, "candidates": fitted.selection}, scores
