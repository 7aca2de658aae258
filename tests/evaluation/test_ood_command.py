"""`fastssl eval ood` on small runs: inputs of the detectors, result files, tables and refused data sets."""

import copy
import json
import sys
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from figure_checks import check_figure, saved_figures, shown_texts
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr
from small_models import features_of, make_run

from fastssl import cli
from fastssl.beton import build_beton, read_header
from fastssl.common.errors import UserError
from fastssl.evaluation import fit_lbfgs, load_run_encoder, summarize_runs
from fastssl.evaluation.features import eval_loader
from fastssl.evaluation.ood import (
    DETECTORS,
    LABEL_BASED,
    OWN_UNCERTAINTY,
    detector,
    draw_ood_sheet,
    evaluate,
    evaluate_ood,
    find_sets,
    metrics,
    ood_summary,
    ood_summary_table,
    ood_table,
    separation,
    suites,
    summarized_detectors,
)
from fastssl.evaluation.ood.evaluate import embedding_prior, linear_head, odin_logits
from fastssl.evaluation.ood.separation import compare
from fastssl.evaluation.ood.suites import OODSets, result_name
from fastssl.evaluation.runs import BetonSubset
from fastssl.views import eval_transform

draw_ood_plots = evaluate.plots.draw_ood_plots
SLOW = {name for name, kind in DETECTORS.items() if kind.jacobian_of}
NOT_ASKED_FOR = "slow; --jepa-images 200 computes it, of 200 images a set"
Q = {name for name, kind in DETECTORS.items() if {"mu", "sigma"} & kind.arrays()}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Betons of noise, of stripes and of one flat color each, under folders of these names, canvas 32."""
    root, out, rng = tmp_path_factory.mktemp("others"), tmp_path_factory.mktemp("built"), np.random.default_rng(0)
    for name in ("noise", "stripes", "flat"):
        (root / name).mkdir()
        for number in range(9):
            pixels = rng.integers(256, size=(40, 40, 3), dtype=np.uint8)
            pixels = {"noise": pixels, "stripes": np.tile(pixels[:, :1], (1, 40, 1)),
                      "flat": np.tile(pixels[:1, :1], (40, 40, 1))}[name]  # fmt: skip
            Image.fromarray(pixels).save(root / name / f"{number}.png")
        build_beton("imagefolder", root / name, out / name, canvas=32, workers=1)
    return out


@pytest.fixture(autouse=True)
def faster(request, monkeypatch):
    """Plots take longer than everything else here, so only one test draws them. Two penalties instead of thirteen."""
    monkeypatch.setattr(evaluate, "fit_lbfgs", partial(fit_lbfgs, penalties=(1.0, 0.1)))
    if "every_detector_of" not in request.node.name:
        monkeypatch.setattr(evaluate.plots, "draw_ood_plots", lambda *arguments: None)


def run_of(folder, canvas, **sections):
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    return make_run(folder, data, **sections)


def sets_of(encoder, others, **options):
    near, far = [others / "stripes/train.beton"], [others / "noise/train.beton", others / "flat/train.beton"]
    return find_sets(encoder, near=near, far=far, **options)


def test_every_detector_of_a_stochastic_run(canvas, others, tmp_path, monkeypatch):
    folder, recipe, model = run_of(tmp_path / "run", canvas, embedding={"stochastic": "z", "prior": "mixture"})
    encoder = load_run_encoder(folder, device="cpu")
    sets = sets_of(encoder, others)
    result = evaluate_ood(encoder, sets)
    assert set(result["detectors"]) == set(DETECTORS) - SLOW - {"knn_supervised"}
    assert result["skipped"] == {
        "knn_supervised": "the encoder was trained without labels", **dict.fromkeys(SLOW, NOT_ASKED_FOR)
    }  # fmt: skip
    assert json.loads((folder / "eval" / "ood-near-stripes-far-noise-flat.json").read_text()) == result

    # The scores are those of detectors fitted here on the cached features.
    scores = np.load(folder / "eval" / result["scores"])
    paths = {"fit": canvas / "train.beton", "id": canvas / "val.beton"}
    paths |= {name: others / name / "train.beton" for name in ("stripes", "noise", "flat")}
    of = {name: features_of(folder, path, model=model, views=recipe.views) for name, path in paths.items()}
    pair = {
        name: features_of(folder, path, model=model, views=recipe.views, augmented=True) for name, path in paths.items()
    }
    weight, bias = linear_head(encoder, of["fit"], seed=0)
    for name in (
        "sigma_mean",
        "prior_kl",
        "views_sigma",
        "views_disagreement",
        "knn_cosine",
        "energy",
        "mahalanobis",
        "odin",
    ):
        fitted = detector(name, prior=model.priors["z"])

        def arrays(part, name=name):
            x = pair[part] if DETECTORS[name].of_views else of[part]
            data = {"fit": sets.fit, "id": sets.id, **sets.ood}[part]
            logits = of[part].h.astype(float) @ weight.numpy().T + bias.numpy()
            return {
                "features": x.h, "mu": x.mu, "sigma": x.sigma,
                "logits": odin_logits(encoder, data, (weight, bias)) if name == "odin" else logits,
            }  # fmt: skip

        fitted.fit(labels=of["fit"].label, **arrays("fit"))
        for part in ("id", "stripes", "noise", "flat"):
            np.testing.assert_allclose(scores[f"{part}/{name}"], fitted.score(**arrays(part)), rtol=1e-9)
        row = result["detectors"][name]
        figures = {other: metrics(scores[f"id/{name}"], scores[f"{other}/{name}"]) for other in sets.ood}
        assert {other: row["sets"][other]["metrics"] for other in figures} == figures
        assert row["near"]["metrics"] == pytest.approx(figures["stripes"])
        far = (figures["noise"]["auroc"] + figures["flat"]["auroc"]) / 2
        assert row["far"]["metrics"]["auroc"] == pytest.approx(far) == result["metrics"][f"{name} far auroc"]
        low, high = row["far"]["intervals"]["auroc"]
        assert low <= far <= high and row["labels"] == (name in LABEL_BASED)
    np.testing.assert_array_equal(scores["noise/index"], of["noise"].index)
    length = np.linalg.norm(of["id"].h, axis=1)
    expected = spearmanr(scores["id/sigma_mean"], length).statistic
    assert result["detectors"]["sigma_mean"]["norm_correlation"] == pytest.approx(expected)
    assert result["settings"] == {**evaluate.CONSTANTS, "pytorch_ood": "0.4.0"} | result["settings"]
    assert set(evaluate.CONSTANTS) < set(result["settings"]) and result["augmentation"]["size"] == 16
    for kind in ("histograms", "roc", "auroc"):
        assert Image.open(folder / "eval" / f"ood-near-stripes-far-noise-flat.{kind}.png").size[0] > 300

    check_summary(result)
    check_sheet(tmp_path / "sheet.png", encoder, sets, result)

    # Shown again, not measured again.
    monkeypatch.setattr(evaluate, "detector_arrays", None)
    assert evaluate_ood(encoder, sets_of(encoder, others))["measured_at"] == result["measured_at"]
    with pytest.raises(TypeError):
        evaluate_ood(encoder, sets_of(encoder, others), seed=1)


def check_summary(result):
    """The run's own uncertainty, and the best detectors of those that are inverted nowhere, with intervals."""
    for width in (40, 60, 80, 160):
        lines = text_of(ood_summary(result, width), width).splitlines()
        assert max(map(len, lines)) <= min(width, 80) and "…" not in "".join(lines)
    rows = {line[:18].strip(): line[18:].split() for line in lines[1:4]}
    assert list(rows) == ["own uncertainty", "best label-free", "best label-based"]
    assert rows["own uncertainty"][0] == OWN_UNCERTAINTY
    for kind, labels in (("best label-free", False), ("best label-based", True)):
        name, near, near_interval, far, _ = rows[kind]
        found = {
            each: row["near"]["metrics"]["auroc"] + row["far"]["metrics"]["auroc"]
            for each, row in result["detectors"].items() if row["labels"] == labels
        }  # fmt: skip
        sound = [each for each in found if not any(x["inverted"] for x in result["detectors"][each]["sets"].values())]
        assert found[name] == max(found[each] for each in sound or found)
        row = result["detectors"][name]
        low, high = row["near"]["intervals"]["auroc"]
        assert near_interval == f"({100 * low:.1f}-{100 * high:.1f})"
        assert (float(near) + float(far)) / 100 == pytest.approx(found[name], abs=0.001)
    assert "upper bounds" in " ".join(lines[4:])
    own_is_best = copy.deepcopy(result)
    for group in ("near", "far"):
        own_is_best["metrics"][f"{OWN_UNCERTAINTY} {group} auroc"] = 2.0
    assert "own uncertainty, best label-free" in " ".join(text_of(ood_summary(own_is_best, 80), 80).split())


