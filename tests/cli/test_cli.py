"""The command line: the commands of the README, and the messages and exit codes after mistakes."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastssl import cli
from fastssl.cli.setup import FOLDERS
from fastssl.recipe import load_recipe, shipped_recipes


def test_from_images_to_accuracies(fastssl, photos, tmp_path, monkeypatch):
    """Build, train, evaluate: the commands of the README on small files."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = fastssl(
        "build-beton", "imagefolder", "--source", photos, "--out", "data", "--canvas", 32, "--workers", 1
    )
    assert code == 0 and "data/train.beton holds 48 images of 3 classes" in out
    code, out, _ = fastssl(
        "train", "recipes/zprob_barlow.yaml", "data.train=data/train.beton", "data.val=data/val.beton",
        "views.size=32", "train.batch_size=16", "train.epochs=1", "run.dir=run",
        "model={backbone: test_resnet, projector: {layers: 2, hidden: 32, out: 32}}",
        "train.device=cpu", "log.every=1",
    )  # fmt: skip
    assert code == 0 and " 3/3 " in out and "knn" in out
    code, out, _ = fastssl("eval", "knn", "run", "--k", "5")
    assert code == 0 and "top-1, k = 5" in out and (tmp_path / "run/eval/knn.json").exists()
    code, out, _ = fastssl("eval", "linear", "run")
    assert code == 0 and "accuracy" in out and (tmp_path / "run/eval/linear-sweep.json").exists()
    quick = ["--set", "train.epochs=1", "--set", "train.batch_size=8"]
    code, out, _ = fastssl("eval", "semisup", "run", "--percent", "50", *quick)
    assert code == 0 and "semisup-50percent" in out
    code, out, err = fastssl(
        "eval", "transfer", "run", "--to", "a=data", "--to", "b=data/train.beton", "--method", "both", *quick,
        "--out", "t.json",
    )  # fmt: skip
    evaluations = [row["evaluation"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]]
    methods = ["linear-sweep", "finetune"]
    assert code == 0 and evaluations == [f"transfer-{name}-{method}" for name in "ab" for method in methods]
    best = shutil.copy("run/checkpoints/last.pt", "run/checkpoints/best.pt")
    code, out, _ = fastssl("eval", "knn", "run", best, "--k", "5", "--untrained")
    assert code == 0 and "run (untrained)" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "recipes/zprob_barlo.yaml"], "did you mean recipes/zprob_barlow.yaml"),
        (["train", "recipes/barlow.yaml", "train.epoch=1"], "did you mean train.epochs"),
        (["train", "recipes/barlow.yaml", "data.train=/no/train.beton", "data.val=null"], "fastssl build-beton"),
        (["train", "recipes/barlow.yaml", "data.val=null", "--resume", "/no/run"], "/no/run"),
        (["build-beton", "imagefoldr", "--source", ".", "--out", "x"], "imagefolder"),
        (["build-beton", "imagefolder", "--source", "/no/where", "--out", "x"], "/no/where"),
        (["eval", "knn", "/no/run"], "/no/run"),
        (["eval", "knn", "~nobody-here/run"], "~nobody-here/run"),
        (["inspect", "~nobody-here/train.beton"], "No file ~nobody-here/train.beton"),
        (["report", "~nobody-here"], "~nobody-here holds no run"),
        (["eval", "linear", "/no/run"], "/no/run"),
        (["eval", "transfer", "/no/run", "--to", "flowers102"], "--to flowers102 is not NAME=PATH"),
        (["eval", "transfer", "/no/run", "--to", "../x=data"], "is not NAME=PATH"),
        (["eval", "transfer", "/no/run", "--to", "x=/no/data"], "/no/data"),
        (["eval", "knn", "/no/run", "--device", "cuda"], "/no/run"),
        (["sweep", "recipes/sweeps/ablation.yaml"], "did you mean recipes/sweeps/ablation_cifar10.yaml"),
        (["sweep", "recipes/sweeps/ablation_cifar10.yaml", "seed=1"], "seed is an axis"),
        (["sweep", "recipes/sweeps/ablation_cifar10.yaml"], "fastssl build-beton cifar10"),
        (["sweep", "recipes/barlow.yaml"], "is a recipe, not a sweep"),
        (["recipes", "show", "recipes/nothing.yaml"], "recipes/"),
    ],
)
def test_a_mistake_is_reported_without_traceback_with_exit_code_2(fastssl, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = fastssl(*arguments)
    assert code == 2 and message in err and err.startswith("error: ") and "Traceback" not in err
    assert [line.partition(": ")[0] for line in err.splitlines()] in (["error"], ["error", "hint"])


def test_a_warning_is_one_line_without_a_place_in_the_code(fastssl, monkeypatch):
    def warn(name):
        warnings.warn(f"{name} was damaged, so the one before is used.", stacklevel=1)
        return Path(name)

    monkeypatch.setattr("fastssl.cli.setup.find_recipe", lambda name: shipped_recipes() / warn("a\x1b.pt") / "..")
    monkeypatch.setattr("fastssl.cli.setup.read_recipe_text", lambda path: "name: x")
    code, out, err = fastssl("recipes", "show", "x")
    assert (code, out, err) == (0, "name: x\n", "warning: a\\x1b.pt was damaged, so the one before is used.\n")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastssl", "train", "recipes/none.yaml", "--debug"])
    with pytest.raises(cli.UserError):
        cli.main()


def test_missing_validation_data_is_found_before_the_training(fastssl, canvas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = fastssl("train", "recipes/barlow.yaml", f"data.train={canvas}/train.beton", "data.val=no.beton")
    assert code == 2 and "no.beton" in err and not (tmp_path / "runs").exists()


def test_recipes_are_listed_in_groups_beginners_first(fastssl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = fastssl("recipes", "ls")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    lines = [line.rstrip() for line in out.splitlines()]
    assert set(FOLDERS.values()) <= set(lines)  # titles are not wrapped
    titles = [line for line in lines if line and line[0].isupper() and "  " not in line]
    assert [title.partition(" ")[0].rstrip(",:") for title in titles] == [
        "To", "ImageNet", "CIFAR-10", "Beyond", "As", "Many",
    ]  # fmt: skip
    names = [line.split("  ")[0] for line in lines if "  " in line and line[0] != " "]
    shipped = [str(file.relative_to(shipped_recipes()).with_suffix("")) for file in shipped_recipes().rglob("*.yaml")]
    assert sorted(names) == sorted(shipped) and names[0] == "demo"
    assert [name.rpartition("/")[0] for name in names[1:8]] == [""] * 7
    for name in names[1:8] + [name for name in names if name.startswith("cifar10/")]:
        recipe = load_recipe(name)
        said = "CIFAR-10, ResNet-18, 200 epochs" if "/" in name else "ImageNet, ResNet-18, 100 epochs"
        assert (recipe.model.backbone, f"{recipe.train.epochs} epochs") == ("resnet18", said.split(", ")[2])


def test_recipes_are_shown_and_copied(fastssl, tmp_path):
    mine = tmp_path / "mine.yaml"
    assert fastssl("recipes", "copy", "recipes/demo.yaml", mine)[0] == 0
    assert fastssl("recipes", "show", "recipes/demo.yaml")[1] == mine.read_text()
    assert fastssl("recipes", "copy", "recipes/demo.yaml", mine)[0] == 2


def test_help_starts_without_torch():
    """`fastssl --help` and `doctor` must work where torch is missing, and be quick where it is not."""
    code = "import sys; from fastssl import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # So that what `main` sets is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(cli, "app", lambda **options: found.append(os.environ.get("GOMP_SPINCOUNT")))
    with pytest.raises(SystemExit):
        cli.main()
    assert found == [expected]


def test_a_mistake_among_several_processes_names_the_process(fastssl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = fastssl("train", "recipes/barlow.yaml", "train.epoch=1")
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err  # RANK is not set
    monkeypatch.setenv("RANK", "1")
    assert fastssl("train", "recipes/barlow.yaml", "train.epoch=1")[2].startswith("error (rank 1): ")


def test_ctrl_c_ends_in_one_line_and_exit_code_130(fastssl, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("fastssl.doctor.main", interrupted)
    assert fastssl("doctor") == (130, "", "error: interrupted\n")


def test_wrong_usage_ends_in_exit_code_2_and_help_in_0(fastssl):
    code, _, err = fastssl("eval", "knn", "run", "--neighbors", 3)
    assert code == 2 and err.startswith("error: fastssl eval knn has no option --neighbors\nhint: ")
    assert "--debug" in fastssl("--help")[1]
    code, out, _ = fastssl("sweep", "--help")
    assert code == 0 and "KEY=VALUE" in out


@pytest.mark.parametrize(
    "arguments, error, hint",
    [
        ("train x.yaml --epochs 3", "fastssl train has no option --epochs", "write train.epochs=3; keys of"),
        ("train --epochs=3 x.yaml", "fastssl train has no option --epochs", "write train.epochs=3; keys of"),
        ("profile --lr", "fastssl profile has no option --lr", "write optim.lr=VALUE; keys of"),
        ("sweep --train.batch_size 8", "fastssl sweep has no option --train.batch_size", "write train.batch_size=8;"),
        ("sweep --batch-size 8", "fastssl sweep has no option --batch-size", "write train.batch_size=8;"),
        ("eval semisup run --epochs 3", "fastssl eval semisup has no option --epochs", "write train.epochs=3 after"),
        ("train --resum run", "fastssl train has no option --resum", "did you mean --resume?"),
        ("train --epoch 3", "fastssl train has no option --epoch", "did you mean train.epochs=VALUE"),
        ("inspect --foo", "fastssl inspect has no option --foo", "`fastssl inspect --help` lists the options"),
        ("trian x.yaml", "fastssl has no command 'trian'", "did you mean fastssl train"),
        ("eval knnn run", "fastssl eval has no command 'knnn'", "did you mean fastssl eval knn"),
        ("eval \x1b run", "fastssl eval has no command '\\x1b'", "`fastssl eval --help` shows"),
        ("inspect", "fastssl inspect needs FILE", "`fastssl inspect --help` shows"),
        ("build-beton --quality x", "--quality must be an integer, got 'x'", "`fastssl build-beton --help`"),
        ("build-beton --quality 101", "--quality must be 100 or less, got 101", "`fastssl build-beton --help`"),
        ("build-beton --codec png", "--codec must be jpeg or bc4, got 'png'", "choose one of these"),
        ("build-beton --codec jpg", "--codec must be jpeg or bc4, got 'jpg'", "did you mean --codec jpeg?"),
        ("build-beton --channels 0", "--channels must be 1 or more, got 0", "write it like --channels 3"),
        ("build-beton", "build-beton needs a builder", "`fastssl build-beton --list`"),
        ("build-beton cifar10", "build-beton needs --out", "add --out data/cifar10"),
        ("eval knn run --k", "fastssl eval knn: option '--k' requires", "`fastssl eval knn --help`"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_parsed(fastssl, arguments, error, hint):
    code, out, err = fastssl(*arguments.split(" "))
    first, second = err.splitlines()
    assert (code, out) == (2, "") and first.startswith(f"error: {error}") and second.startswith(f"hint: {hint}")


def test_a_group_without_command_shows_its_help(fastssl):
    code, out, err = fastssl("eval")
    assert code == 2 and "semisup" in out + err and "error:" not in err
