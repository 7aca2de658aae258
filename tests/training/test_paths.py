"""What users write for a run, a data set or a file: folders, files inside a run, and ~."""

import shutil

import pytest
from relabelled import without_labels
from training_runs import losses_of, metrics_of, small

from fastssl.common.errors import UserError
from fastssl.evaluation import find_evaluation_data, load_run_encoder
from fastssl.evaluation.ood import find_sets
from fastssl.evaluation.probe import probe_from_recipe
from fastssl.models.checkpoint import find_run_dir
from fastssl.recipe import load_recipe
from fastssl.training import train


@pytest.fixture(scope="module")
def finished(canvas, tmp_path_factory):
    """A run of one epoch in RUNS/run."""
    recipe = load_recipe(
        "recipes/barlow.yaml", small(canvas, tmp_path_factory.mktemp("runs") / "run", "train.epochs=1", "probe.every=1")
    )
    return train(recipe, probe=probe_from_recipe(recipe))


INSIDE = ["", "checkpoints", "checkpoints/last.pt", "checkpoints/best.pt", "recipe.yaml", "encoder.safetensors", ".."]


@pytest.mark.parametrize("inside", INSIDE)
def test_a_path_in_a_run_or_above_it_means_that_run(finished, inside):
    assert find_run_dir(finished / inside).resolve() == finished.resolve()


def test_home_is_expanded_and_several_or_no_runs_are_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    from pathlib import Path

    assert find_run_dir(Path("~/run/checkpoints")) == finished
    for name in "ab":
        shutil.copytree(finished, tmp_path / name)
    with pytest.raises(UserError, match="holds 2 runs, such as .*/a: name one of them"):
        find_run_dir(tmp_path)
    for nothing in (tmp_path / "a" / "features", tmp_path / "gone" / "last.pt", tmp_path / "a" / "eval" / "knn.json"):
        with pytest.raises(UserError, match="holds no run"):
            find_run_dir(nothing)


@pytest.mark.parametrize("inside", ["checkpoints/last.pt", "recipe.yaml", ".."])
def test_resume_and_eval_take_such_a_path(finished, canvas, tmp_path, inside, fastssl):
    run = tmp_path / "runs" / "run"
    shutil.copytree(finished, run)
    code, out, err = fastssl("train", "--resume", str(run / inside))
    assert code == 0, err
    assert "barlow is already finished" in out and "Already finished: 3 steps" in out and "Resuming" not in out
    assert load_run_encoder(run / inside).weights.name == "last.pt"


def test_a_run_without_its_recipe_is_one_sentence(finished, tmp_path, fastssl):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "recipe.yaml").unlink()
    for arguments in (["train", "--resume", run], ["eval", "knn", run]):
        code, _, err = fastssl(*arguments)
        assert code == 2 and "recipe.yaml hint: put the run's recipe.yaml back there" in " ".join(err.split())


def test_eval_takes_a_lone_checkpoint(finished, canvas, tmp_path, fastssl):
    lone = tmp_path / "model.pt"
    shutil.copy(finished / "checkpoints" / "best.pt", lone)
    for _ in range(2):
        code, out, err = fastssl("eval", "knn", str(lone))
        assert code == 0, err
        assert "k = 48" in out or "48" in out
    assert (tmp_path / "model_eval" / "eval" / "knn.json").is_file()
    other = tmp_path / "model_eval" / "recipe.yaml"
    other.write_text(other.read_text().replace("backbone: test_resnet", "backbone: resnet18"))
    with pytest.raises(UserError, match="model_eval has results of other weights, .*: move it, or rename"):
        load_run_encoder(lone)
    (tmp_path / "broken.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_run_encoder(tmp_path / "broken.pt")
    assert not (tmp_path / "broken_eval").exists()


def test_home_is_expanded_in_every_path_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["run.dir", "data.train", "data.val", "data.subset", "model.init", "probe.train"]
    recipe = load_recipe("recipes/barlow.yaml", [f"{key}=~/x" for key in keys])
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(recipe, section), name) == f"{tmp_path}/x"


def test_a_folder_of_data_means_its_file_of_the_split(canvas, tmp_path):
    keys = small(
        canvas, tmp_path / "run", f"data.train={canvas}", f"data.val={canvas}", "train.epochs=1", "probe.every=1"
    )
    recipe = load_recipe("recipes/barlow.yaml", keys)
    run = train(recipe, probe=probe_from_recipe(recipe))
    assert len(losses_of(run)) == 3 and "knn" in metrics_of(run)[-1]
    data = find_evaluation_data(load_run_encoder(run))
    assert (data.train.path, data.val.path) == (canvas / "train.beton", canvas / "val.beton")
    named = find_evaluation_data(load_run_encoder(run), train=canvas, val=canvas)
    assert (named.train.path, named.val.path) == (canvas / "train.beton", canvas / "val.beton")
    sets = find_sets(load_run_encoder(run), far=[canvas])
    assert [data.path.name for data in (sets.fit, sets.id, *sets.far.values())] == [
        "train.beton",
        "val.beton",
        "val.beton",
    ]


@pytest.mark.parametrize(
    ("key", "files", "message"),
    [
        (
            "data.train",
            ["photo.jpg"],
            r"is a folder without train.beton: make it with `fastssl build-beton imagefolder",
        ),
        ("data.train", ["val.beton"], r"is a folder without train.beton: name one of its files, val.beton"),
        (
            "data.val",
            ["test.beton", "train.beton"],
            r"without val.beton: name one of its files, test.beton, train.beton",
        ),
    ],
)
def test_a_folder_without_that_file_is_one_sentence(key, files, message, canvas, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in files:
        (folder / file).touch()
    keys = [*small(canvas, tmp_path / "run"), "probe.every=1", f"{key}={folder}"]
    recipe = load_recipe("recipes/barlow.yaml", keys)
    with pytest.raises(UserError, match=message):
        train(recipe, probe=probe_from_recipe(recipe))
    assert not (tmp_path / "run").exists()


def test_the_probe_searches_labeled_images_of_its_own(canvas, tmp_path):
    file = without_labels(canvas / "train.beton", tmp_path)["none"]
    keys = small(canvas, tmp_path / "run", f"data.train={file}", "probe.every=1", "train.epochs=1")
    with pytest.raises(UserError, match="have no label, which the kNN probe needs: .*probe.train"):
        probe_from_recipe(load_recipe("recipes/barlow.yaml", keys))
    recipe = load_recipe("recipes/barlow.yaml", [*keys, f"probe.train={canvas}"])
    assert 0 <= metrics_of(train(recipe, probe=probe_from_recipe(recipe)))[-1]["knn"] <= 1
    with pytest.raises(UserError, match="leave out one of them"):
        load_recipe("recipes/barlow.yaml", [*keys, "probe={split: rest, train: x.beton}", "data.limit=9"])