def test_an_inverted_detector_is_the_best_one_only_if_all_of_its_kind_are():
    aurocs = {"energy": 0.9, "msp": 0.8, "knn_cosine": 0.7, "pca_residual": 0.6}
    metrics = {f"{name} {group} auroc": value for name, value in aurocs.items() for group in ("near", "far")}
    chosen = {"knn_cosine": ["best label-free"], "energy": ["best label-based"]}
    assert summarized_detectors(metrics, []) == chosen
    chosen = {"knn_cosine": ["best label-free"], "msp": ["best label-based"]}
    assert summarized_detectors(metrics, ["energy"]) == chosen
    chosen = {"pca_residual": ["best label-free"], "energy": ["best label-based"]}
    assert summarized_detectors(metrics, ["energy", "msp", "knn_cosine"]) == chosen


def check_sheet(path, encoder, sets, result):
    """All four panels hold something: more colors than white and the black of text."""
    with saved_figures() as figures:
        draw_ood_sheet(path, encoder, sets, result, {"id": "known", "stripes": "$a_$"})
    check_figure(figures[0])
    assert "\nknown\n" in words_of(figures[0])
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] == 1500 and 1000 < pixels.shape[0] < 1300
    for rows in (slice(100, 550), slice(650, 1050)):
        for columns in (slice(50, 730), slice(780, 1450)):
            assert 0.005 < (pixels[rows, columns] < 250).mean() < 0.95


