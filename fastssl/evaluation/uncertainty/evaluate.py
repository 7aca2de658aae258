"""`fastssl eval uncertainty`: does the uncertainty of an encoder predict mistakes, and does it grow with corruption?"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastssl.common.errors import UserError
from fastssl.evaluation import metrics
from fastssl.evaluation.arrays import Advance, Device
from fastssl.evaluation.features import CACHE_VERSION, DType, Features, cached_features, eval_loader
from fastssl.evaluation.linear import lbfgs
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.metrics import Interval, Rows, bootstrap_intervals, classification_metrics
from fastssl.evaluation.results import RESULT, EvaluationResult, load_or_compute
from fastssl.evaluation.runs import EvaluationData, RunEncoder
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split
from fastssl.evaluation.uncertainty import measures
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS, VERSIONS, embed_versions, some_images
from fastssl.evaluation.uncertainty.plots import draw_corruptions, draw_extremes, draw_risk_coverage

NEIGHBORS = 50  # for encoders without sigma: the value of Sun et al. for CIFAR-10
CORRUPTED_IMAGES = 1000
EXTREMES = 18  # images with the least and with the greatest uncertainty that are drawn
CURVE_POINTS = 100  # points of a risk-coverage curve that are stored
PROTOCOL = (
    "uncertainty per image compared with: a wrong nearest other test image (cosine on h), wrong predictions of a "
    "logistic regression on nine tenths of the training images (temperature from the last tenth), corruptions of test "
    "images"
)


@dataclass(frozen=True)
class MetricGroup:
    """Some metrics of a result, and further fields that go with them."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    fields: dict[str, Any]


def evaluate_uncertainty(
    encoder: RunEncoder, data: EvaluationData, *, dtype: DType = "float32", seed: int = 0
) -> EvaluationResult:
    """Evaluate the uncertainty of an encoder on the test images, and write RUN/eval/uncertainty.json and three plots.

    The uncertainty of an image is the mean of sigma over dimensions. For a deterministic encoder it is the cosine
    distance of h to its 50th nearest training image (Sun et al., arXiv 2204.06507); `settings["score"]` says which.

    Args:
        encoder: of the run.
        data: training and test images.
        dtype: of the cached features.
        seed: of the classifier and its held-out tenth, the choice of corrupted images, the corruptions and intervals.

    Raises:
        UserError: if there is a single test image.
    """
    name = "uncertainty" + ("" if seed == 0 else f"-seed{seed}") + encoder.suffix + data.suffix
    about = data.describe()
    neighbors = min(NEIGHBORS, about["train"]["images"])
    stochastic = encoder.recipe.embedding.stochastic
    if stochastic == "none":
        score = f"cosine distance of h to training neighbor {neighbors}"
    else:
        score = f"mean sigma of {stochastic[0]}"  # for hz that of h, as in Embedding
    if about["val"]["images"] < 2:
        raise UserError(f"{data.val.path} has a single image, which has no neighbor", hint="choose a larger file")

    def compute() -> dict[str, Any]:
        train = cached_features(encoder, data.train, dtype)
        test = cached_features(encoder, data.val, dtype)

        def distance(h_MD: np.ndarray) -> np.ndarray:
            with encoder.progress(f"neighbors in {data.train.path}", len(train.h)) as advance:
                return measures.neighbor_distance(train.h, h_MD, neighbors, device=encoder.device, advance=advance)

        views = encoder.recipe.views
        loader = eval_loader(data.val, views, encoder.device)
        loader.rows = loader.rows[some_images(test.index, CORRUPTED_IMAGES, seed)]
        with encoder.progress("corrupted images", len(VERSIONS) * len(loader.rows)) as advance:
            versions_VN = embed_versions(encoder.model, loader, views, seed, advance)
        if test.sigma is None:
            uncertainty_M = distance(test.h)
            versions_VN = distance(versions_VN.reshape(-1, versions_VN.shape[-1])).reshape(versions_VN.shape[:2])
        else:
            uncertainty_M = test.sigma.mean(axis=1, dtype=np.float64)

        with encoder.progress("intervals of r_auroc", metrics.RESAMPLES + 1, "resamples") as advance:
            of_neighbors = neighbor_metrics(test, uncertainty_M, encoder.device, seed, advance)
        work = f"logistic regressions on {data.train.path}"
        with encoder.progress(work, len(lbfgs.PENALTIES) + 1, "fits") as advance:
            of_predictions = prediction_metrics(train, test, uncertainty_M, encoder.device, seed, advance)
        result: dict[str, Any] = {"metrics": {}, "intervals": {}}
        for group in (of_neighbors, of_predictions, corruption_metrics(versions_VN, seed)):
            result["metrics"] |= group.metrics
            result["intervals"] |= group.intervals
            result |= group.fields
        levels = metrics.chance_levels(test.label)
        levels["nll_scaled"] = levels["nll"]
        result["chance"] = {name: value for name, value in levels.items() if name in result["metrics"]}
        result["uncertainty"] = {key: float(getattr(uncertainty_M, key)()) for key in ("mean", "std", "min", "max")}

        paths = [
            encoder.run_dir / "eval" / f"{name}.{kind}.png" for kind in ("risk-coverage", "corruptions", "extremes")
        ]
        run = encoder.run_dir.resolve().name
        draw_risk_coverage(paths[0], run, result["risk_coverage"], result["metrics"], score)
        draw_corruptions(paths[1], run, result, score)
        draw_extremes(paths[2], run, data.val, test.index, uncertainty_M, EXTREMES, score)
        return {**result, "plots": [path.name for path in paths]}

    request = {
        "evaluation": "uncertainty",
        "protocol": PROTOCOL,
        "settings": {
            "score": score,
            "corruptions": CORRUPTIONS,
            "corrupted_images": CORRUPTED_IMAGES,
            "held_out_share": HOLDOUT_SHARE,
            "dtype": dtype,
            "features": CACHE_VERSION,
            "classifier": lbfgs.CONSTANTS,
        },
        "seed": seed,
        **encoder.describe(),
        **about,
    }
    return load_or_compute(encoder.run_dir, name, request, compute, RESULT)


