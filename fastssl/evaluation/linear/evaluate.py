"""`fastssl eval linear`: one of the three protocols on the features of a run."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastssl.evaluation.features import CACHE_VERSION, DType, Features, cached_features, mean_of_draws
from fastssl.evaluation.linear import lbfgs, reference, sweep
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.linear.reference import SCHEDULES, ScheduleName, fit_reference
from fastssl.evaluation.linear.sweep import fit_sweep
from fastssl.evaluation.metrics import ClassificationResult, classification_metrics
from fastssl.evaluation.results import RESULT, EvaluationResult, load_or_compute, save_classification
from fastssl.evaluation.runs import EvaluationData, RunEncoder, check_draws

Protocol = Literal["sweep", "reference", "lbfgs"]
PROTOCOLS: dict[Protocol, str] = {
    "sweep": "softmax classifiers on standardized h, SGD with cosine decay, learning rate and weight decay chosen on "
    "held-out training images, trained again on all of them",
    "reference": "linear layer on h of length 1, AdamW with step decay, the weights of the last epoch",
    "lbfgs": "logistic regression on standardized h, penalty chosen on held-out training images, fitted again on all "
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
    """Fit a linear classifier on data.train and test it on data.val. Cached in RUN/eval/linear-PROTOCOL.json.

    schedule is that of the reference protocol, draws as in `linear_settings`, dtype that of the cached features.
    """
    settings = linear_settings(encoder, protocol, draws, dtype, schedule)
    evaluation = name = f"linear-{protocol}"
    name += f"-{schedule}" if protocol == "reference" and schedule != "imagenet" else ""
    name += ("" if draws is None else f"-draws{draws}") + (f"-seed{seed}" if seed else "")
    name += encoder.suffix + data.suffix

    def compute() -> dict[str, Any]:
        train, val = (cached_features(encoder, part, dtype) for part in (data.train, data.val))
        result, choice = fit_and_test(encoder, train, val, protocol, settings, seed, data.train.path)
        return save_classification(encoder.run_dir, name, result, data.val.path) | choice

    request = {
        "evaluation": evaluation, "protocol": PROTOCOLS[protocol], "settings": settings, "seed": seed,
        **encoder.describe(), **data.describe(),
    }  # fmt: skip
    return load_or_compute(encoder.run_dir, name, request, compute, RESULT)


def linear_settings(
    encoder: RunEncoder, protocol: Protocol, draws: int | None, dtype: DType, schedule: str = "imagenet"
) -> dict[str, Any]:
    """The constants of a protocol with the options of the caller: the `settings` of a result.

    Args:
        draws: average the logits over this many draws of a stochastic h, in training and in testing; 0: classify mu.
            None: as published, embedding.samples draws for the reference protocol and mu for the others.
        schedule: of the reference protocol; a name that is no key of SCHEDULES means that of ImageNet.
    """
    check_draws(encoder, draws)
    if draws is None:
        published = protocol == "reference" and "h" in encoder.recipe.embedding.stochastic
        draws = encoder.recipe.embedding.samples if published else 0
    settings = {"draws": draws, "dtype": dtype, "features": CACHE_VERSION}
    if protocol == "reference":
        name = schedule if schedule in SCHEDULES else "imagenet"
        return {**settings, "schedule": name, **SCHEDULES[name]._asdict(), **reference.CONSTANTS}
    return {**settings, **(sweep.CONSTANTS if protocol == "sweep" else lbfgs.CONSTANTS)}


def fit_and_test(
    encoder: RunEncoder,
    train: Features,
    test: Features,
    protocol: Protocol,
    settings: dict[str, Any],
    seed: int,
    file: Path,
) -> tuple[ClassificationResult, dict[str, Any]]:
    """Fit on `train`, features of `file`, with the settings of `linear_settings`, and test on `test`.

    Returns the result, and the fields of an EvaluationResult that say how the classifier was chosen.
    """
    label_N, draws, device = train.label, settings["draws"], encoder.device
    representation = partial(
        mean_of_draws, draws=draws, seed=encoder.recipe.seed, normalize=protocol == "reference", device=device
    )
    x_ND = representation(train)
    if protocol == "reference":
        with encoder.progress(f"linear classifier on {file}", settings["epochs"], "epochs") as advance:
            # Draws have length 1 already. Their mean is shorter, and stays so.
            fit = fit_reference(
                x_ND, label_N, schedule=settings["schedule"], normalize=not draws, seed=seed, device=device,
                advance=advance,
            )  # fmt: skip
    elif protocol == "sweep":
        with encoder.progress(f"linear classifiers on {file}", 2 * settings["epochs"], "epochs") as advance:
            fit = fit_sweep(x_ND, label_N, epochs=settings["epochs"], seed=seed, device=device, advance=advance)
    else:
        with encoder.progress(f"logistic regressions on {file}", len(settings["penalties"]) + 1, "fits") as advance:
            fit = fit_lbfgs(x_ND, label_N, seed=seed, device=device, advance=advance)
    logits_MC = fit.classifier.logits(representation(test))
    result = classification_metrics(logits_MC, test.label, fit.classifier.class_C, seed=seed)
    return result, {"hyperparameters": fit.hyperparameters, "chosen": fit.chosen, "candidates": fit.candidates}