def words_of(figure) -> str:
    """All texts of a figure, one a line; their own lines are joined."""
    return "\n".join(["", *(text.get_text().replace("\n", " ") for text in shown_texts(figure)), ""])


def text_of(table, width):
    console = Console(width=width, record=True, file=StringIO())
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_detectors_skipped_for_a_deterministic_run_are_shown(canvas, others, tmp_path):
    folder, _, _ = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    result = evaluate_ood(encoder, sets_of(encoder, others))
    assert set(result["skipped"]) == Q | SLOW | {"knn_supervised"} and len(Q) == 9
    summary = text_of(ood_summary(result, 80), 80)
    assert "best label-free" in summary and "own uncertainty" not in summary
    with pytest.raises(
        UserError, match="is deterministic, and the sheet shows .* with embedding.stochastic=z, h or hz"
    ):
        draw_ood_sheet(tmp_path / "sheet.png", encoder, sets_of(encoder, others), result)
    assert {result["skipped"][name] for name in Q} == {"the embedding is deterministic"}
    for name, row in result["detectors"].items():  # as if this were so, to see where it stands
        for other in row["sets"]:
            row["sets"][other]["inverted"] = name == "energy" and other == "noise"
    shown = text_of(ood_table(result), 200)
    (line,) = [line for line in shown.splitlines() if line.endswith("1 of 3")]
    assert line.startswith(" energy *") and line.count("!") == 1
    assert "skipped: knn_supervised: the encoder was trained without labels" in shown
    text = " ".join(shown.split())  # a caption with long paths is wrapped anywhere
    assert "source: PNG, 40x40 px" in text and "source: JPEG, 73.5x74 px" in text  # the medians of the fixtures
    assert "There is no sigma to use: the embedding is deterministic." in text
    text = text_of(ood_table(result), 80)
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert [line.split()[0] for line in text.splitlines() if line.endswith("1 of 3")] == ["energy"]
    assert all(f"{100 * row['near']['metrics']['auroc']:.1f}" in text for row in result["detectors"].values())
    for name, row in result["detectors"].items():
        assert f"{name}{' *' if name in LABEL_BASED else ''} " in text
        assert f" {name}{' *' if name in LABEL_BASED else ''} " in shown
        assert f"{100 * row['near']['metrics']['auroc']:.1f}" in shown


