"""Evaluations of run directories: results, caches, refused input, and that the test set is never used to choose."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import features_of, make_run
from table_widths import tables_of
from torch import nn

from fastssl import evaluation
from fastssl.beton import build_beton, read_labels, read_metadata
from fastssl.common import terminal
from fastssl.common.errors import UserError
from fastssl.evaluation import (
    classification_metrics,
    evaluate_knn,
    evaluate_linear,
    evaluate_semisup,
    evaluate_transfer,
    evaluate_uncertainty,
    features,
    find_evaluation_data,
    find_target,
    finetune,
    fit_reference,
    fit_sweep,
    knn_accuracy,
    linear,
    load_run_encoder,
    mean_of_draws,
    result_table,
    runs,
    summarize_runs,
    summary_table,
    transfer,
    write_summary,
)
from fastssl.evaluation import knn as knn_module
from fastssl.evaluation.splits import stratified_share
from fastssl.evaluation.tables import interval_of_mean
from fastssl.models import build_model

QUICK = ["train.epochs=2", "train.batch_size=8", "log.every=1"]


def data_of(folder: Path) -> dict:
    return {"train": str(folder / "train.beton"), "val": str(folder / "val.beton")}


@pytest.fixture
def run(canvas, tmp_path):
    return make_run(tmp_path / "run", data_of(canvas))


@pytest.fixture(autouse=True)
def fewer_epochs(monkeypatch):
    monkeypatch.setitem(linear.sweep.CONSTANTS, "epochs", 3)
    short = {name: schedule._replace(epochs=4, steps=(2, 3)) for name, schedule in linear.SCHEDULES.items()}
    monkeypatch.setattr(linear.reference, "SCHEDULES", short)
    monkeypatch.setattr(linear.evaluate, "SCHEDULES", short)


def opened(run_dir, train=None, val=None, **options):
    encoder = load_run_encoder(run_dir, device="cpu", **options)
    return encoder, find_evaluation_data(encoder, train, val)


def test_knn_and_linear_write_the_result_that_they_return(run, canvas, monkeypatch):
    folder, recipe, model = run
    extracted, extract = [], features.embed_batches
    monkeypatch.setattr(features, "embed_batches", lambda *a: (extracted.append(1), extract(*a))[1])
    train, val = (
        features_of(folder, canvas / f"{split}.beton", model=model, views=recipe.views) for split in ("train", "val")
    )
    knn = evaluate_knn(*opened(folder), ks=(5, 20), temperatures=(0.07, 0.5))
    swept = evaluate_linear(*opened(folder), seed=4)
    reference = evaluate_linear(*opened(folder), protocol="reference")
    lbfgs = evaluate_linear(*opened(folder), protocol="lbfgs")
    assert len(extracted) == 2  # all evaluations read the cached features

    data = train.h, train.label, val.h, val.label
    assert knn["metrics"] == {
        f"accuracy_k{k}_t{t}": knn_accuracy(*data, k=k, temperature=t) for k in (5, 20) for t in (0.07, 0.5)
    }
    expected = fit_sweep(train.h, train.label, epochs=3, seed=4)
    guess = expected.classifier.logits(val.h).argmax(1).numpy()  # labels are 0, 1, 2
    assert swept["metrics"]["accuracy"] == (guess == val.label).mean() and swept["seed"] == 4
    assert swept["chosen"] == expected.chosen and swept["candidates"] == expected.candidates
    names = {"knn": knn, "linear-sweep-seed4": swept, "linear-reference": reference, "linear-lbfgs": lbfgs}
    for name, result in names.items():
        written = json.loads((folder / "eval" / f"{name}.json").read_text())
        assert written == result
        assert (written["train"]["images"], written["val"]["images"], written["layout"]) == (48, 12, "canvas")
        assert (
            len(written["encoder_sha256"]) == len(written["train"]["checksum"]) == 64
            and written["view"]["kind"] == "squash"
        )
        assert written["weights"] == str(folder / "checkpoints" / "last.pt")
        (table,) = tables_of(result_table(result), 160)
        assert table.row_count == len(written["metrics"]) == len(written["intervals"])
        for metric, value in written["metrics"].items():
            low, high = written["intervals"][metric]
            assert low <= high and (low <= value <= high or metric == "ece")
        with np.load(folder / "eval" / written["outcomes"]) as outcomes:
            assert len(outcomes.files) == (4 if name == "knn" else 1)
            for metric, correct_M in outcomes.items():
                assert correct_M.shape == (12,) and correct_M.mean() == written["metrics"][metric]
    confusion = np.load(folder / "eval" / swept["confusion"])
    assert confusion.sum() == 12 and np.trace(confusion) == round(12 * swept["metrics"]["accuracy"])
    assert {name.split(".")[0] for name in os.listdir(folder / "eval")} == set(names)
    assert Image.open(folder / "eval" / "linear-sweep-seed4.confusion.png").width == 825


def test_the_progress_of_an_evaluation_names_the_run(run, capsys, monkeypatch):
    """Of several runs, bars without a name look like one that starts again."""
    folder, _, _ = run
    monkeypatch.setattr(terminal, "SHORT", 0.0)  # also of work that takes no time
    evaluate_knn(*opened(folder))
    for protocol in ("sweep", "reference", "lbfgs"):
        evaluate_linear(*opened(folder), protocol=protocol)
    evaluate_uncertainty(*opened(folder))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 9 and all(line.startswith(f"{folder}: ") for line in lines), lines
    # In all other evaluations too: their progress is that of the encoder.
    for path in Path(evaluation.__file__).parent.rglob("*.py"):
        if path.name != "runs.py" and path.parent.name != "embed":
            assert not re.search(r"(?<![.\w])progress\(", path.read_text()), path


def test_an_equal_request_is_not_measured_again(run, canvas, tmp_path, monkeypatch):
    folder, _, model = run
    first = evaluate_linear(*opened(folder))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(linear.evaluate, "fit_and_test", never)
        assert evaluate_linear(*opened(folder)) == first
        again = evaluate_linear(*opened(moved))  # the same weights and data in another folder
        assert again["metrics"] == first["metrics"] and again["run"] == str(moved)
        for name, value in (("epochs", 4), ("lrs", (0.1,)), ("weight_decays", (0.0,)), ("held_out_share", 0.2)):
            with patch.context() as changed, pytest.raises(AssertionError):
                changed.setitem(linear.sweep.CONSTANTS, name, value)
                evaluate_linear(*opened(folder))
        with patch.context() as changed, pytest.raises(AssertionError):
            changed.setattr(linear.evaluate, "CACHE_VERSION", 9)
            evaluate_linear(*opened(folder))
        for options in ({"seed": 1}, {"dtype": "float16"}, {"protocol": "lbfgs"}):
            with pytest.raises(AssertionError):
                evaluate_linear(*opened(folder), **options)
        with pytest.raises(AssertionError):
            evaluate_linear(*opened(folder, view="center"))
        with pytest.raises(AssertionError):
            evaluate_linear(*opened(folder, train=canvas / "val.beton"))
    (folder / "eval" / "linear-sweep.json").write_text('{"half": ')  # a damaged result is measured again
    assert evaluate_linear(*opened(folder))["metrics"] == first["metrics"]
    # Other weights are another encoder.
    saved = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    saved["model"][next(iter(saved["model"]))] *= 2
    torch.save(saved, folder / "checkpoints" / "last.pt")
    assert evaluate_linear(*opened(folder))["encoder_sha256"] != first["encoder_sha256"]


@pytest.mark.parametrize("protocol", ["sweep", "reference", "lbfgs"])
def test_hyperparameters_do_not_depend_on_test_labels(run, photos, tmp_path, protocol):
    """With every test label changed, the same classifier is chosen and trained, but its accuracy is another."""
    folder, _, _ = run
    for label in range(3):
        shutil.copytree(photos / "val" / f"class{label}", tmp_path / "poisoned" / "val" / f"class{(label + 1) % 3}")
        shutil.copytree(photos / "train" / f"class{label}", tmp_path / "poisoned" / "train" / f"class{label}")
    build_beton("imagefolder", tmp_path / "poisoned", tmp_path / "poisoned_b", canvas=32, workers=1)
    honest = evaluate_linear(*opened(folder), protocol=protocol)
    poisoned = evaluate_linear(*opened(folder, val=tmp_path / "poisoned_b" / "val.beton"), protocol=protocol)
    for key in ("chosen", "candidates", "hyperparameters"):
        assert poisoned[key] == honest[key]
    # The same guesses, only counted against other labels: columns of the confusion matrix keep their sums.
    sums = [np.load(folder / "eval" / result["confusion"]).sum(axis=0).tolist() for result in (honest, poisoned)]
    assert sums[0] == sums[1] and honest["metrics"]["accuracy"] != poisoned["metrics"]["accuracy"]


def test_full_files_stochastic_models_and_other_checkpoints_are_evaluated(full, canvas, tmp_path):
    folder, recipe, model = make_run(tmp_path / "run", data_of(full), embedding={"stochastic": "z"})
    result = evaluate_knn(*opened(folder), ks=(5,))
    assert result["layout"] == "full" and result["train"]["images"] == 48
    found = features_of(folder, full / "val.beton", model=model, views=recipe.views)
    assert found.mu.shape == found.sigma.shape == (12, 8) and found.h.shape == (12, 96) and found.space == "z"
    # One full file and one canvas are not a full evaluation.
    assert evaluate_knn(*opened(folder, val=canvas / "val.beton"), ks=(5,))["layout"] == "canvas"

    best = folder / "checkpoints" / "best.pt"
    saved = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    torch.manual_seed(5)
    saved["model"] = type(model)(recipe).state_dict()
    torch.save(saved, best)
    of_best = evaluate_knn(*opened(best), ks=(5,))
    assert (folder / "eval" / "knn-best.json").is_file() and of_best["weights"] == str(best)
    untrained = evaluate_knn(*opened(folder, untrained=True), ks=(5,))
    torch.manual_seed(recipe.seed)
    start = type(model)(recipe)
    assert untrained["encoder_sha256"] == runs.weights_sha256(start) and untrained["weights"] == "untrained"
    assert (folder / "eval" / "knn-untrained.json").is_file()
    assert len({r["encoder_sha256"] for r in (result, of_best, untrained)}) == 3


def test_a_stochastic_h_is_classified_by_mu_or_by_draws(canvas, tmp_path, monkeypatch):
    folder, recipe, model = make_run(
        tmp_path / "run", data_of(canvas), seed=2, embedding={"stochastic": "h", "samples": 5}
    )
    encoder, split = opened(folder)
    sets = [features_of(folder, data.path, model=model, views=recipe.views) for data in (split.train, split.val)]
    published = evaluate_linear(encoder, split, protocol="reference")
    assert published["settings"]["draws"] == 5
    x, x_val = (mean_of_draws(f, 5, recipe.seed, normalize=True) for f in sets)
    fitted = fit_reference(x, sets[0].label, normalize=False)
    scores = classification_metrics(fitted.classifier.logits(x_val), sets[1].label, np.arange(3))
    assert published["metrics"] == scores.metrics
    swept = evaluate_linear(encoder, split, draws=5)
    x, x_val = (mean_of_draws(f, 5, recipe.seed, normalize=False) for f in sets)
    scores = classification_metrics(
        fit_sweep(x, sets[0].label, epochs=3).classifier.logits(x_val), sets[1].label, np.arange(3)
    )
    assert swept["metrics"] == scores.metrics
    drawn = [mean_of_draws(f, 5, recipe.seed, normalize=True) for f in sets]
    expected = knn_accuracy(drawn[0], sets[0].label, drawn[1], sets[1].label, k=5)
    calls, mean = [], knn_module.mean_of_draws
    monkeypatch.setattr(knn_module, "mean_of_draws", lambda *a, **k: (calls.append(k["normalize"]), mean(*a, **k))[1])
    assert evaluate_knn(encoder, split, ks=(5,), draws=5)["metrics"]["accuracy_k5_t0.07"] == expected
    assert calls == [True, True]
    assert evaluate_linear(encoder, split)["settings"]["draws"] == 0  # mu
    of_mu, of_draws = evaluate_knn(encoder, split, ks=(5,)), evaluate_knn(encoder, split, ks=(5,), draws=3)
    assert of_mu["settings"]["draws"] == 0 and of_draws["settings"]["draws"] == 3

    plain, _, _ = make_run(tmp_path / "plain", data_of(canvas))
    for evaluate in (evaluate_linear, lambda *a, **k: evaluate_knn(*a, ks=(5,), **k)):
        with pytest.raises(UserError, match="--draws"):
            evaluate(*opened(plain), draws=3)


def test_training_images_are_limited_as_in_training(canvas, tmp_path):
    folder, _, _ = make_run(tmp_path / "run", {**data_of(canvas), "limit": 25})
    assert evaluate_knn(*opened(folder), ks=(5,))["train"]["images"] == 25
    # A file named on the command line is used whole, and does not take the place of the run's own result.
    whole = evaluate_knn(*opened(folder, train=canvas / "train.beton"), ks=(5,))
    assert (whole["train"]["images"], whole["train"]["limit"]) == (48, None)
    assert json.loads((folder / "eval" / "knn.json").read_text())["train"]["images"] == 25


def test_user_errors_name_the_cause_and_the_fix(run, canvas, photos, tmp_path):
    folder, _, _ = run
    with pytest.raises(UserError, match="nothing holds no run: name a run directory"):
        load_run_encoder(tmp_path / "nothing")
    (tmp_path / "x.pt").touch()
    with pytest.raises(UserError, match="x.pt is not a readable checkpoint"):
        load_run_encoder(tmp_path / "x.pt")
    with pytest.raises(UserError, match="--k must be from 1 to 48"):
        evaluate_knn(*opened(folder), ks=(20, 200))
    with pytest.raises(UserError, match="gone.beton"):
        opened(folder, val=tmp_path / "gone.beton")
    without_val, _, _ = make_run(tmp_path / "without_val", {"train": str(canvas / "train.beton")})
    with pytest.raises(UserError, match="no data.val .* --val"):
        opened(without_val)
    (without_val / "checkpoints" / "last.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        opened(without_val)
    started, _, _ = make_run(tmp_path / "started", data_of(canvas), model={"backbone": "test_resnet", "init": "x"})
    with pytest.raises(UserError, match="began with the weights of x"):
        load_run_encoder(started, untrained=True)

    (tmp_path / "one" / "train" / "only").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "one" / "train" / "only" / "0.png")
    build_beton("imagefolder", tmp_path / "one", tmp_path / "one_b", canvas=16, workers=1)
    with pytest.raises(UserError, match="one class only"):
        opened(folder, train=tmp_path / "one_b" / "train.beton")
    shutil.copytree(photos / "val" / "class1", tmp_path / "other" / "val" / "a")
    shutil.copytree(photos / "val" / "class2", tmp_path / "other" / "val" / "class0")
    build_beton("imagefolder", tmp_path / "other", tmp_path / "other_b", canvas=32, workers=1)
    (other,) = (tmp_path / "other_b").glob("*.beton")
    with pytest.raises(UserError, match="number their classes differently .class0 and a"):
        opened(folder, val=other)


def test_an_encoder_that_outputs_nan_is_refused(canvas, tmp_path):
    folder, recipe, model = make_run(tmp_path / "run", data_of(canvas))
    last = [module for module in model.encoder.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.constant_(last.weight, float("nan"))
    saved = {"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="not finite"):
        evaluate_knn(*opened(folder), ks=(5,))
    assert not list((folder / "features").iterdir())


@pytest.mark.parametrize("stochastic", ["none", "h"])
def test_semisup_fine_tunes_on_the_drawn_images_only(canvas, tmp_path, stochastic):
    folder, recipe, model = make_run(
        tmp_path / "run", data_of(canvas), embedding={"stochastic": stochastic, "samples": 2}
    )
    result = evaluate_semisup(*opened(folder), percent=50, seed=3, overrides=QUICK)
    index = [int(x) for x in (folder / "eval" / "semisup-50percent-seed3.txt").read_text().splitlines()[1:]]
    metadata = read_metadata(canvas / "train.beton")
    label_of = dict(zip(metadata["index"].tolist(), read_labels(canvas / "train.beton").tolist()))
    assert len(set(index)) == 24 and np.bincount([label_of[i] for i in index]).tolist() == [8, 8, 8]
    assert result["train"]["images"] == 24 and result["val"]["images"] == 12 and result["settings"]["seed"] == 3
    optim = result["settings"]["optim"]
    used = optim["lr"] * result["settings"]["train"]["batch_size"] / 256
    assert (optim["head_lr_factor"], optim["weight_decay"], optim["final_lr_factor"]) == (10, 1e-5, 0.1)
    assert used == pytest.approx(1e-4)
    assert result["settings"]["views"]["jitter"]["p"] == 0 and result["settings"]["embedding"]["beta"] == 0
    tuned = torch.load(folder / "eval" / result["folder"] / "checkpoints" / "last.pt", weights_only=True)
    assert tuned["step"] == 2 * 3  # 24 images in batches of 8
    start = model.state_dict()
    weights = [name for name in tuned["model"] if name.startswith("encoder.") and name.endswith("weight")]
    assert not any(torch.equal(tuned["model"][name], start[name]) for name in weights)  # all of the encoder learns
    assert tuned["model"]["classifier.weight"].shape == (3, 96)
    assert ("heads.h.mu.weight" in tuned["model"]) == (stochastic == "h")
    assert json.loads((folder / "eval" / "semisup-50percent-seed3.json").read_text()) == result


def test_a_stopped_fine_tuning_resumes_and_a_finished_one_is_cached(run, monkeypatch):
    folder, _, _ = run
    overrides = [*QUICK, "train.epochs=4", "checkpoint.every=1"]
    straight = evaluate_semisup(*opened(folder), percent=50, overrides=overrides)
    shutil.move(folder / "eval", folder / "eval_straight")

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "test_logits", killed)  # after the training, before the result
        with pytest.raises(Killed):
            evaluate_semisup(*opened(folder), percent=50, overrides=overrides)
    trained, train = [], finetune.train
    monkeypatch.setattr(finetune, "train", lambda recipe, resume: trained.append(train(recipe, resume=resume)))
    again = evaluate_semisup(*opened(folder), percent=50, overrides=overrides)
    assert again["metrics"] == straight["metrics"] and len(trained) == 1
    lines = (folder / "eval" / again["folder"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))  # nothing was trained twice
    assert evaluate_semisup(*opened(folder), percent=50, overrides=overrides) == again and len(trained) == 1
    # Another setting is another fine-tune, in a folder of its own.
    other = evaluate_semisup(*opened(folder), percent=50, overrides=[*overrides, "train.epochs=1"])
    assert other["folder"] != again["folder"] and len(trained) == 2
    with pytest.raises(UserError, match="unknown key train.epoch"):
        evaluate_semisup(*opened(folder), percent=50, overrides=["train.epoch=1"])
    for key in ("model.init=null", "data.subset=null", "objective.classes=9", "seed=3"):
        with pytest.raises(UserError, match=f"--set {key}: fine-tuning sets this itself"):
            evaluate_semisup(*opened(folder), percent=50, overrides=[key])


FROZEN = [*QUICK, "train.epochs=1", "optim.lr=1e-30", "optim.weight_decay=0"]


@pytest.mark.parametrize("untrained", [False, True])
def test_fine_tuning_starts_from_the_evaluated_encoder(canvas, tmp_path, untrained):
    """With a learning rate of nearly 0 the weights stay equal. The seed differs from that of the run."""
    folder, _, _ = make_run(tmp_path / "run", data_of(canvas), embedding={"stochastic": "h", "samples": 2})
    encoder, split = opened(folder, untrained=untrained)
    result = evaluate_semisup(encoder, split, percent=50, seed=7, overrides=FROZEN)
    tuned = torch.load(folder / "eval" / result["folder"] / "checkpoints" / "last.pt", weights_only=True)["model"]
    start = encoder.model.state_dict()
    names = [name for name in tuned if name.startswith(("encoder.", "heads.")) and "running" not in name]
    names = [name for name in names if "num_batches" not in name]
    assert len(names) > 10 and all(torch.allclose(tuned[name], start[name], atol=1e-20) for name in names)


def test_a_supervised_run_is_fine_tuned_with_a_new_classifier(canvas, tmp_path):
    objective = {"name": "supervised", "classes": 3}
    folder, recipe, _ = make_run(tmp_path / "run", data_of(canvas))
    recipe = recipe.model_validate({**recipe.model_dump(), "objective": objective})
    model = build_model(recipe)
    nn.init.constant_(model.classifier.weight, 123.0)
    saved = {"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 0}
    torch.save(saved, folder / "checkpoints" / "last.pt")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    result = evaluate_semisup(*opened(folder), percent=50, overrides=FROZEN)
    tuned = torch.load(folder / "eval" / result["folder"] / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert tuned["classifier.weight"].abs().max() < 1


def test_fine_tuning_uses_the_published_view_and_learning_rate(canvas, tmp_path, monkeypatch):
    folder, _, _ = make_run(tmp_path / "run", data_of(canvas), views={"size": 72})
    seen, test_logits = [], finetune.test_logits
    watched = lambda *given: (seen.append(given[-1].eval), test_logits(*given))[1]  # noqa: E731
    monkeypatch.setattr(finetune, "test_logits", watched)
    result = evaluate_semisup(*opened(folder), percent=50, overrides=[*QUICK, "train.batch_size=4"])
    assert seen == ["center"] and result["view"]["kind"] == "center"  # above 64 px, as published
    assert result["settings"]["optim"]["lr"] * 4 / 256 == pytest.approx(1e-4)
    soft_clip = evaluate_semisup(*opened(folder), percent=50, view="squash", overrides=QUICK)
    assert seen[1] == "squash" == soft_clip["view"]["kind"]
    given = evaluate_semisup(*opened(folder), percent=50, overrides=[*QUICK, "optim.lr=0.5"])
    assert given["settings"]["optim"]["lr"] == 0.5


def test_classes_without_training_images_are_never_guessed(run, photos, tmp_path):
    """Eight folders, of which three have training images."""
    folder, _, _ = run
    for split in ("train", "val"):
        for label, name in enumerate(("b", "d", "h")):
            shutil.copytree(photos / split / f"class{label}", tmp_path / "gaps" / split / name)
    for name in ("a", "c", "e", "f", "g"):  # known from val alone
        shutil.copytree(photos / "val" / "class0", tmp_path / "gaps" / "val" / name)
        (tmp_path / "gaps" / "train" / name).mkdir()
    build_beton("imagefolder", tmp_path / "gaps", tmp_path / "gaps_b", canvas=32, workers=1)
    labels = np.unique(read_labels(tmp_path / "gaps_b" / "train.beton"))
    result = evaluate_transfer(
        load_run_encoder(folder, device="cpu"), find_target("gaps", tmp_path / "gaps_b"), "finetune", overrides=QUICK
    )
    assert len(labels) == 3 and "accuracy_top5" not in result["metrics"]
    confusion = np.load(folder / "eval" / result["confusion"])
    columns = [c for c, count in zip(result["confusion_classes"], confusion.sum(axis=0)) if count]
    assert set(columns) <= set(labels.tolist())


def test_percent_applies_to_every_class_and_100_means_all(run):
    folder, _, _ = run
    labels = np.repeat([0, 1, 2], [40, 3, 1])
    assert np.bincount(labels[stratified_share(labels, 0.1, 0)]).tolist() == [4, 1, 1]
    assert stratified_share(labels, 1.0, 0).tolist() == list(range(44))
    result = evaluate_semisup(*opened(folder), percent=100, overrides=[*QUICK, "train.epochs=1"])
    assert result["train"]["images"] == 48


@pytest.mark.parametrize("method", ["linear", "finetune"])
def test_the_halves_of_one_file_stay_apart(run, photos, tmp_path, method):
    """With all test labels set to class 0, the same classifier is fitted, and only the test half is counted."""
    folder, _, _ = run
    build_beton("imagefolder", photos / "train", tmp_path / "b", canvas=32, workers=1)
    (path,) = (tmp_path / "b").glob("*.beton")
    target = find_target("photos", path)
    label_N = read_labels(path)
    encoder = load_run_encoder(folder, device="cpu")
    honest = evaluate_transfer(encoder, target, method, overrides=QUICK)
    assert len(label_N) == 48 and len(target.test_rows) == 24
    poisoned_labels = label_N.copy()
    poisoned_labels[target.test_rows] = 0
    cached_features = transfer.cached_features

    def poisoned(*args, **kwargs):
        found = cached_features(*args, **kwargs)
        return dataclasses.replace(found, label=poisoned_labels)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(transfer, "cached_features", poisoned)
        tested = finetune.test_logits
        patch.setattr(finetune, "test_logits", lambda *a: (tested(*a)[0], poisoned_labels))
        for file in (folder / "eval").glob("*.json"):
            file.unlink()
        other = evaluate_transfer(encoder, target, method, overrides=QUICK)
    # Each half's own labels: what was tested are the poisoned ones alone.
    before, after = honest["confusion"], other["confusion"]
    assert before == after
    matrix = np.load(folder / "eval" / after)
    assert matrix.sum(axis=1).tolist() == [24, 0, 0][: len(matrix)]
    if method == "linear":
        assert other["candidates"] == honest["candidates"] and other["chosen"] == honest["chosen"]


def test_an_edited_list_is_measured_again_but_a_moved_one_is_not(canvas, tmp_path):
    index = read_metadata(canvas / "train.beton")["index"].tolist()
    (tmp_path / "list.txt").write_text("\n".join(map(str, index[:24])))
    folder, recipe, _ = make_run(tmp_path / "run", {**data_of(canvas), "subset": str(tmp_path / "list.txt")}, seed=3)
    encoder, split = opened(folder)
    first = evaluate_knn(encoder, split, ks=(5,))
    assert first["train"]["images"] == 24 and first["seed"] == 3
    shutil.move(tmp_path / "list.txt", tmp_path / "moved.txt")
    moved = dataclasses.replace(split, train=dataclasses.replace(split.train, subset=str(tmp_path / "moved.txt")))
    assert evaluate_knn(encoder, moved, ks=(5,))["measured_at"] == first["measured_at"]
    (tmp_path / "moved.txt").write_text("\n".join(map(str, index[24:])))
    edited = evaluate_knn(encoder, moved, ks=(5,))
    assert edited["train"]["subset_sha256"] != first["train"]["subset_sha256"] and "measured_at" in edited


def test_semisup_reads_a_list_of_names(run, canvas, tmp_path):
    folder, _, _ = run
    names = (canvas / "train.beton.names.txt").read_text().splitlines()
    (tmp_path / "mine.txt").write_text("\n".join(Path(name).name for name in names[::3]))
    result = evaluate_semisup(*opened(folder), list_file=tmp_path / "mine.txt", overrides=[*QUICK, "train.epochs=1"])
    assert result["evaluation"] == "semisup-mine" and result["train"]["images"] == 16
    listed = (folder / "eval" / "semisup-mine-seed0.txt").read_text().splitlines()[1:]
    assert sorted(map(int, listed)) == list(range(0, 48, 3))
    (tmp_path / "mine.txt").write_text("\n".join(Path(name).name for name in names[:16]))
    with pytest.raises(UserError, match="one class only"):
        evaluate_semisup(*opened(folder), list_file=tmp_path / "mine.txt", overrides=QUICK)


def test_transfer_to_several_data_sets_makes_one_table(run, canvas, photos, tmp_path, capsys):
    folder, _, _ = run
    for split in ("train", "val"):
        shutil.copytree(photos / split, tmp_path / "mixed", dirs_exist_ok=True)
    build_beton("imagefolder", tmp_path / "mixed", tmp_path / "single", canvas=32, workers=1)
    two, one = find_target("photos", canvas), find_target("flowers102", tmp_path / "single" / "train.beton")
    assert (two.train, two.test, two.train_rows) == (canvas / "train.beton", canvas / "val.beton", None)
    both = np.sort(np.concatenate([one.train_rows, one.test_rows]))
    assert both.tolist() == list(range(48)) and len(one.test_rows) == 24  # names repeat: 48 files
    assert find_target("x", tmp_path / "single").train_rows.tolist() == one.train_rows.tolist()

    encoder = load_run_encoder(folder, device="cpu")
    results = [evaluate_transfer(encoder, target) for target in (two, one)]
    results.append(evaluate_transfer(encoder, one, protocol="reference"))
    results.append(evaluate_transfer(encoder, one, "finetune", overrides=QUICK))
    assert results[2]["settings"]["schedule"] == "flowers102"  # its own
    assert [result["val"]["images"] for result in results] == [12, 24, 24, 24]
    assert [result["train"]["images"] for result in results] == [48, 24, 24, 24]
    for result in results:
        assert json.loads((folder / "eval" / f"{result['evaluation']}-seed0.json").read_text()) == result
        assert np.load(folder / "eval" / result["confusion"]).sum() == result["val"]["images"]
    rows = summarize_runs(results)
    assert [row.evaluation for row in rows] == [
        "transfer-photos-linear-sweep", "transfer-flowers102-linear-sweep", "transfer-flowers102-linear-reference",
        "transfer-flowers102-finetune",
    ]  # fmt: skip
    assert tables_of(summary_table(rows), 160)[0].row_count == 4
    with pytest.raises(UserError, match="nowhere"):
        find_target("x", tmp_path / "nowhere")
    for number in range(2):
        shutil.copytree(photos / "val" / "class0", tmp_path / "few" / str(number))
        for file in sorted((tmp_path / "few" / str(number)).iterdir())[1:]:
            file.unlink()
    build_beton("imagefolder", tmp_path / "few", tmp_path / "few_b", canvas=32, workers=1)
    with pytest.raises(UserError, match="two images or more each, for few"):
        find_target("few", tmp_path / "few_b")


def test_a_folder_of_runs_stands_for_all_that_are_finished(fastssl, canvas, tmp_path):
    """As that of a sweep, whose runs lie two levels below, next to logs."""
    sweep = tmp_path / "sweep"
    for seed in range(3):
        make_run(sweep / "vicreg" / f"seed={seed}", data_of(canvas), seed=seed)
    (sweep / "slurm" / "1").mkdir(parents=True)
    arguments = ("eval", "knn", sweep, "--k", "3", "--device", "cpu")
    code, _, err = fastssl(*arguments)
    assert code == 2 and f"No run in {sweep} is finished: name the run directories" in err.replace("\nhint: ", ": ")
    finished = [sweep / "vicreg" / f"seed={seed}" / "encoder.safetensors" for seed in range(2)]
    finished[0].touch()
    code, said, err = fastssl(*arguments)
    assert code == 0 and "vicreg/seed=0" in said and "more" not in said and err.count("is not finished, and is") == 2
    finished[1].touch()
    code, said, err = fastssl(*arguments)
    assert code == 0 and "vicreg (2 seeds)" in said and err.count("is not finished, and is left out") == 1


def test_runs_that_differ_in_their_seed_only_share_a_row(canvas, tmp_path):
    made = [make_run(tmp_path / f"seed{seed}", data_of(canvas), seed=seed)[0] for seed in range(3)]
    made.append(make_run(tmp_path / "other", data_of(canvas), embedding={"stochastic": "z"})[0])
    results = [evaluate_knn(*opened(run), ks=(3, 5)) for run in made]
    results.append(evaluate_knn(*opened(made[0], untrained=True), ks=(3, 5)))
    shutil.copy(made[0] / "checkpoints" / "last.pt", made[0] / "checkpoints" / "best.pt")
    results.append(evaluate_knn(*opened(made[0] / "checkpoints" / "best.pt"), ks=(3, 5)))
    results.append(results[0])  # the same run again
    rows = summarize_runs(results)
    assert [row.seeds for row in rows] == [[0, 1, 2], [0], [0], [0]] and rows[2].untrained
    values = [result["metrics"]["accuracy_k3_t0.07"] for result in results[:3]]
    metric = rows[0].metrics["accuracy_k3_t0.07"]
    assert metric.mean == pytest.approx(np.mean(values)) and metric.std == pytest.approx(np.std(values, ddof=1))
    assert rows[1].metrics["accuracy_k3_t0.07"].std is None
    of_images = [result["intervals"]["accuracy_k3_t0.07"] for result in results[:3]]
    assert rows[0].intervals["accuracy_k3_t0.07"] == interval_of_mean(values, of_images)
    assert rows[1].intervals == results[3]["intervals"]
    for result in results:
        result.pop("intervals", None)  # as in results of older versions: the seeds alone are known
    older = summarize_runs(results)
    assert older[0].intervals["accuracy_k3_t0.07"] == interval_of_mean(values, []) and not older[1].intervals
    write_summary(tmp_path / "summary.json", rows)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == [dataclasses.asdict(row) for row in rows]
    assert tables_of(summary_table(rows), 160)[0].row_count == 4
