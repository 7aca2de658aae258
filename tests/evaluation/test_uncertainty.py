"""`fastssl eval uncertainty`: its metrics against brute force, the corruptions, the result files and tables."""

import dataclasses
import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score
from small_models import features_of, make_run
from table_widths import rendered, tables_of
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from fastssl import cli
from fastssl.beton import build_beton, read_metadata
from fastssl.common.errors import UserError
from fastssl.evaluation import (
    BetonSubset,
    evaluate_knn,
    evaluate_uncertainty,
    features,
    find_evaluation_data,
    fit_lbfgs,
    load_run_encoder,
    metrics,
    result_table,
    summarize_runs,
    summary_table,
    uncertainty,
)
from fastssl.evaluation.features import Features, eval_loader
from fastssl.evaluation.uncertainty import (
    CORRUPTIONS,
    aurc,
    corrupt,
    evaluate,
    fit_temperature,
    nearest_is_wrong,
    neighbor_distance,
    plots,
    r_auroc,
    risk_coverage,
    strength_correlation,
)
from fastssl.evaluation.uncertainty.corruptions import embed_versions, some_images
from fastssl.models import build_model


@pytest.fixture(autouse=True)
def less_of_everything(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    monkeypatch.setattr(features, "BATCH_SIZE", 12)
    monkeypatch.setattr(evaluate, "fit_lbfgs", partial(fit_lbfgs, penalties=(1.0, 0.1)))


def data_of(folder):
    return {"train": str(folder / "train.beton"), "val": str(folder / "val.beton")}


def opened(run_dir, **options):
    encoder = load_run_encoder(run_dir, device="cpu", **options)
    return encoder, find_evaluation_data(encoder)


# Figures


def test_nearest_other_image_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    h, label = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(4, size=60)
    h[7] = h[50]  # exact copies: each other's nearest, not their own
    h[8] = h[9] = h[51] = 3 * h[10]
    label[50], label[7], label[59] = 0, 1, 9  # the last one is alone in its class
    label[[8, 9, 10, 51]] = 2
    unit = h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
    expected = []
    for i in range(60):
        nearest = max((j for j in range(60) if j != i), key=lambda j: float(unit[i] @ unit[j]))
        expected.append(label[nearest] != label[i])
    wrong = nearest_is_wrong(h, label)
    assert wrong.tolist() == expected
    assert wrong[50] and wrong[7] and wrong[59] and not wrong[[8, 9, 10, 51]].any()
    np.testing.assert_array_equal(nearest_is_wrong(torch.from_numpy(h), torch.from_numpy(label)), wrong)
    with pytest.raises(ValueError, match="single image"):
        nearest_is_wrong(h[:1], label[:1])


def test_r_auroc_is_the_share_of_correctly_ordered_pairs():
    rng = np.random.default_rng(1)
    score, wrong = rng.integers(6, size=80) / 7, rng.random(80) < 0.3  # many ties
    pairs = [(a > b) + 0.5 * (a == b) for a in score[wrong] for b in score[~wrong]]
    assert r_auroc(score, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert r_auroc(1000 * score, wrong) == r_auroc(score, wrong)  # scores need not lie in 0 to 1
    assert r_auroc(wrong, wrong) == 1 and r_auroc(~wrong, wrong) == 0 and r_auroc(np.ones(80), wrong) == 0.5
    assert np.isnan(r_auroc(score, np.ones(80, bool))) and np.isnan(r_auroc(score, np.zeros(80, bool)))


def test_risk_is_the_mean_over_all_orders_of_ties():
    score, wrong = np.array([2.0, 1.0, 2.0, 2.0, 3.0, 1.0, 0.5]), np.array([1, 0, 0, 1, 1, 1, 0], bool)
    curves = []
    for order in itertools.permutations(range(7)):
        if all(score[a] <= score[b] for a, b in itertools.pairwise(order)):
            curves.append([np.mean(wrong[list(order[: n + 1])]) for n in range(7)])
    assert len(curves) == 2 * 6
    np.testing.assert_allclose(risk_coverage(score, wrong), np.mean(curves, axis=0), atol=1e-12)
    assert aurc(score, wrong) == pytest.approx(np.mean(curves), abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(7)
    assert aurc(score[shuffled], wrong[shuffled]) == pytest.approx(aurc(score, wrong), abs=1e-12)


def test_aurc_equals_a_loop_and_is_between_the_best_and_the_worst_order():
    rng = np.random.default_rng(2)
    score, wrong = rng.normal(size=200), rng.random(200) < 0.4
    total, errors = 0.0, 0
    for n, i in enumerate(sorted(range(200), key=lambda i: score[i]), start=1):
        errors += wrong[i]
        total += errors / n
    assert aurc(score, wrong) == pytest.approx(total / 200, abs=1e-12)
    assert aurc(torch.from_numpy(score), torch.from_numpy(wrong)) == aurc(score, wrong)
    constant = np.full(200, 0.7)
    assert aurc(constant, wrong) == pytest.approx(wrong.mean(), abs=1e-12)
    np.testing.assert_allclose(risk_coverage(constant, wrong), wrong.mean(), atol=1e-12)
    assert aurc(wrong, wrong) < aurc(score, wrong) < aurc(~wrong, wrong)
    # With many images, the smallest area at an error rate r is close to r + (1 - r) ln(1 - r) (arXiv 1805.08206).
    many = np.arange(100_000) < 40_000
    assert aurc(many, many) == pytest.approx(0.4 + 0.6 * np.log(0.6), abs=1e-4)


def test_strength_correlation_equals_scipys_spearman_per_image():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(size=(20, 6)), rng.integers(3, size=(30, 6)).astype(float)])
    values = np.concatenate([values, [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [0.3] * 6]])
    found = strength_correlation(values)
    for row, value in zip(values, found):
        expected = 0.0 if len(set(row)) == 1 else stats.spearmanr(row, range(6)).statistic
        assert value == pytest.approx(expected, abs=1e-12)
    assert found[-3:].tolist() == pytest.approx([1, -1, 0])


def test_temperature_is_the_best_of_a_grid():
    rng = np.random.default_rng(4)
    classes = np.array([2, 5, 11])
    logits = rng.normal(size=(500, 3))
    probability = torch.from_numpy(logits).softmax(dim=1).numpy()
    label = classes[[rng.choice(3, p=p) for p in probability]]
    column = np.searchsorted(classes, label)

    def nll(t):
        return -torch.from_numpy(logits / t).log_softmax(dim=1).numpy()[np.arange(500), column].mean()

    found = fit_temperature(logits, label, classes)
    assert 0.8 < found < 1.25  # labels were drawn from these logits
    assert nll(found) <= min(nll(t) for t in np.geomspace(0.02, 50, 2001)) + 1e-9
    assert fit_temperature(7 * logits, label, classes) == pytest.approx(7 * found, rel=1e-4)
    right = np.eye(3)[column]
    assert 0.01 <= fit_temperature(right, label, classes) < 0.05  # all right: confidence can hardly be too high


def test_neighbor_distance_equals_a_sorted_row():
    rng = np.random.default_rng(5)
    bank, query = rng.normal(size=(40, 6)), rng.normal(size=(9, 6))
    cosine = (query / np.linalg.norm(query, axis=1)[:, None]) @ (bank / np.linalg.norm(bank, axis=1)[:, None]).T
    for k in (1, 7, 40):
        np.testing.assert_allclose(neighbor_distance(bank, query, k), np.sort(1 - cosine)[:, k - 1], atol=1e-12)
    np.testing.assert_array_equal(neighbor_distance(bank, query, 99), neighbor_distance(bank, query, 40))


def overconfident(seed=0, count=900, classes=4):
    """Few features whose classes overlap, so that a classifier overfits them; one class has one image."""
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(count - 1) % classes, [classes]])
    h = rng.normal(size=(count, 30)).astype(np.float32)
    h[np.arange(count), label] += 1.5
    sigma = np.exp(rng.normal(size=(count, 8))).astype(np.float32)
    return Features(h, label, np.arange(count), None, sigma, "z")