def test_supervised_run_uses_its_own_logits(canvas, others, tmp_path):
    folder, recipe, model = run_of(
        tmp_path / "run", canvas, objective={"name": "supervised", "classes": 3}, embedding={"stochastic": "h"}
    )
    encoder = load_run_encoder(folder, device="cpu")
    result = evaluate_ood(encoder, sets_of(encoder, others))
    assert set(result["detectors"]) == set(DETECTORS) - SLOW
    assert result["skipped"] == {"jepa_score": NOT_ASKED_FOR, "jepa_score_mu": "mu is h, so it is jepa_score"}
    scores = np.load(folder / "eval" / result["scores"])
    of_id = features_of(folder, canvas / "val.beton", model=model, views=recipe.views)
    logits = model.eval().mean_z(torch.tensor(of_id.h)).numpy()
    np.testing.assert_allclose(scores["id/max_logit"], -logits.max(axis=1), rtol=1e-5)
    words = sheet_words(tmp_path, encoder, sets_of(encoder, others), result)
    assert ", trained with labels: good if" in words and "Map of the representations: trained with labels" in words
    assert "without labels" not in words and "get similar embeddings" not in words
    assert "\nID images\n" in words

    self_supervised, _, _ = run_of(tmp_path / "barlow", canvas, embedding={"stochastic": "h"})
    encoder = load_run_encoder(self_supervised, device="cpu")
    sets = sets_of(encoder, others)
    words = sheet_words(tmp_path, encoder, sets, evaluate_ood(encoder, sets))
    assert words.count("trained without labels") == 2 and "get similar embeddings" in words
    assert "with labels" not in words


def sheet_words(tmp_path, encoder, sets, result) -> str:
    with saved_figures() as figures:
        draw_ood_sheet(tmp_path / "sheet.png", encoder, sets, result)
    return words_of(figures[0])


@pytest.mark.parametrize("stochastic, stored", [("none", "canvas_bc4"), ("h", "canvas"), ("z", "canvas")])
def test_odin_moves_images_by_the_gradient_of_the_whole_encoder(stochastic, stored, request, tmp_path):
    canvas = request.getfixturevalue(stored)
    folder, recipe, model = run_of(tmp_path / "run", canvas, embedding={"stochastic": stochastic})
    encoder = load_run_encoder(folder, device="cpu")
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 96).double(), torch.randn(3).double()
    found = odin_logits(encoder, BetonSubset(canvas / "val.beton"), (weight, bias))
    assert found.shape == (12, 3)

    (batch,) = eval_loader(BetonSubset(canvas / "val.beton"), recipe.views, torch.device("cpu"))
    x = eval_transform(recipe.views)(batch.image, batch.height, batch.width)[batch.valid].requires_grad_()
    model.eval()

    def logits_of(images):
        h = model.encoder(images)
        h = model.heads["h"](h).mu if stochastic == "h" else h
        return F.linear(h, weight.float(), bias.float())

    first = logits_of(x) / 1000
    (slope,) = torch.autograd.grad(F.cross_entropy(first, first.argmax(1)), x)
    moved = x - 0.0014 * slope.sign() / torch.tensor(recipe.views.std).view(3, 1, 1)
    np.testing.assert_allclose(found, logits_of(moved).detach(), rtol=1e-3, atol=1e-3)
    plain = logits_of(x).detach().numpy()
    assert np.abs(found - plain).max() > 10 * np.abs(found - logits_of(moved).detach().numpy()).max()
    assert all(p.grad is None for p in encoder.model.parameters())


def test_standardization_is_folded_into_the_classifier(canvas, tmp_path):
    folder, recipe, model = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    of_fit = features_of(folder, canvas / "train.beton", model=model, views=recipe.views)
    classifier = evaluate.fit_lbfgs(of_fit.h, of_fit.label).classifier
    weight, bias = linear_head(encoder, of_fit, seed=0)
    np.testing.assert_allclose(
        of_fit.h @ weight.numpy().T + bias.numpy(), classifier.logits(of_fit.h), rtol=1e-3, atol=1e-3
    )


