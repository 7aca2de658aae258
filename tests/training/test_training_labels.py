"""Training with images that have no label: what needs labels refuses them before the run begins."""

import re

import pytest
from relabelled import relabelled, without_labels
from training_runs import metrics_of, small

from fastssl.beton import read_labels, read_metadata
from fastssl.common.errors import UserError
from fastssl.evaluation.probe import probe_from_recipe
from fastssl.profiling import profile_recipe
from fastssl.recipe import load_recipe
from fastssl.training import train

MESSAGES = {
    "none": r"48 of the 48 images of .*none.beton have no label, which {use} needs: {fix}",
    "some": r"16 of the 48 images of .*some.beton have no label, which {use} needs: {fix}",
    "one": r"one.beton holds one class only, and {use} needs several: {fix}",
}


def message(kind, **parts):
    return MESSAGES[kind].format(**parts)


@pytest.mark.parametrize("kind", MESSAGES)
def test_the_probe_of_unlabelled_training_images_is_refused_before_the_run_begins(kind, canvas, tmp_path, fastssl):
    file = without_labels(canvas / "train.beton", tmp_path)[kind]
    keys = small(canvas, tmp_path / "run", f"data.train={file}", "probe.every=1")
    code, out, err = fastssl("train", "recipes/barlow.yaml", *keys)
    assert code == 2 and not (tmp_path / "run").exists()
    one_line = " ".join(err.replace("\nhint: ", ": ").split())
    assert re.search(message(kind, use="the kNN probe", fix="set probe.train to"), one_line)
    assert "The kNN probe cannot run, and probe.every=0 leaves it out: " in one_line
    assert probe_from_recipe(load_recipe("recipes/barlow.yaml", [*keys, "probe.every=0"])) is None


def test_a_run_without_images_for_its_probe_says_so(canvas, tmp_path, fastssl):
    said = "There is no probe in this run, as data.val=null"
    for number, (keys, expected) in enumerate(
        {
            ("data.val=null", "probe.every=1"): True,
            ("data.val=null", "probe.every=0"): False,
            ("data.val=null", "data.limit=20", "probe={every: 1, split: rest, k: 3}"): False,
            ("probe.every=1",): False,
        }.items()
    ):
        settings = small(canvas, tmp_path / str(number), "train.epochs=1", *keys)
        code, out, err = fastssl("train", "recipes/barlow.yaml", *settings)
        assert code == 0 and (said in out) == expected, (keys, out, err)


@pytest.mark.parametrize("kind", ["none", "some"])
def test_the_probe_on_unlabelled_validation_images_is_refused(kind, canvas, tmp_path):
    label_N = read_labels(canvas / "val.beton")
    label_N[: 12 if kind == "none" else 1] = -1
    file = relabelled(canvas / "val.beton", tmp_path / "unlabelled.beton", label_N)
    keys = small(canvas, tmp_path / "run", "probe.every=1", f"data.val={file}")
    count = "12 of the 12 images .* have" if kind == "none" else "1 of the 12 images .* has"
    with pytest.raises(UserError, match=f"{count} no label, which the kNN probe needs: .* another data.val"):
        probe_from_recipe(load_recipe("recipes/barlow.yaml", keys))


@pytest.mark.parametrize("change", ["swapped", "renamed", "one more"])
def test_the_probe_on_classes_that_are_numbered_differently_is_refused(change, canvas, tmp_path):
    classes = ["class0", "class1", "class2"]
    other = {"swapped": ["class1", "class0", "class2"], "renamed": ["a", "b", "c"], "one more": ["another", *classes]}
    label_N = read_labels(canvas / "val.beton")
    file = relabelled(canvas / "val.beton", tmp_path / "other.beton", label_N, other[change])
    keys = small(canvas, tmp_path / "run", "probe.every=1", f"data.val={file}")
    with pytest.raises(UserError, match="number their classes differently"):
        probe_from_recipe(load_recipe("recipes/barlow.yaml", keys))


def test_the_probe_looks_at_the_images_that_it_uses_only(canvas, tmp_path):
    """Of a list, of data.limit, and of the rest that data.limit leaves out."""
    file = without_labels(canvas / "train.beton", tmp_path)["some"]
    labelled = read_metadata(file)["index"][read_labels(file) >= 0].tolist()
    (tmp_path / "list.txt").write_text("\n".join(map(str, labelled)))
    keys = small(canvas, tmp_path / "run", f"data.train={file}", "probe={every: 1, k: 3}", "train.epochs=1")
    listed = [*keys, f"data.subset={tmp_path}/list.txt"]
    recipe = load_recipe("recipes/barlow.yaml", listed)
    run = train(recipe, probe=probe_from_recipe(recipe))
    assert [0 <= line["knn"] <= 1 for line in metrics_of(run) if "knn" in line] == [True]
    assert probe_from_recipe(load_recipe("recipes/barlow.yaml", [*listed, "data.limit=16", "probe.split=rest"]))
    with pytest.raises(UserError, match="of the 20 images .* have no label, which the kNN probe needs"):
        probe_from_recipe(load_recipe("recipes/barlow.yaml", [*keys, "data.limit=20", "probe.split=rest"]))


@pytest.mark.parametrize("kind", MESSAGES)
def test_supervised_training_and_its_profile_refuse_unlabelled_images(kind, canvas, tmp_path):
    file = without_labels(canvas / "train.beton", tmp_path)[kind]
    keys = small(canvas, tmp_path / "run", f"data.train={file}", "objective={name: supervised, classes: 3}")
    recipe = load_recipe("recipes/supervised.yaml", keys)
    expected = message(kind, use="objective.name=supervised", fix="list images with labels of several classes")
    with pytest.raises(UserError, match=expected):
        train(recipe)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=expected):
        profile_recipe(recipe, keys, tmp_path / "trace.json")
