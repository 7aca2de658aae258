"""`fastssl eval uncertainty`: is what a run says of its uncertainty true?"""

from typing import NamedTuple

import numpy as np
import torch

from fastssl.common.errors import UserError
from fastssl.common.terminal import progress
from fastssl.evaluation import metrics
from fastssl.evaluation.features import CACHE_VERSION, DType, Features, cached_features, eval_loader
from fastssl.evaluation.linear import lbfgs
from fastssl.evaluation.linear.lbfgs import fit_lbfgs
from fastssl.evaluation.metrics import bootstrap_intervals, classification_metrics
from fastssl.evaluation.results import load_or_compute
from fastssl.evaluation.runs import BetonSubset, EvaluationData, RunEncoder
from fastssl.evaluation.splits import HOLDOUT_SHARE, holdout_split
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS, VERSIONS, embed_versions, some_images
from fastssl.evaluation.uncertainty.measures import (
    aurc,
    fit_temperature,
    nearest_is_wrong,
    neighbour_distance,
    r_auroc,
    risk_coverage,
    strength_correlation,
)
from fastssl.evaluation.uncertainty.plots import draw_corruptions, draw_extremes, draw_risk_coverage

NEIGHBOURS = 50  # of an image whose encoder gives no sigma; Sun et al. take 50 for CIFAR-10
CORRUPTED_IMAGES = 1000
SHOWN = 20  # of the most and of the least certain images
CURVE_POINTS = 100  # of a risk-coverage curve that a result keeps
PROTOCOL = (
    "one uncertainty an image against: a wrong nearest other test image (cosine on h), wrong guesses of a logistic "
    "regression on nine tenths of the training images (temperature from the last tenth), corruptions of test images"
)