def test_prior_is_that_of_the_returned_embedding(canvas, tmp_path):
    model = run_of(tmp_path / "run", canvas, embedding={"stochastic": "hz", "prior": "mixture"})[2]
    assert embedding_prior(model) is model.priors["h"]
    assert embedding_prior(run_of(tmp_path / "plain", canvas)[2]) is None


def test_unlabeled_training_images_allow_label_free_detectors_only(canvas, others, tmp_path):
    data = {"train": str(others / "noise/train.beton"), "val": str(canvas / "val.beton")}
    folder, _, _ = make_run(tmp_path / "run", data)
    encoder = load_run_encoder(folder, device="cpu")
    result = evaluate_ood(encoder, find_sets(encoder, far=[others / "flat/train.beton"]))
    assert (folder / "eval" / "ood-far-flat.json").exists()
    assert not set(result["detectors"]) & set(LABEL_BASED)
    assert result["skipped"]["energy"] == "9 of the 9 training images have no label"
    assert result["near"] == {} and "near" not in result["detectors"]["knn_cosine"]
    shown = text_of(ood_table(result), 200)
    assert all(f" {name} " in shown for name in result["detectors"]) and "With labels" not in shown


def test_other_detectors_run_without_pytorch_ood(canvas, others, tmp_path, monkeypatch):
    folder, _, _ = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    sets = find_sets(encoder, far=[others / "noise/train.beton"])
    lacking = {"kl_matching", "odin", "react_energy"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.label_based, "pytorch_ood_version", lambda: None)
        result = evaluate_ood(encoder, sets)
        with pytest.raises(UserError, match="pip install pytorch-ood"):
            detector("kl_matching").fit(np.zeros((2, 2)), logits=np.eye(2))
    assert {name for name, why in result["skipped"].items() if "pip install pytorch-ood" in why} == lacking
    assert lacking <= set(evaluate_ood(encoder, sets)["detectors"])  # once it is installed, measured again


def test_incomparable_sets_are_refused(canvas, canvas_jpeg, others, tmp_path):
    folder, _, _ = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    noise = others / "noise/train.beton"
    with pytest.raises(UserError, match=r"storage=jpg|canvas=96.* with .*canvas=32"):
        find_sets(encoder, near=[canvas_jpeg / "val.beton"])
    with pytest.raises(UserError, match="--near and --far, or a --suite"):
        find_sets(encoder)
    with pytest.raises(UserError, match="Two of the sets are called noise"):
        find_sets(encoder, near=[noise], far=[noise])
    (tmp_path / "id").mkdir()
    for file in others.glob("noise/train.beton*"):
        (tmp_path / "id" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="Two of the sets are called id"):
        find_sets(encoder, far=[tmp_path / "id/train.beton"])
    with pytest.raises(UserError, match="nowhere"):
        find_sets(encoder, near=[tmp_path / "nowhere.beton"])
    stock = tmp_path / "stock.beton"
    stock.write_bytes(noise.read_bytes())
    with pytest.raises(UserError, match="stock.beton has no stock.beton.json"):
        find_sets(encoder, near=[stock])
    without, _, _ = make_run(tmp_path / "without", {"train": str(canvas / "train.beton")})
    with pytest.raises(UserError, match="no data.val: name ID images"):
        find_sets(load_run_encoder(without, device="cpu"), near=[noise])


def test_suite_is_found_in_its_root_folder(canvas, others, tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "cifar10", (("stripes",), ("noise", "flat")))
    folder, _, _ = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    sets = find_sets(encoder, suite="cifar10", root=others, id=canvas / "val.beton")
    assert list(sets.near) == ["stripes"] and list(sets.far) == ["noise", "flat"]
    assert find_sets(encoder, suite="cifar10", root=others).name == "cifar10"
    assert sets.name == f"cifar10-id-{canvas.name}" and sets.fit.path == canvas / "train.beton"
    with pytest.raises(UserError, match=r"build-beton mnist"):
        monkeypatch.setitem(suites.SUITES, "cifar10", (("stripes",), ("mnist",)))
        find_sets(encoder, suite="cifar10", root=others)


