"""A run whose embeddings or whose loss stand still says so, once on the way and once at the end."""

import pytest
from training_runs import metrics_of, small

from fastssl.recipe import load_recipe
from fastssl.training import train
from fastssl.training.collapse import CollapseWarning

# kind -> (recipe keys, how the message begins)
COLLAPSED = {
    "no variance term": (
        ["objective={name: vicreg, var: 0, cov: 0}", "optim={lr: 0.1, warmup_epochs: 0}", "model.backbone=test_vit"],
        "the embeddings have collapsed: since step",
    ),
    "the loss is switched off": (
        ["objective={name: vicreg, inv: 0, var: 0, cov: 0}"],
        "the loss has been 0 since step",
    ),
    "a loss without contrast": (
        ["objective={name: simclr, temperature: 1e9}"],
        "the loss has been 3.43",
    ),
}


def train_linear(canvas, run_dir, *keys):
    return train(load_recipe("recipes/barlow.yaml", [*small(canvas, run_dir, "train.epochs=8"), *keys]))


@pytest.fixture(autouse=True)
def after_ten_steps(monkeypatch):
    monkeypatch.setattr(CollapseWarning, "STEPS", 10)


@pytest.mark.parametrize("kind", COLLAPSED)
def test_a_collapse_is_one_warning_and_a_last_line(kind, canvas, tmp_path, capsys):
    keys, message = COLLAPSED[kind]
    run = train_linear(canvas, tmp_path / "run", "model.projector={layers: 1, hidden: 8, out: 8}", *keys)
    lines = capsys.readouterr().out.splitlines()
    assert len(metrics_of(run)) == 24  # it is never stopped
    assert [line.startswith("warning: " + message) for line in lines].count(True) == 1
    assert lines[-1].startswith("Finished, but " + message) and str(run) in lines[-1]
    assert not any(line.startswith("Done") for line in lines)


@pytest.mark.parametrize("recipe", ["barlow", "hprob_vicreg", "supervised"])
def test_a_healthy_run_ends_as_before(recipe, canvas, tmp_path, capsys):
    keys = ["objective.classes=3"] if recipe == "supervised" else []
    train(load_recipe(f"recipes/{recipe}.yaml", [*small(canvas, tmp_path / "run", "train.epochs=8"), *keys]))
    out = capsys.readouterr().out
    assert "Done: " in out and "collapsed" not in out and "the loss has been" not in out


def readings(*values):
    """(step, RankMe, loss) -> the steps at which the warning comes, and the problem at the end."""
    warning = CollapseWarning(images=64, dims=8)
    keys = ("rankme_h", "rankme_z", "std_z", "loss")
    given = [step for step, rank, loss in values if warning.check(step, dict(zip(keys, (40.0, rank, 0.5, loss))))]
    return given, warning.problem()


def test_a_constant_z_counts_whatever_its_rank():
    warning = CollapseWarning(images=64, dims=64)
    metrics = {"rankme_h": 40.0, "rankme_z": 30.0, "std_z": 1e-4}
    given = [warning.check(5 * n, {**metrics, "loss": 1 / (n + 1)}) for n in range(9)]
    assert [text is not None for text in given].count(True) == 1
    assert given[4] is not None and "all images have nearly the same one (RankMe 30)" in given[4]


def test_rankme_may_be_missing():
    """It is asked for while it is low; without it, std_z alone decides."""
    low, none = {"rankme_h": 40.0, "rankme_z": 1.01, "std_z": 0.5}, {"std_z": 0.5}
    warning = CollapseWarning(images=64, dims=64)
    asked = []
    for n, metrics in enumerate([none, low, low, none, none]):
        warning.check(5 * n, {**metrics, "loss": 1 / (n + 1)})
        asked.append(warning.is_suspicious)
    assert asked == [False, True, True, False, False]
    constant = CollapseWarning(images=64, dims=64)
    given = [constant.check(5 * n, {"std_z": 1e-4, "loss": 1 / (n + 1)}) for n in range(9)]
    assert given[4] is not None and "all images have nearly the same one, so nothing" in given[4]


def test_logits_of_two_classes_have_a_low_rank_anyway():
    metrics = {"rankme_h": 9.0, "rankme_z": 1.02, "std_z": 2.0}
    two, many = CollapseWarning(images=64, dims=2), CollapseWarning(images=64, dims=10)
    for n in range(9):
        two.check(5 * n, {**metrics, "loss": 1 / (n + 1)})
        many.check(5 * n, {**metrics, "loss": 1 / (n + 1)})
    assert two.problem() is None and many.problem() is not None


def test_readings_in_a_row_count():
    falling = [1 / step for step in range(1, 100)]
    assert readings(*[(5 * n, 1.01, falling[n]) for n in range(8)])[0] == [20]
    # A few readings only, or readings that recover, are no collapse.
    assert readings(*[(50 * n, 1.01, falling[n]) for n in range(4)]) == ([], None)
    assert readings(*[(5 * n, 1.01 if n % 4 else 30.0, falling[n]) for n in range(30)]) == ([], None)
    # One that ends before the run does is a warning, and no problem at the end.
    given, problem = readings(*[(5 * n, 1.01 if n < 8 else 30.0, falling[n]) for n in range(12)])
    assert given == [20] and problem is None
    assert readings(*[(5 * n, float("nan"), float("nan")) for n in range(12)]) == ([], None)
    given, problem = readings(*[(5 * n, 30.0, 2.5 * (1 + 1e-7 * n)) for n in range(12)])
    assert given == [20] and problem.startswith("the loss has been 2.5 since step 0")
