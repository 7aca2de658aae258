"""Evaluations of images without labels: what needs labels refuses them with one sentence, what does not works."""

import re

import numpy as np
import pytest
from relabelled import relabelled, without_labels
from small_models import make_run

from fastssl.beton import read_header, read_labels, read_metadata
from fastssl.common.errors import UserError
from fastssl.evaluation import (
    BetonSubset,
    EvaluationData,
    classification_metrics,
    evaluate_knn,
    evaluate_semisup,
    find_evaluation_data,
    find_target,
    fit_lbfgs,
    fit_reference,
    fit_sweep,
    knn_accuracy,
    load_run_encoder,
)
from fastssl.evaluation.mutual_information import estimators, evaluate_mi
from fastssl.evaluation.ood import detector, evaluate_ood, find_sets
from fastssl.evaluation.ood.detectors import LABEL_BASED
from fastssl.evaluation.splits import balanced_subsets, stratified_holdout
from fastssl.evaluation.uncertainty.measures import nearest_is_wrong
from fastssl.loading import SampleSelection
from fastssl.loading.samples import Samples

KINDS = {
    "none": "48 of the 48 images of .*none.beton have no label",
    "some": "16 of the 48 images of .*some.beton have no label",
    "one": "one.beton holds one class only",
}
COMMANDS = ("knn", "linear", "semisup", "uncertainty")