def test_calibration_is_measured_at_the_temperature_and_equals_torchmetrics():
    of_train, of_test = overconfident(0, 120), overconfident(1)
    measured = evaluate.prediction_metrics(of_train, of_test, of_test.sigma.mean(axis=1), torch.device("cpu"), seed=0)
    figures, chosen = measured.metrics, measured.fields["chosen"]
    fit, held = evaluate.holdout_split(of_train.label, 0)
    classifier = evaluate.fit_lbfgs(of_train.h[fit], of_train.label[fit]).classifier
    assert chosen["temperature"] == fit_temperature(classifier.logits(of_train.h[held]), of_train.label[held], range(5))
    logits, label = classifier.logits(of_test.h).double(), torch.from_numpy(of_test.label)
    for name, divisor in (("ece", 1.0), ("ece_scaled", chosen["temperature"])):
        probability = (logits / divisor).softmax(dim=1)
        expected = multiclass_calibration_error(probability, label, num_classes=5, n_bins=15, norm="l1").item()
        assert figures[name] == pytest.approx(expected, abs=1e-6)
        loss = nn.functional.cross_entropy(logits / divisor, label).item()
        assert figures[name.replace("ece", "nll")] == pytest.approx(loss, abs=1e-9)
    wrong = logits.argmax(dim=1).numpy() != of_test.label
    assert figures["accuracy"] == pytest.approx(1 - wrong.mean(), abs=1e-12)
    assert figures["aurc"] == aurc(of_test.sigma.mean(axis=1), wrong)
    doubt = 1 - logits.softmax(dim=1).max(dim=1).values.numpy()
    least = aurc(wrong, wrong)
    assert figures["aurc_confidence"] == aurc(doubt, wrong)
    assert figures["e_aurc_confidence"] == aurc(doubt, wrong) - least
    assert figures["e_aurc_confidence"] < figures["e_aurc"]  # this sigma is random
    curve = measured.fields["risk_coverage"]
    assert curve["coverage"] == [n / 100 for n in range(1, 101)]
    for key in ("uncertainty", "confidence", "oracle"):
        assert curve[key][-1] == pytest.approx(wrong.mean())
    assert curve["confidence"][49] == pytest.approx(wrong[np.argsort(doubt, kind="stable")[:450]].mean())