@pytest.mark.parametrize(
    ("option", "other"), [("quality", 80), ("max_side", 300), ("layout", "full"), ("storage", "jpg"), ("canvas", 31)]
)
@pytest.mark.parametrize("which", ["near", "fit"])
def test_build_options_must_be_equal(option, other, which, canvas, others, tmp_path):
    folder, _, _ = run_of(tmp_path / "run", canvas)
    encoder = load_run_encoder(folder, device="cpu")
    for file in others.glob("noise/train.beton*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "train.beton.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: other}))
    paths = {"near": [others / "flat/train.beton"]} | {"fit": tmp_path / "train.beton"}
    paths = paths if which == "fit" else {"near": [tmp_path / "train.beton"]}
    with pytest.raises(UserError, match=f"{option}={other}"):
        find_sets(encoder, **paths)


def test_full_files_of_one_and_of_several_sizes_are_incomparable(full, others, tmp_path):
    folder, _, _ = run_of(tmp_path / "run", full)
    (tmp_path / "same").mkdir()
    for number in range(3):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(tmp_path / "same" / f"{number}.jpg")
    build_beton("imagefolder", tmp_path / "same", tmp_path / "built", max_side=500, workers=1)
    with pytest.raises(UserError, match="images of one size=True"):
        find_sets(load_run_encoder(folder, device="cpu"), near=[tmp_path / "built/train.beton"])


def test_names_of_results():
    a, b = Path("data/a/train.beton"), Path("data/b/x.beton")
    assert result_name(None, [a], [b], None, None) == "near-a-far-b-x"
    assert result_name("cifar10", [a], [b], None, b) == "cifar10-fit-b-x"
    folder = Path("n" * 120) / "train.beton"
    long = result_name(None, [folder], [], None, None)
    assert len(long) == 16 and long != result_name(None, [], [folder], None, None)


def test_number_of_training_images_is_limited(canvas, others, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "FIT_IMAGES", 30)
    folder, _, _ = run_of(tmp_path / "run", canvas)
    sets = sets_of(load_run_encoder(folder, device="cpu"), others)
    assert sets.fit == BetonSubset(canvas / "train.beton", None, 30) and sets.describe()["train"]["images"] == 30


def test_source_formats_and_sizes_are_recorded(canvas, others):
    about = suites.describe_set(BetonSubset(others / "noise/train.beton"))
    assert (about["builder"], about["source_formats"], about["source_px"]) == ("imagefolder", {"PNG": 9}, [40, 40])
    assert read_header(canvas / "val.beton").manifest["source_formats"] == {"JPEG": 12}


def test_inverted_means_significantly_below_50_percent():
    """ClassificationResult shifted down by half a standard deviation, by nothing, and up; 400 images a set."""
    rng = np.random.default_rng(0)
    of = {"id": rng.normal(size=400)} | {name: rng.normal(shift, 1, 400) for name, shift in
                                        (("down", -0.5), ("same", 0), ("up", 0.5))}  # fmt: skip
    norm = np.exp(of["id"])
    compared = compare({"energy": of, "constant": {name: np.zeros(400) for name in of}},
                       {"near": ["down"], "far": ["same", "up"]}, norm, 0)  # fmt: skip
    row = compared["detectors"]["energy"]
    assert {name: row["sets"][name]["inverted"] for name in row["sets"]} == {"down": True, "same": False, "up": False}
    assert row["near"]["inverted"] and not row["far"]["inverted"] and row["norm_correlation"] == pytest.approx(1)
    assert compared["detectors"]["constant"]["norm_correlation"] == 0
    # The mean over sets shares its ID images, so its interval is wider than that of independent sets would be.
    widths = [np.diff(row["sets"][name]["intervals"]["auroc"])[0] for name in ("same", "up")]
    width = np.diff(row["far"]["intervals"]["auroc"])[0]
    assert np.hypot(*widths) / 2 < width < np.mean(widths) * 1.05


