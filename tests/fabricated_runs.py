"""Run directories with recipe, log and results, as training and evaluations write them, without any training."""

import json

import numpy as np
from sklearn.metrics import roc_auc_score

from fastssl.evaluation.ood.separation import METRICS
from fastssl.recipe import load_recipe

IMAGES = 400  # test images


def fabricate_run(
    folder,
    recipe,
    seed,
    *,
    accuracies=None,
    aurocs=None,
    r_auroc=None,
    information=None,
    overrides=(),
    epochs=4,
    logged_epochs=None,
    outcomes=True,
):
    """Make a run directory.

    Args:
        recipe: name of a shipped recipe.
        accuracies: evaluation, such as "knn" -> share of the test images that are right; these images are the same for
            every run but for a few, as if some images were hard.
        aurocs: detector -> AUROC on the near set and on the far set, roughly.
        r_auroc: of the uncertainty.
        information: I(V;H) in nats.
    """
    settings = [f"seed={seed}", "data.val=data/test.beton", f"train.epochs={epochs}", *overrides]
    (folder / "eval").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(load_recipe(recipe, settings).to_yaml())
    environment = {
        "command": ["fastssl", "train", recipe, f"seed={seed}"],
        "precision": "fp32",
        "cores": 2,
        "torch_threads": 1,
        "device": "x",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [
        {"step": 10 * (e + 1), "epoch": e, "loss": 100 / (e + 1 + seed / 10), "images_per_second": 200.0 + seed,
         "data_wait": 0.01, "seconds": 60.0 * (e + 1)}
        for e in range(logged_epochs or epochs)
    ]  # fmt: skip
    lines += [{"step": lines[-1]["step"], "epoch": lines[-1]["epoch"], "knn": 0.5 + seed / 100}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for evaluation, accuracy in (accuracies or {}).items():
        _write_accuracy(folder, evaluation, accuracy, seed, outcomes)
    if aurocs:
        _write_ood(folder, aurocs, seed)
    if r_auroc is not None:
        fields = {"settings": {"score": "sigma_mean"}, "metrics": {"r_auroc": r_auroc}}
        _write_result(folder, "uncertainty", **fields)
    if information is not None:
        _write_result(folder, "mi", metrics={"I(V;H) js": information})
    return folder


def _write_result(folder, evaluation, **fields):
    result = {
        "run": str(folder), "weights": str(folder / "checkpoints" / "last.pt"), "encoder_sha256": "0" * 64, "view": {},
        "evaluation": evaluation, "protocol": "fabricated", "settings": {}, "seed": 0, "val": _images("test"),
        "fastssl": "0.1.0", "measured_at": "2026-01-01T00:00:00+00:00",
    } | fields  # fmt: skip
    (folder / "eval" / f"{evaluation}.json").write_text(json.dumps(result))


def _images(name):
    return {
        "path": f"data/{name}.beton", "images": IMAGES, "subset": None, "subset_sha256": None, "limit": None,
        "layout": "canvas", "checksum": name,
    }  # fmt: skip


def _write_accuracy(folder, evaluation, accuracy, seed, outcomes):
    hardness_M = np.random.default_rng(0).permutation(IMAGES) / IMAGES
    noise_M = 0.05 * np.random.default_rng(seed + 1).standard_normal(IMAGES)
    correct_M = np.argsort(np.argsort(hardness_M + noise_M)) < round(accuracy * IMAGES)
    metric = "accuracy_k20_t0.07" if evaluation == "knn" else "accuracy"
    value = float(correct_M.mean())
    fields = {"metrics": {metric: value}, "intervals": {metric: [value - 0.04, value + 0.04]}}
    if outcomes:
        np.savez(folder / "eval" / f"{evaluation}.correct.npz", **{metric: correct_M})
        fields["outcomes"] = f"{evaluation}.correct.npz"
    _write_result(folder, evaluation, **fields)


def _write_ood(folder, aurocs, seed):
    rng = np.random.default_rng(100 + seed)
    scores, detectors, metrics = {}, {}, {}
    for detector, (near, far) in aurocs.items():
        scores[f"id/{detector}"] = rng.standard_normal(IMAGES)
        row = {"labels": False, "norm_correlation": 0.1, "sets": {}}
        for group, name, auroc in (("near", "similar", near), ("far", "other", far)):
            shift = np.sqrt(2) * _normal_quantile(auroc)
            scores[f"{name}/{detector}"] = shift + rng.standard_normal(IMAGES)
            score = np.concatenate([scores[f"id/{detector}"], scores[f"{name}/{detector}"]])
            value = float(roc_auc_score(np.arange(2 * IMAGES) >= IMAGES, score))
            separation = {
                "metrics": dict.fromkeys(METRICS, value), "intervals": dict.fromkeys(METRICS, [value, value]),
                "inverted": False,
            }  # fmt: skip
            row["sets"][name] = row[group] = separation
            metrics[f"{detector} {group} auroc"] = value
        detectors[detector] = row
    np.savez(folder / "eval" / "ood-similar.scores.npz", **scores)
    source = {"builder": None, "source_formats": None, "own_bytes": 0.0, "source_px": [32.0, 32.0]}
    sets = {"near": {"similar": _images("similar") | source}, "far": {"other": _images("other") | source}}
    _write_result(
        folder, "ood", metrics=metrics, detectors=detectors, skipped={}, scores="ood-similar.scores.npz", **sets
    )


def _normal_quantile(share):
    from scipy.stats import norm

    return float(norm.ppf(share))