def test_nothing_is_chosen_on_test_images():
    of_train, of_test = overconfident(0, 120), overconfident(1, 200)
    poisoned = dataclasses.replace(of_test, label=(of_test.label + 1) % 4)
    chosen = []
    for test in (of_test, poisoned):
        measured = evaluate.prediction_metrics(of_train, test, test.sigma.mean(axis=1), torch.device("cpu"), seed=3)
        chosen.append((measured.fields["chosen"], measured.fields["candidates"], measured.fields["hyperparameters"]))
        assert (measured.metrics["accuracy"] > 0.4) == (test is of_test)
    assert chosen[0] == chosen[1]


def test_undefined_metrics_are_left_out():
    alone = Features(np.eye(5, dtype=np.float32) + 0.1, np.arange(5), np.arange(5))  # all wrong
    found = evaluate.neighbor_metrics(alone, np.arange(5.0), torch.device("cpu"), 0)
    assert found.metrics == {"recall_at_1": 0.0} and found.intervals == {"recall_at_1": (0.0, 0.0)}


# Corruptions


@pytest.fixture(scope="module")
def images():
    """(uint8 images of 40 x 56, ids): smooth, with an edge."""
    rng = np.random.default_rng(0)
    made = [
        np.array(Image.fromarray(rng.integers(256, size=(5, 7, 3), dtype=np.uint8)).resize((56, 40), Image.BICUBIC))
        for _ in range(8)
    ]
    made = np.stack(made)
    made[:, 10:30, 20:40] = 250
    return made, np.array([3, 1, 4, 159, 26, 5, 35, 1_000_000])


@pytest.mark.parametrize("name", ["blur", "noise", "jpeg"])
def test_corruption_grows_with_strength(images, name):
    image, index = images
    difference = [
        np.abs(corrupt(image, index, name, s).astype(float) - image).mean(axis=(1, 2, 3)) for s in CORRUPTIONS[name]
    ]
    assert (np.diff([np.zeros(8), *difference], axis=0) > 0).all()
    assert np.array(difference)[-1].mean() > 4 * np.array(difference)[0].mean() or name == "jpeg"
    # The mean color does not change.
    weak = corrupt(image, index, name, CORRUPTIONS[name][0]).astype(float).mean(axis=(1, 2))
    np.testing.assert_allclose(weak, image.astype(float).mean(axis=(1, 2)), atol=3)