def test_few_images_are_never_inverted():
    of = {"id": np.arange(100.0), "one": np.array([-1.0])}
    row = compare({"energy": of}, {"near": [], "far": ["one"]}, of["id"], 0)["detectors"]["energy"]
    assert row["far"]["metrics"]["auroc"] == 0 and not row["sets"]["one"]["inverted"] and not row["far"]["inverted"]


def test_each_set_has_its_own_resamples(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        separation, "resample", lambda images, seed: seeds.append(seed) or np.zeros((9, images), np.int32)
    )
    of = {name: np.arange(40.0) for name in ("id", "a", "b", "c")}
    compare({"energy": of}, {"near": ["a"], "far": ["b", "c"]}, of["id"], 7)
    assert seeds == [[7, 0], [7, 1], [7, 2], [7, 3]]


def test_undefined_detector_is_skipped(canvas, others, tmp_path):
    """A z of one dimension has no spread of sigma; the other detectors stay."""
    folder, _, _ = run_of(
        tmp_path / "run", canvas, embedding={"stochastic": "z"},
        model={"backbone": "test_resnet", "projector": {"layers": 1, "hidden": 8, "out": 1}},
    )  # fmt: skip
    encoder = load_run_encoder(folder, device="cpu")
    result = evaluate_ood(encoder, find_sets(encoder, far=[others / "noise/train.beton"]))
    assert result["skipped"]["sigma_std"] == "An embedding of one dimension has no standard deviation of sigma."
    assert "sigma_mean" in result["detectors"] and "sigma_std" not in result["detectors"]


def test_set_names_are_not_drawn_as_formulas(tmp_path):
    rng = np.random.default_rng(0)
    of = {name: rng.normal(size=40) for name in ("id", "p$_{$", "_hidden")}
    compared = compare({"energy": of}, {"near": ["p$_{$"], "far": ["_hidden"]}, of["id"], 0)
    sets = OODSets(None, None, {"p$_{$": None}, {"_hidden": None}, "x")
    draw_ood_plots(tmp_path, "x", {"energy": of}, compared["detectors"], sets)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_runs_with_different_seeds_share_a_column(canvas, others, tmp_path):
    made = [run_of(tmp_path / f"seed{seed}", canvas, seed=seed)[0] for seed in range(2)]
    results = []
    for run in made:
        encoder = load_run_encoder(run, device="cpu")
        results.append(evaluate_ood(encoder, sets_of(encoder, others)))
    encoder = load_run_encoder(made[0], device="cpu")
    results.append(evaluate_ood(encoder, find_sets(encoder, far=[others / "noise/train.beton"])))
    for result in results[:2]:  # as if this were so, to see where it stands
        for row in result["detectors"].values():
            for found in row["sets"].values():
                found["inverted"] = False
    results[1]["detectors"]["knn_cosine"]["sets"]["flat"]["inverted"] = True
    rows = summarize_runs(results)
    assert [row.seeds for row in rows] == [[0, 1], [0]] and rows[0].inverted == {"knn_cosine": ["flat"]}
    values = [result["detectors"]["knn_cosine"]["far"]["metrics"]["auroc"] for result in results[:2]]
    assert rows[0].metrics["knn_cosine far auroc"].mean == pytest.approx(np.mean(values))
    console = Console(width=200, record=True)
    console.print(ood_summary_table(rows))
    shown = console.export_text()
    assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" in shown and "and 1 more" in shown


def test_the_command(canvas, others, tmp_path, monkeypatch, capsys):
    folder, _, _ = run_of(tmp_path / "run", canvas)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastssl", "eval", "ood", str(folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, capsys.readouterr()

    noise = others / "noise/train.beton"
    code, said = run("--far", noise, "--device", "cpu", "--out", tmp_path / "out.json")
    assert code == 0 and "knn_cosine" in said.out and "far noise:" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["seeds"] == [0]
    whole = (folder / "eval" / "ood-far-noise.txt").read_text()
    assert "knn_cosine" in whole and "FPR95" in whole and max(map(len, whole.splitlines())) <= 160
    code, said = run("--far", noise, "--suite", "cifar10")
    assert code == 2 and said.err.startswith("error: --suite names its own sets")