def neighbor_metrics(
    test: Features,
    uncertainty_M: np.ndarray,
    device: Device,
    seed: int,
    advance: Advance = lambda resamples: None,
) -> MetricGroup:
    """Compute recall_at_1, and r_auroc unless the nearest neighbors of all images are right, or all wrong.

    advance: called for the images, and after each of RESAMPLES resamples.
    """
    wrong_M = measures.nearest_is_wrong(test.h, test.label, device=device)
    defined = 0 < wrong_M.sum() < len(wrong_M)

    def compute(rows: Rows) -> dict[str, float]:
        advance(1)
        values = {"r_auroc": measures.r_auroc(uncertainty_M[rows], wrong_M[rows])} if defined else {}
        values["recall_at_1"] = 1 - float(wrong_M[rows].mean())
        return values

    return MetricGroup(compute(slice(None)), bootstrap_intervals(len(wrong_M), compute, seed), {})


def prediction_metrics(
    train: Features,
    test: Features,
    uncertainty_M: np.ndarray,
    device: Device,
    seed: int,
    advance: Advance = lambda fits: None,
) -> MetricGroup:
    """Compute how well the uncertainty orders the mistakes of a logistic regression on h, and its calibration.

    The classifier is fitted on nine tenths of the training images, and its temperature is chosen on the last tenth.
    Nothing is chosen on the test images. advance: as in `fit_lbfgs`.
    """
    fit_rows, held_rows = holdout_split(train.label, seed)
    fitted = fit_lbfgs(train.h[fit_rows], train.label[fit_rows], seed=seed, device=device, advance=advance)
    class_C = fitted.classifier.class_C.numpy()
    held_logits = fitted.classifier.logits(train.h[held_rows])
    temperature = measures.fit_temperature(held_logits, train.label[held_rows], class_C)

    logits_MC = fitted.classifier.logits(test.h).double()
    unscaled = classification_metrics(logits_MC, test.label, class_C, seed=seed)
    scaled = classification_metrics(logits_MC / temperature, test.label, class_C, seed=seed)
    values: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    for name, source, key in (
        ("accuracy", unscaled, "accuracy"),
        ("ece", unscaled, "ece"),
        ("ece_scaled", scaled, "ece"),
        ("nll", unscaled, "nll"),
        ("nll_scaled", scaled, "nll"),
    ):
        # There is no nll if the classifier knows none of the classes of the test images.
        if key in source.metrics:
            values[name] = source.metrics[key]
            intervals[name] = source.intervals[key]

    wrong_M = class_C[logits_MC.numpy().argmax(axis=1)] != test.label
    confidence_M = logits_MC.softmax(dim=1).max(dim=1).values.numpy()
    scores = {"": uncertainty_M, "_confidence": 1 - confidence_M}

    def areas(rows: Rows) -> dict[str, float]:
        least = measures.aurc(wrong_M[rows], wrong_M[rows])
        found = {}
        for suffix, score_M in scores.items():
            found[f"aurc{suffix}"] = measures.aurc(score_M[rows], wrong_M[rows])
            # E-AURC (Geifman et al., arXiv 1805.08206): they approximate the least area, this is the exact one.
            found[f"e_aurc{suffix}"] = found[f"aurc{suffix}"] - least
        return found

    def areas_and_difference(rows: Rows) -> dict[str, float]:
        found = areas(rows)
        return {**found, "aurc_minus_error": found["aurc"] - float(wrong_M[rows].mean())}

    values |= areas(slice(None))
    intervals |= bootstrap_intervals(len(wrong_M), areas_and_difference, seed)
    # AURC and error rise and fall together over resamples, so the interval of `aurc` alone cannot compare them.
    difference = intervals.pop("aurc_minus_error")

    # The numbers of images at coverages of 1 %, 2 %, ..., 100 %, rounded up.
    count_P = np.unique(-(-np.arange(1, CURVE_POINTS + 1) * len(wrong_M) // CURVE_POINTS))
    orders = {"uncertainty": uncertainty_M, "confidence": scores["_confidence"], "oracle": wrong_M}
    curves = {key: measures.risk_coverage(score_M, wrong_M)[count_P - 1].tolist() for key, score_M in orders.items()}
    fields = {
        "aurc_minus_error": difference,
        "chosen": {**fitted.chosen, "temperature": temperature},
        "candidates": fitted.candidates,
        "hyperparameters": {**fitted.hyperparameters, "held_out_for_temperature": len(held_rows)},
        "risk_coverage": {"coverage": (count_P / len(wrong_M)).tolist(), **curves},
    }
    return MetricGroup(values, intervals, fields)


def corruption_metrics(versions_VN: np.ndarray, seed: int) -> MetricGroup:
    """Compute from the uncertainties of all `VERSIONS` of N images how uncertainty changes with corruption.

    spearman_NAME is the mean over images of the correlation of uncertainty with strength. crop_larger is the share of
    crops that are more uncertain than their original image (ties count half), over all sizes and per size:
    crop_larger_75 of crops with 75 % of the area. The field "corruptions" has the mean uncertainty of the original
    images, then at each strength, with 95 % intervals.
    """
    # For each corruption (N, 6): the original image, then five strengths.
    curves = {
        name: versions_VN[[0, *(v for v, (other, _) in enumerate(VERSIONS) if other == name)]].T for name in CORRUPTIONS
    }
    original_N1, crop_NS = curves["crop"][:, :1], curves["crop"][:, 1:]
    larger_NS = (crop_NS > original_N1) + 0.5 * (crop_NS == original_N1)
    columns = {f"spearman_{name}": measures.strength_correlation(curve_NS) for name, curve_NS in curves.items()}
    columns["crop_larger"] = larger_NS.mean(axis=1)
    for share, larger_N in zip(CORRUPTIONS["crop"], larger_NS.T):
        columns[f"crop_larger_{100 * share:g}"] = larger_N
    # The means at each strength are resampled together with the metrics, under names such as "blur 3".
    means = {f"{name} {s}": x_N for name, curve_NS in curves.items() for s, x_N in enumerate(curve_NS.T)}
    names = [*columns, *means]
    values_NF = np.stack([*columns.values(), *means.values()], axis=1, dtype=np.float64)

    def compute(rows: Rows) -> dict[str, float]:
        return dict(zip(names, values_NF[rows].mean(axis=0).tolist()))

    values = compute(slice(None))
    intervals = bootstrap_intervals(len(values_NF), compute, seed)
    corruptions = {}
    for name, strengths in CORRUPTIONS.items():
        keys = [f"{name} {s}" for s in range(len(strengths) + 1)]
        corruptions[name] = {
            "strengths": list(strengths),
            "mean": [values[key] for key in keys],
            "intervals": [intervals[key] for key in keys],
        }
    return MetricGroup(
        {name: values[name] for name in columns},
        {name: intervals[name] for name in columns},
        {"corruptions": corruptions, "corrupted_images": len(values_NF)},
    )