def test_noise_has_its_deviation_and_blur_scales_with_the_image(images):
    grey, index = np.full((3, 64, 64, 3), 128, np.uint8), np.arange(3)
    for deviation in CORRUPTIONS["noise"][:3]:
        noisy = corrupt(grey, index, "noise", deviation).astype(float)
        assert noisy.std() == pytest.approx(255 * deviation, rel=0.03) and noisy.mean() == pytest.approx(128, abs=0.5)
    image = images[0][:1]
    double = image.repeat(2, axis=1).repeat(2, axis=2)
    small, large = (corrupt(x, index[:1], "blur", 0.05).astype(float) for x in (image, double))
    means = large.reshape(1, 40, 2, 56, 2, 3).mean(axis=(2, 4))
    assert np.abs(means - small).mean() < 1.5 < np.abs(image - small).mean() / 2


def test_smaller_crops_lie_inside_larger_ones(images):
    _, index = images
    row, column = np.mgrid[:40, :56]
    places = np.stack([row, column, 0 * row], axis=-1).astype(np.uint8)[None].repeat(8, axis=0)  # pixels say where
    before = [(0, 0, 40, 56)] * 8
    for share in CORRUPTIONS["crop"]:
        crops = corrupt(places, index, "crop", share)
        height, width = crops.shape[1:3]
        assert height * width == pytest.approx(share * 40 * 56, rel=0.06)
        assert height / width == pytest.approx(40 / 56, rel=0.06)
        now = []
        for crop, (top, left, bottom, right) in zip(crops, before):
            y, x = crop[0, 0, :2].astype(int)
            np.testing.assert_array_equal(crop, places[0, y : y + height, x : x + width])
            assert top - 1 <= y and left - 1 <= x and y + height <= bottom + 1 and x + width <= right + 1
            now.append((y, x, y + height, x + width))
        assert len(set(now)) > 4  # anywhere
        before = now
    # Uniformly: the corners of many small crops fill the image.
    many = corrupt(places[:1].repeat(400, axis=0), np.arange(400), "crop", 0.1)[:, 0, 0, :2].astype(float)
    assert stats.kstest(many[:, 0] / 27, "uniform").pvalue > 0.01 and many[:, 1].max() == 56 - 18


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_do_not_depend_on_the_batch(images, name, monkeypatch):
    image, index = images
    strength = CORRUPTIONS[name][2]
    together = corrupt(image, index, name, strength, seed=2)
    for i in (0, 7):
        alone = corrupt(image[i : i + 1], index[i : i + 1], name, strength, seed=2)
        np.testing.assert_array_equal(alone[0], together[i])
    np.testing.assert_array_equal(corrupt(image[::-1], index[::-1], name, strength, seed=2), together[::-1])
    monkeypatch.setattr(uncertainty.corruptions, "NOISE_ELEMENTS", 3 * image[0].size)
    np.testing.assert_array_equal(corrupt(image, index, name, strength, seed=2), together)
    assert together.dtype == np.uint8
    if name in ("noise", "crop"):
        assert (corrupt(image, index + 1, name, strength, seed=2) != together).any()
        assert (corrupt(image, index, name, strength, seed=3) != together).any()


def test_corrupted_images_are_chosen_by_ids_and_seed():
    index = np.random.default_rng(0).permutation(5000)
    rows = some_images(index, 100, 0)
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all()
    assert set(index[rows]) == set(some_images(np.arange(5000), 100, 0).tolist())
    assert set(some_images(np.arange(5000), 50, 0)) < set(index[rows])
    assert set(some_images(np.arange(5000), 100, 1)) != set(index[rows])
    assert some_images(index[:30], 100, 0).tolist() == list(range(30))