class Measured(NamedTuple):
    """Figures with their intervals, and what else a result keeps of them."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    kept: dict


def evaluate_uncertainty(
    encoder: RunEncoder, split: EvaluationData, *, dtype: DType = "float32", seed: int = 0
) -> dict:
    """How far the uncertainty on data.val can be trusted, kept in RUN/eval/uncertainty.json with three pictures beside
    it; returns what that file holds.

    The uncertainty of an image is the mean over dimensions of sigma, of an encoder without one the cosine distance of h
    to its 50th nearest training image (Sun et al., arXiv 2204.06507); `settings["score"]` says which. seed: of the
    classifier, its held-out tenth, the corrupted images, what is random in them and the intervals.
    """
    name = "uncertainty" + ("" if seed == 0 else f"-seed{seed}") + encoder.suffix + split.suffix
    about = split.describe()
    neighbours = min(NEIGHBOURS, about["train"]["images"])
    stochastic = encoder.recipe.embedding.stochastic
    score = (
        f"cosine distance of h to training neighbour {neighbours}"
        if stochastic == "none"
        else f"mean sigma of {stochastic[0]}"  # of h where both are stochastic, as Embedding says
    )
    if about["val"]["images"] < 2:
        raise UserError(f"{split.val.path} holds one image, which has no neighbour there: name a larger file.")

    def measure() -> dict:
        of_train, of_test = (cached_features(encoder, part, dtype) for part in (split.train, split.val))

        def distance(h_MD: np.ndarray) -> np.ndarray:
            with progress(f"Neighbours in {split.train.path}", len(of_train.h), "images") as advance:
                return neighbour_distance(of_train.h, h_MD, neighbours, device=encoder.device, advance=advance)

        versions_VN = corrupted(encoder, split.val, of_test, seed)
        if stochastic == "none":
            uncertainty_M = distance(of_test.h)
            versions_VN = distance(versions_VN.reshape(-1, versions_VN.shape[-1])).reshape(versions_VN.shape[:2])
        else:
            uncertainty_M = np.mean(of_test.sigma, axis=1, dtype=np.float64)

        folder = encoder.run_dir / "eval"
        of_neighbours = neighbour_figures(of_test, uncertainty_M, encoder.device, seed)
        of_guesses = guess_figures(of_train, of_test, uncertainty_M, encoder.device, seed)
        of_corruptions = corruption_figures(versions_VN, seed)
        files = [f"{name}.{what}.png" for what in ("risk-coverage", "corruptions", "sheet")]
        run = encoder.run_dir.resolve().name
        draw_risk_coverage(folder / files[0], run, of_guesses.kept["risk_coverage"], of_guesses.figures, score)
        draw_corruptions(
            folder / files[1], run, of_corruptions.kept["corruptions"], of_corruptions.figures,
            of_corruptions.intervals, score,
        )  # fmt: skip
        draw_extremes(folder / files[2], run, split.val, of_test.index, uncertainty_M, SHOWN, score)
        parts = (of_neighbours, of_guesses, of_corruptions)
        return {
            "metrics": {key: value for part in parts for key, value in part.figures.items()},
            "intervals": {key: list(value) for part in parts for key, value in part.intervals.items()},
            **{key: value for part in parts for key, value in part.kept.items()},
            "uncertainty": {key: float(getattr(uncertainty_M, key)()) for key in ("mean", "std", "min", "max")},
            "plots": files,
        }

    settings = {
        "score": score,
        "corruptions": CORRUPTIONS,
        "corrupted_images": CORRUPTED_IMAGES,
        "held_out_share": HOLDOUT_SHARE,
        "dtype": dtype,
        "features": CACHE_VERSION,
        "classifier": lbfgs.CONSTANTS,
    }
    request = {
        "evaluation": "uncertainty",
        "protocol": PROTOCOL,
        "settings": settings,
        "seed": seed,
        **encoder.describe(),
        **about,
    }
    return load_or_compute(encoder.run_dir, name, request, measure)


def neighbour_figures(features: Features, uncertainty_M: np.ndarray, device: torch.device, seed: int) -> Measured:
    """r_auroc, which is missing where every nearest neighbour is right or every one is wrong, and recall_at_1."""
    wrong_M = nearest_is_wrong(features.h, features.label, device=device)
    both = 0 < wrong_M.sum() < len(wrong_M)

    with progress("Intervals of r_auroc", metrics.RESAMPLES + 1, "resamples") as advance:

        def figures_of(rows) -> dict[str, float]:
            advance(1)
            area = {"r_auroc": r_auroc(uncertainty_M[rows], wrong_M[rows])} if both else {}
            return {**area, "recall_at_1": 1 - float(wrong_M[rows].mean())}

        return Measured(figures_of(slice(None)), bootstrap_intervals(len(wrong_M), figures_of, seed), {})


def guess_figures(
    of_train: Features, of_test: Features, uncertainty_M: np.ndarray, device: torch.device, seed: int
) -> Measured:
    """Of a logistic regression on h: accuracy, ece and nll, before and after temperature scaling; the area under its
    risk-coverage curve (`aurc`) with the images in the order of their uncertainty, and in that of its own confidence.

    Fitted on nine tenths of the training images; the temperature is chosen on the last tenth. The test images choose
    nothing.
    """
    fit_rows, held_rows = holdout_split(of_train.label, seed)
    with progress("Logistic regressions", len(lbfgs.PENALTIES) + 1, "fits") as advance:
        fitted = fit_lbfgs(of_train.h[fit_rows], of_train.label[fit_rows], seed=seed, device=device, advance=advance)
    classifier, class_C = fitted.classifier, fitted.classifier.class_C.numpy()
    temperature = fit_temperature(classifier.logits(of_train.h[held_rows]), of_train.label[held_rows], class_C)

    logits_MC = classifier.logits(of_test.h).double()
    plain, scaled = (
        classification_metrics(logits_MC / divisor, of_test.label, class_C, seed=seed) for divisor in (1, temperature)
    )
    named = {
        "accuracy": (plain, "accuracy"), "ece": (plain, "ece"), "ece_scaled": (scaled, "ece"), "nll": (plain, "nll"),
        "nll_scaled": (scaled, "nll"),
    }  # fmt: skip
    named = {new: (scores, old) for new, (scores, old) in named.items() if old in scores.metrics}
    figures = {new: scores.metrics[old] for new, (scores, old) in named.items()}
    intervals = {new: scores.intervals[old] for new, (scores, old) in named.items()}

    wrong_M = class_C[logits_MC.numpy().argmax(axis=1)] != of_test.label
    orders = {"": uncertainty_M, "_confidence": 1 - logits_MC.softmax(dim=1).max(dim=1).values.numpy()}

    def areas(rows) -> dict[str, float]:
        least, found = aurc(wrong_M[rows], wrong_M[rows]), {}
        for key, order_M in orders.items():
            found[f"aurc{key}"] = aurc(order_M[rows], wrong_M[rows])
            found[f"e_aurc{key}"] = found[f"aurc{key}"] - least  # as `e_aurc` does, but the least one is found once
        return found

    figures |= areas(slice(None))
    intervals |= bootstrap_intervals(len(wrong_M), areas, seed)
    curves = {"uncertainty": uncertainty_M, "confidence": orders["_confidence"], "oracle": wrong_M}
    count_P = np.unique(-(-np.arange(1, CURVE_POINTS + 1) * len(wrong_M) // CURVE_POINTS))
    kept = {"coverage": (count_P / len(wrong_M)).tolist()}
    kept |= {key: risk_coverage(order_M, wrong_M)[count_P - 1].tolist() for key, order_M in curves.items()}
    chosen = {**fitted.chosen, "temperature": temperature}
    hyperparameters = {**fitted.hyperparameters, "held_out_for_temperature": len(held_rows)}
    return Measured(
        figures, intervals,
        {"chosen": chosen, "candidates": fitted.candidates, "hyperparameters": hyperparameters, "risk_coverage": kept},
    )  # fmt: skip


def corrupted(encoder: RunEncoder, data: BetonSubset, features: Features, seed: int) -> np.ndarray:
    """`embed_versions` of some of the test images: a function of (ids, seed), whatever their order in the file."""
    views = encoder.recipe.views
    loader = eval_loader(data, views, encoder.device)
    loader.rows = loader.rows[some_images(features.index, CORRUPTED_IMAGES, seed)]
    with progress("Corrupted images", len(VERSIONS) * len(loader.rows), "images") as advance:
        return embed_versions(encoder.model, loader, views, seed, advance=advance)


def corruption_figures(versions_VN: np.ndarray, seed: int) -> Measured:
    """spearman_NAME: the mean over images of the correlation of uncertainty with strength. crop_larger: the share of
    crops that are less certain than their whole (as certain counts half), over all sizes, and of each
    (crop_larger_75: of three quarters of the area).

    versions_VN: uncertainties of the VERSIONS of N images. The result keeps the mean of them at each strength.
    """
    curves = {
        name: versions_VN[[0, *(v for v, (of, _) in enumerate(VERSIONS) if of == name)]].T for name in CORRUPTIONS
    }  # (N, 6) each, the clean image first
    whole_N1, crop_NS = curves["crop"][:, :1], curves["crop"][:, 1:]
    larger_NS = (crop_NS > whole_N1) + 0.5 * (crop_NS == whole_N1)
    columns = {f"spearman_{name}": strength_correlation(curve_NS) for name, curve_NS in curves.items()}
    columns["crop_larger"] = larger_NS.mean(axis=1)
    columns |= {f"crop_larger_{100 * share:g}": x_N for share, x_N in zip(CORRUPTIONS["crop"], larger_NS.T)}
    means = {(name, s): x_N for name, curve_NS in curves.items() for s, x_N in enumerate(curve_NS.T)}
    values_NF = np.stack([*columns.values(), *means.values()], axis=1, dtype=np.float64)

    def figures_of(rows) -> dict:
        return dict(zip([*columns, *means], values_NF[rows].mean(axis=0).tolist()))

    figures, intervals = figures_of(slice(None)), bootstrap_intervals(len(values_NF), figures_of, seed)
    kept = {
        name: {
            "strengths": list(strengths),
            "mean": [figures[name, s] for s in range(len(strengths) + 1)],  # from that of the clean image on
            "intervals": [list(intervals[name, s]) for s in range(len(strengths) + 1)],
        }
        for name, strengths in CORRUPTIONS.items()
    }
    kept["images"] = len(values_NF)
    return Measured(
        {key: figures[key] for key in columns}, {key: intervals[key] for key in columns}, {"corruptions": kept}
    )
