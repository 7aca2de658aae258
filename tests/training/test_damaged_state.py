"""A checkpoint with wrong values, however it came about, is one sentence, and no run goes on from it."""

import copy
import errno
import math
import os
import shutil
import zipfile

import pytest
import torch
from training_runs import checkpoint_in, losses_of, small

import fastssl
from fastssl.common.errors import UserError
from fastssl.models import checkpoint
from fastssl.models.checkpoint import read_checkpoint
from fastssl.recipe import load_recipe
from fastssl.training import optim, train

STEPS = 6  # of the run


@pytest.fixture(scope="module")
def finished(canvas, tmp_path_factory):
    """A run of two epochs, and what its checkpoint holds."""
    keys = small(canvas, tmp_path_factory.mktemp("finished") / "run")
    run = train(load_recipe("recipes/barlow.yaml", keys))
    (run / "checkpoints" / "previous.pt").unlink()
    return run, checkpoint_in(run)


def changed(saved, key, value):
    """The checkpoint with another value at a dotted key."""
    head, _, rest = key.partition(".")
    if isinstance(saved, list):
        return [changed(x, rest, value) if i == int(head) else x for i, x in enumerate(saved)]
    head = int(head) if head.isdecimal() else head
    return {**saved, head: changed(saved[head], rest, value) if rest else value}


def refused(run, saved, *keys):
    """The sentence that a resume from these values ends with."""
    torch.save(saved, run / "checkpoints" / "last.pt")
    recipe = load_recipe(str(run / "recipe.yaml"), [*keys, "train.epochs=3"])
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        train(recipe, resume=run)
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 600 and sentence.isprintable()
    assert (run / "metrics.jsonl").read_bytes() == before
    return sentence


ONE = torch.ones(())
NO_COUNTS = (-1, True, 1.0, math.nan, "1", None, 2**70, -(2**70), ONE, [1], {})


@pytest.mark.parametrize("key", ["step", "epochs_probed", "loader.epoch", "loader.position", "decay_epochs"])
def test_counts(finished, key):
    run, saved = finished
    for value in NO_COUNTS if key == "step" else NO_COUNTS[:4]:
        assert f"is a damaged checkpoint ({key}" in refused(run, changed(saved, key, value)), value