@pytest.mark.parametrize("layout", ["canvas", "canvas_bc4", "full"])
@pytest.mark.parametrize("view", ["squash", "center"])
def test_versions_are_embedded_under_the_evaluation_transform(layout, view, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(layout)
    run, recipe, model = make_run(
        tmp_path / "run", data_of(folder), embedding={"stochastic": "z"}, views={"size": 24, "eval": view}
    )
    path = folder / "val.beton"
    expected = features_of(run, path, model=model, views=recipe.views)
    told = []
    loader = eval_loader(BetonSubset(path), recipe.views, torch.device("cpu"))
    found = embed_versions(model, loader, recipe.views, 0, told.append)
    assert found.shape == (21, 12) and found.dtype == np.float64 and sum(told) == 21 * 12
    # Blocks are decoded to pixels before they are corrupted, and resampled plane by plane otherwise.
    rtol = 0.02 if layout == "canvas_bc4" else 1e-6
    np.testing.assert_allclose(found[0], expected.sigma.mean(axis=1, dtype=np.float64), rtol=rtol)
    assert len(np.unique(found.round(9), axis=0)) == 21
    monkeypatch.setattr(features, "BATCH_SIZE", 5)
    loader = eval_loader(BetonSubset(path), recipe.views, torch.device("cpu"))
    small = embed_versions(model, loader, recipe.views, 0, told.append)
    np.testing.assert_allclose(small, found, rtol=1e-6)


def test_corruption_metrics_are_means_over_images():
    rng = np.random.default_rng(0)
    clean = rng.random(50)
    levels = {name: rng.random((5, 50)) + 0.1 * np.arange(5)[:, None] for name in ("blur", "noise", "jpeg", "crop")}
    levels["crop"][1, :10] = clean[:10]  # as certain counts half
    measured = evaluate.corruption_metrics(np.vstack([clean, *levels.values()]), seed=0)
    for name, level in levels.items():
        rho = [stats.spearmanr([clean[i], *level[:, i]], range(6)).statistic for i in range(50)]
        assert measured.metrics[f"spearman_{name}"] == pytest.approx(np.mean(rho))
        kept = measured.fields["corruptions"][name]
        np.testing.assert_allclose(kept["mean"], [clean.mean(), *level.mean(axis=1)])
        assert all(low < mean < high for mean, (low, high) in zip(kept["mean"], kept["intervals"]))
    larger = [np.mean((level > clean) + 0.5 * (level == clean)) for level in levels["crop"]]
    assert [measured.metrics[f"crop_larger_{s}"] for s in (75, 50, 35, 20, 10)] == pytest.approx(larger)
    assert measured.metrics["crop_larger"] == pytest.approx(np.mean(larger))
    assert measured.intervals.keys() == measured.metrics.keys()
    constant = evaluate.corruption_metrics(np.full((21, 9), 0.01), seed=0)
    assert {value for name, value in constant.metrics.items() if "crop_larger" not in name} == {0.0}
    assert {value for name, value in constant.metrics.items() if "crop_larger" in name} == {0.5}


# The command


FIGURES = [
    "r_auroc", "recall_at_1", "accuracy", "ece", "ece_scaled", "nll", "nll_scaled", "aurc", "e_aurc", "aurc_confidence",
    "e_aurc_confidence", "spearman_blur", "spearman_noise", "spearman_jpeg", "spearman_crop", "crop_larger",
    "crop_larger_75", "crop_larger_50", "crop_larger_35", "crop_larger_20", "crop_larger_10",
]  # fmt: skip


@pytest.mark.parametrize("stochastic", ["z", "hz", "none"])
def test_result_has_metrics_intervals_and_plots(canvas, tmp_path, stochastic, monkeypatch):
    folder, recipe, model = make_run(tmp_path / "run", data_of(canvas), embedding={"stochastic": stochastic})
    result = evaluate_uncertainty(*opened(folder))
    kept = json.loads((folder / "eval" / "uncertainty.json").read_text())
    low, high = result["aurc_minus_error"]
    assert low <= result["metrics"]["aurc"] - (1 - result["metrics"]["accuracy"]) <= high
    assert kept == result and list(result["metrics"]) == FIGURES == list(result["intervals"])
    train, val = (
        features_of(folder, canvas / f"{split}.beton", model=model, views=recipe.views) for split in ("train", "val")
    )
    if stochastic == "none":
        score = neighbor_distance(train.h, val.h, 48)
        assert result["settings"]["score"] == "cosine distance of h to training neighbor 48"
    else:
        score = val.sigma.astype(np.float64).mean(axis=1)
        assert result["settings"]["score"] == f"mean sigma of {stochastic[0]}"
    assert result["uncertainty"] == pytest.approx(
        {"mean": score.mean(), "std": score.std(), "min": score.min(), "max": score.max()}
    )
    wrong = nearest_is_wrong(val.h, val.label)
    assert result["metrics"]["r_auroc"] == pytest.approx(roc_auc_score(wrong, score), abs=1e-12)
    assert result["metrics"]["recall_at_1"] == pytest.approx(1 - wrong.mean())
    for name, value in result["metrics"].items():
        low, high = result["intervals"][name]
        assert low <= high and (low <= value <= high or "ece" in name or "aurc" in name)
    assert result["corrupted_images"] == 12
    assert result["corruptions"]["blur"]["mean"][0] == pytest.approx(score.mean(), rel=1e-5)
    sizes = [Image.open(folder / "eval" / name).size for name in result["plots"]]
    assert [width for width, _ in sizes] == [1050, 1500, 14 + 6 * 174]

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluate, "cached_features", never)
    assert evaluate_uncertainty(*opened(folder)) == result
    for constant, value in (("CORRUPTED_IMAGES", 9), ("CACHE_VERSION", 9)):
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="measured again"):
            patch.setattr(evaluate, constant, value)
            evaluate_uncertainty(*opened(folder))
    for options in ({"seed": 1}, {"dtype": "float16"}):
        with pytest.raises(AssertionError, match="measured again"):
            evaluate_uncertainty(*opened(folder), **options)