@pytest.fixture(scope="module")
def unlabelled(canvas, tmp_path_factory):
    """Three files of the same images, with labels of none, of some, and of one class."""
    return without_labels(canvas / "train.beton", tmp_path_factory.mktemp("unlabelled"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_evaluation_with_labels_refuses_unlabelled_training_images(kind, unlabelled, canvas, tmp_path, fastssl):
    data = {"train": str(unlabelled[kind]), "val": str(canvas / "val.beton")}
    folder, _, _ = make_run(tmp_path / "run", data)
    for command in COMMANDS:
        code, _, err = fastssl("eval", command, folder, "--device", "cpu")
        assert code == 2 and len(err.split("\n")) <= 3, err
        assert re.search(KINDS[kind], " ".join(err.split())), err
    assert not (folder / "eval").exists() and not (folder / "features").exists()
    with pytest.raises(UserError, match=f"{KINDS[kind]}.*: name a labeled file with --train, or list"):
        find_evaluation_data(load_run_encoder(folder, device="cpu"))
    with pytest.raises(UserError, match=KINDS[kind]):  # however the data is named
        EvaluationData(BetonSubset(unlabelled[kind]), BetonSubset(canvas / "val.beton"))


@pytest.mark.parametrize("count", [1, 11, 12])
def test_every_evaluation_with_labels_refuses_unlabelled_test_images(count, canvas, tmp_path):
    label_M = read_labels(canvas / "val.beton")
    label_M[:count] = -1
    val = relabelled(canvas / "val.beton", tmp_path / "part.beton", label_M)
    with pytest.raises(UserError, match=f"{count} of the 12 images of .*part.beton ha.* no label, .*: .* with --val"):
        EvaluationData(BetonSubset(canvas / "train.beton"), BetonSubset(val))


@pytest.mark.parametrize("kind", KINDS)
def test_transfer_refuses_unlabelled_data(kind, unlabelled, canvas, tmp_path):
    with pytest.raises(UserError, match=f"{KINDS[kind]}.*, .*transfer needs.*: give --to mine="):
        find_target("mine", unlabelled[kind])  # a single file, of which a half is tested on
    label_N = read_labels(unlabelled[kind])
    train = relabelled(canvas / "train.beton", tmp_path / "train.beton", label_N)
    relabelled(canvas / "val.beton", tmp_path / "test.beton", read_labels(canvas / "val.beton"))
    with pytest.raises(UserError, match=f"{train} .*transfer needs"):
        find_target("mine", tmp_path)


def test_images_outside_the_list_need_no_labels(unlabelled, canvas, tmp_path):
    """Those of data.subset, and those of --list: a file may hold labelled and unlabelled images."""
    path = unlabelled["some"]
    labelled = read_metadata(path)["index"][read_labels(path) >= 0].tolist()
    (tmp_path / "list.txt").write_text("\n".join(map(str, labelled)))
    data = {"train": str(path), "val": str(canvas / "val.beton")}
    folder, _, _ = make_run(tmp_path / "run", {**data, "subset": str(tmp_path / "list.txt")})
    encoder = load_run_encoder(folder, device="cpu")
    assert evaluate_knn(encoder, find_evaluation_data(encoder), ks=(5,))["train"]["images"] == 32

    without_list, _, _ = make_run(tmp_path / "without", data)
    encoder = load_run_encoder(without_list, device="cpu")
    listed = find_evaluation_data(encoder, train_list=tmp_path / "list.txt")
    quick = ["train.epochs=1", "train.batch_size=8"]
    result = evaluate_semisup(encoder, listed, list_file=tmp_path / "list.txt", overrides=quick)
    assert result["train"]["images"] == 32
    with pytest.raises(UserError, match="16 of the 48 images .*which a share of every class needs: .* with --list"):
        evaluate_semisup(encoder, listed, percent=50, overrides=quick)


def test_labels_are_checked_of_the_images_that_data_limit_draws(canvas, tmp_path):
    path = canvas / "train.beton"
    recipe_data = {"train": str(path), "val": str(canvas / "val.beton"), "limit": 20}
    drawn = BetonSubset(path, None, 20).labels("this test", "never happens")
    assert len(drawn) == 20 and len(np.unique(drawn)) == 3
    # Drop the label of every image that is not drawn.
    label_N = read_labels(path)
    rows = SampleSelection(limit=20).rows(Samples.read(read_header(path)))
    partly = relabelled(path, tmp_path / "partly.beton", np.where(np.isin(np.arange(48), rows), label_N, -1))
    folder, _, _ = make_run(tmp_path / "run", {**recipe_data, "train": str(partly)})
    encoder = load_run_encoder(folder, device="cpu")
    assert evaluate_knn(encoder, find_evaluation_data(encoder), ks=(5,))["train"]["images"] == 20


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_distribution_detectors_with_labels_are_skipped_and_the_others_run(kind, unlabelled, canvas, tmp_path):
    """ID and OOD sets need no labels at all; the reason of the skipped detectors is in the result."""
    folder, _, _ = make_run(tmp_path / "run", {"train": str(unlabelled[kind]), "val": str(unlabelled["none"])})
    encoder = load_run_encoder(folder, device="cpu")
    result = evaluate_ood(encoder, find_sets(encoder, near=[unlabelled["some"]], far=[canvas / "val.beton"]))
    assert result["detectors"] and not set(result["detectors"]) & set(LABEL_BASED)
    counts = {"none": "48 of the 48 training images have no label", "some": "16 of the 48 training images have no"}
    assert counts.get(kind, "no labels of two classes") in result["skipped"]["energy"]
    assert result["skipped"]["mahalanobis"] == result["skipped"]["energy"]


def test_mutual_information_needs_no_labels(unlabelled, canvas, tmp_path, monkeypatch):
    folder, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    monkeypatch.setattr(estimators, "STEPS", 2)
    result = evaluate_mi(load_run_encoder(folder, device="cpu"), unlabelled["none"])
    assert result["metrics"]


X, MISSING = np.eye(12, 4, dtype=np.float32), np.arange(12) % 3 - 1


@pytest.mark.parametrize(
    "use",
    [
        lambda: knn_accuracy(X, MISSING, X, np.zeros(12, int)),
        lambda: knn_accuracy(X, np.zeros(12, int), X, MISSING),
        lambda: classification_metrics(X, MISSING, np.arange(4)),
        lambda: fit_sweep(X, MISSING),
        lambda: fit_lbfgs(X, MISSING),
        lambda: fit_reference(X, MISSING),
        lambda: balanced_subsets(MISSING, 1, 1, 0),
        lambda: stratified_holdout(MISSING, 0.5, 0),
        lambda: nearest_is_wrong(X, MISSING),
        lambda: detector("mahalanobis").fit(X, labels=MISSING),
    ],
)
def test_functions_of_arrays_refuse_negative_labels(use):
    """As a class, -1 would give figures that mean nothing."""
    with pytest.raises(ValueError, match="4 of 12 labels are negative, which means no label"):
        use()