@pytest.mark.parametrize(
    "key, values",
    [
        ("best", [{"knn": math.nan, "step": 1}, {"knn": 1.0}, {"knn": True, "step": 1}, {1: 1.0, "step": 1}, [], 10]),
        ("seconds", [-1.0, math.nan, math.inf, True, "1", 10**400, ONE]),
        ("precision", ["fp8", "auto", 16, None, True]),
        ("torch_threads", [0, -1, True, 2**40, 1.0, None]),
        ("loader.seed", [None, "0", -1]),
        ("loader.order", ["up", 3, []]),
        ("loader.samples", [3, None, b"x"]),
        ("scaler", [{"scale": -1.0}, {"scale": math.inf}, {"growth_interval": 1.5}, [], None]),
        ("optimizer", [None, {}, {"state": [], "param_groups": []}, {"state": {"a": {}}, "param_groups": []}]),
        ("optimizer.state.0.exp_avg", ["x", [1], torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")]),
        ("model", [None, [], {"x": 3}, {3: ONE}, {"x": torch.zeros(2, dtype=torch.complex64)}]),
        ("model.encoder.conv1.0.weight", [ONE.expand(10**12), ONE.to_sparse(), torch.ones(2, device="meta")]),
        ("skipped", [0, None, "x", torch.zeros(1).to_sparse()]),
        ("rng", [3, None, torch.zeros(2, device="meta")]),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_sign_or_range(finished, key, values):
    run, saved = finished
    for value in values:
        place = {**saved, "model": {**saved["model"], key.removeprefix("model."): value}}
        sentence = refused(run, place if key.startswith("model.") else changed(saved, key, value))
        assert f"is a damaged checkpoint ({key.split('.')[0]}" in sentence, value


def test_counts_that_contradict_each_other(finished):
    """Each one would be right in another checkpoint."""
    run, saved = finished
    for change, says in (
        ({"step": 5}, "step 5 is not at image 0 of epoch 2"),
        ({"step": 10**9}, "step 1000000000"),
        ({"loader": {**saved["loader"], "position": 16}}, "step 6 is not at image 16"),
        ({"loader": {**saved["loader"], "position": 7}}, "at image 7"),
        ({"loader": {**saved["loader"], "position": 10**12}, "step": 6 + 10**12 // 16}, "is not at image"),
        ({"loader": {**saved["loader"], "epoch": 10**9}, "step": 3 * 10**9}, "after the end of 3 epochs"),
        ({"epochs_probed": 3}, "a probe after 3 epochs, but 2 are done"),
        ({"skipped": torch.tensor(7)}, "skipped steps"),
        ({"skipped": torch.tensor(-1)}, "skipped steps"),
        ({"skipped": torch.tensor(1.5)}, "skipped steps"),
        ({"skipped": torch.tensor([1])}, "skipped steps"),
        ({"rng": torch.zeros(7, dtype=torch.uint8)}, "does not fit its own recipe"),
        ({"rng": torch.zeros(5056)}, "does not fit its own recipe"),
        ({"model": {"x": torch.zeros(1)}}, "does not fit its own recipe"),
        ({"loader": {**saved["loader"], "samples": "0"}}, "does not hold the images"),
    ):
        assert says in refused(run, {**saved, **change}), change
    assert "decay_epochs: 9" in refused(run, {**saved, "decay_epochs": 9}, "optim.extend=constant")
    for key in saved.keys() - {"recipe", "model", "step", "decay_epochs", "precision", "cuda_rng", "ema"}:
        sentence = refused(run, {name: value for name, value in saved.items() if name != key})
        assert f"does not fit its own recipe, so no run goes on from it ('{key}'" in sentence


def test_the_state_of_an_optimizer_must_fit_its_parameters(finished):
    """The kernels of fused steps do not compare shapes: they would read after the end of a tensor."""
    run, saved = finished
    groups = saved["optimizer"]["param_groups"]
    for key, value in (
        ("state.0.exp_avg", torch.zeros(3)),
        ("state.0.exp_avg", ONE),
        ("state.0.step", torch.zeros(2)),
        ("state.0.exp_avg_sq", None),
        ("state.0", {"exp_avg": saved["optimizer"]["state"][0]["exp_avg"]}),
        ("state", {i + 1: state for i, state in saved["optimizer"]["state"].items()}),
        ("param_groups", []),
        ("param_groups", groups[:1]),
        ("param_groups", [{}, {}]),
        ("param_groups", [{"params": 3}, {"params": ["x"]}]),
        ("param_groups", [groups[0], {**groups[1], "params": []}]),
    ):
        sentence = refused(run, changed(saved, f"optimizer.{key}", value))
        assert "does not fit its own recipe, so no run goes on from it" in sentence, (key, value)


def test_options_of_an_optimizer_come_from_the_recipe(finished):
    run, saved = finished
    group = saved["optimizer"]["param_groups"][0]
    hostile = {**group, "lr": "x", "betas": (7, []), "capturable": True, "fused": False, "eps": math.nan, "maximize": 1}
    torch.save(changed(saved, "optimizer.param_groups.0", hostile), run / "checkpoints" / "last.pt")
    again = train(load_recipe(str(run / "recipe.yaml"), ["train.epochs=3", "optim.extend=constant"]), resume=run)
    assert len(losses_of(again)) == 9 and all(math.isfinite(loss) for _, loss in losses_of(again))
    assert checkpoint_in(again)["optimizer"]["param_groups"][0].keys() == group.keys()


NAMES = ["adam", "adamax", "adagrad", "adafactor", "rmsprop", "nadam", "radam", "asgd", "rprop", "swats", "madgrad",
         "aggmo", "shampoo", "novograd", "sgd", "lars", "lamb", "adamw", "yogi", "adabound", "qhm", "pid"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_takes_its_own_state(name):
    """Some have states of other shapes than their parameters, or change their options."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(3, 2))
    config = load_recipe("recipes/barlow.yaml", [f"optim.name={name}", "optim.weight_decay=0"]).optim

    def steps(optimizer, count):
        for _ in range(count):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * (i + 1))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    first = optim.make_optimizer(model, config)
    start = steps(first, 2)
    saved = copy.deepcopy(first.state_dict())
    straight = steps(first, 1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), start):
            p.copy_(value)
    again = optim.make_optimizer(model, config)
    optim.load_optimizer(again, saved)
    assert all(torch.equal(a, b) for a, b in zip(steps(again, 1), straight))


def test_small_files_that_would_fill_the_memory(finished, tmp_path):
    run, saved = finished
    torch.save(saved, tmp_path / "good.pt")
    read_checkpoint(tmp_path / "good.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in good.infolist():
            archive.writestr(part.filename, good.read(part))
        with archive.open("archive/data/99", "w", force_zip64=True) as part:
            for _ in range(100):
                part.write(bytes(1 << 20))
    sparse = tmp_path / "sparse.pt"
    with open(sparse, "wb") as file:
        file.truncate(1 << 42)
    nested = []
    for _ in range(40):  # 2^40 objects for a function that visits each
        nested = [nested, nested]
    torch.save({**saved, "optimizer": nested}, tmp_path / "nested.pt")
    torch.save({**saved, "best": {str(i): 1.0 for i in range(10**6)}}, tmp_path / "long.pt")
    for name, says in (
        ("bomb.pt", "compressed or overlap"),
        ("sparse.pt", "GB are more than this machine's memory"),
        ("nested.pt", "is a damaged checkpoint (optimizer: "),
        ("long.pt", "is a damaged checkpoint (best: "),
    ):
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / name)
        assert says in str(error.value) and str(error.value).count("\n") == 0
    with pytest.raises(UserError, match="compressed or overlap"):
        train(load_recipe(str(run / "recipe.yaml"), [f"model.init={bomb}", f"run.dir={tmp_path}/new"]))
    assert fastssl.load_model(tmp_path / "good.pt") is not None


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_trouble_of_the_machine_is_no_damage(finished, tmp_path, monkeypatch, number):
    """The run does not go back to previous.pt, and last.pt is not set aside as damaged."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    checkpoints = run / "checkpoints"
    torch.save(finished[1], checkpoints / "last.pt")
    shutil.copy(checkpoints / "last.pt", checkpoints / "previous.pt")
    real = checkpoint.open_regular

    def fail(path, *arguments):
        if path.name == "last.pt":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments)

    monkeypatch.setattr(checkpoint, "open_regular", fail)
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(.*\): "):
        train(load_recipe(run / "recipe.yaml"), resume=run)
    assert (checkpoints / "last.pt").exists() and not (checkpoints / "damaged.pt").exists()