def test_number_and_ids_of_corrupted_images(canvas, tmp_path, monkeypatch):
    folder, recipe, model = make_run(tmp_path / "run", data_of(canvas), embedding={"stochastic": "h"})
    monkeypatch.setattr(evaluate, "CORRUPTED_IMAGES", 5)
    result = evaluate_uncertainty(*opened(folder), seed=4)
    found = result["corruptions"]
    val = features_of(folder, canvas / "val.beton", model=model, views=recipe.views)
    rows = some_images(val.index, 5, 4)
    assert result["corrupted_images"] == 5 and len(rows) == 5
    assert found["jpeg"]["mean"][0] == pytest.approx(val.sigma[rows].astype(np.float64).mean(), rel=1e-7)
    assert found["jpeg"]["mean"][0] != pytest.approx(val.sigma.astype(np.float64).mean(), rel=1e-7)


def test_supervised_run_with_full_layout_and_constant_sigma(full, canvas, tmp_path):
    folder, recipe, _ = make_run(tmp_path / "supervised", data_of(full))
    recipe = recipe.model_validate({**recipe.model_dump(), "objective": {"name": "supervised", "classes": 3}})
    saved = {"recipe": recipe.model_dump(mode="json"), "model": build_model(recipe).state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    supervised = evaluate_uncertainty(*opened(folder), seed=2)
    assert supervised["layout"] == "full" and "neighbor" in supervised["settings"]["score"]
    assert (folder / "eval" / "uncertainty-seed2.json").exists()

    folder, _, model = make_run(tmp_path / "constant", data_of(canvas), embedding={"stochastic": "h"})
    saved = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    for name in ("weight", "bias"):
        saved["model"][f"heads.h.log_var.{name}"].zero_()
    torch.save(saved, folder / "checkpoints" / "last.pt")
    constant = evaluate_uncertainty(*opened(folder))["metrics"]
    assert constant["r_auroc"] == 0.5 and constant["aurc"] == pytest.approx(1 - constant["accuracy"])
    assert {constant[name] for name in FIGURES if name.startswith("spearman")} == {0.0}
    assert {constant[name] for name in FIGURES if name.startswith("crop")} == {0.5}  # as certain counts half


def test_extremes_are_found_in_any_order_of_the_file(photos, tmp_path, monkeypatch):
    """A shuffled .beton, and features of a part of it."""
    build_beton("imagefolder", photos, tmp_path / "b", canvas=32, workers=1, order="shuffle")
    path = tmp_path / "b" / "train.beton"
    index = np.array(read_metadata(path)["index"])
    assert (np.diff(index) < 0).any()
    shown = []
    monkeypatch.setattr(plots, "draw_samples", lambda *args, **kwargs: shown.append(args))
    some = index[np.random.default_rng(0).permutation(48)[:30]]  # features of a part of it, in any order
    score = 1 / (1.0 + some)
    plots.draw_extremes(tmp_path / "x.png", "run", BetonSubset(path), some, score, 20, "mean sigma of z")
    _, _, ((_, least), (_, most)), notes = shown[0]
    assert (
        index[least].tolist() == sorted(some.tolist(), reverse=True)[:15]
    )  # at most half, so no image is in both groups
    assert index[most].tolist() == sorted(some.tolist())[:15]
    assert notes[least[0]] == f"σ {1 / (1 + some.max()):#.5g}, index {some.max()}"


def test_table_of_runs_has_a_line_per_metric(canvas, tmp_path, monkeypatch, capsys):
    made = [
        make_run(tmp_path / f"z{seed}", data_of(canvas), seed=seed, embedding={"stochastic": "z"})[0] for seed in (0, 1)
    ]
    made.append(make_run(tmp_path / "none", data_of(canvas))[0])
    arguments = [*map(str, made), "--out", str(tmp_path / "table.json")]
    monkeypatch.setattr("sys.argv", ["fastssl", "eval", "uncertainty", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert not end.value.code and "mean sigma of z" in out and "training neighbor 48" in out and "±" in out
    results = [evaluate_uncertainty(*opened(run)) for run in made]
    rows = summarize_runs(results)
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == [dataclasses.asdict(row) for row in rows]
    assert [len(row.runs) for row in rows] == [2, 1]
    # With one seed the neighbors of all images are wrong, so r_auroc is undefined there and in the summary.
    figures = [name for name in FIGURES if all(name in result["metrics"] for result in results[:2])]
    assert list(rows[0].metrics) == figures and len(figures) >= 20
    (table,) = tables_of(summary_table(rows), 160)
    # A line per metric that a row has, a column per row, and what is better and chance.
    assert table.row_count >= len(figures) and len(table.columns) == 1 + 2 + 2
    text = rendered(result_table(results[0]), 160)
    (one,) = tables_of(result_table(results[0]), 160)
    names, values = (list(column.cells) for column in one.columns[:2])
    assert "uncertainty: mean sigma of z, 0." in text and one.row_count == len(results[0]["metrics"])
    assert values[names.index("AURC by uncertainty")] == f"{100 * results[0]['metrics']['aurc']:.1f} %"
    assert values[names.index("NLL, scaled")] == f"{results[0]['metrics']['nll_scaled']:.2f} nats"
    assert values[names.index("correlation with blur")] == f"{results[0]['metrics']['spearman_blur']:.2f}"
    # Chance, from the labels: 12 images of three classes.
    assert results[0]["chance"]["accuracy"] == pytest.approx(1 / 3)
    # Tables of other evaluations have no uncertainty.
    knn = [evaluate_knn(*opened(run), ks=(5,)) for run in made]
    assert "uncertainty" not in rendered(result_table(knn[0]), 160)


def test_single_test_image_is_refused(canvas, photos, tmp_path):
    (tmp_path / "one" / "val" / "class1").mkdir(parents=True)
    for name in ("class0", "class2"):
        (tmp_path / "one" / "val" / name).mkdir()
    source = next((photos / "val" / "class1").iterdir())
    (tmp_path / "one" / "val" / "class1" / source.name).write_bytes(source.read_bytes())
    build_beton("imagefolder", tmp_path / "one", tmp_path / "one_b", canvas=32, workers=1)
    (path,) = (tmp_path / "one_b").glob("*.beton")
    folder, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton"), "val": str(path)})
    with pytest.raises(UserError, match="has a single image"):
        evaluate_uncertainty(*opened(folder))
