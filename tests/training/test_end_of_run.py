"""The last lines of a run: what it saved, and commands that are right for it; and a run directory with a number."""

import re
import shlex
import signal

import pytest
from training_runs import small

from fastssl.beton import build_beton
from fastssl.cli.train import _evaluation_command
from fastssl.common.errors import EXIT_INTERRUPTED
from fastssl.recipe import load_recipe
from fastssl.training.run_dir import choose_run_dir


def test_a_run_says_what_it_saved_and_what_comes_next(canvas, tmp_path, fastssl):
    run = tmp_path / "my run"
    code, out, err = fastssl("train", "recipes/barlow.yaml", *small(canvas, run, "train.epochs=1", "probe.every=1"))
    assert code == 0, err
    done, *files, evaluate, longer = out.splitlines()[-7:]
    assert re.fullmatch(rf"Done: 3 steps in (under 1|\d+) s\. Saved in {run}:", done)
    assert [(run / line.split()[0]).is_file() for line in files] == [True] * 4
    assert "kNN accuracy" in files[2] and files[2].endswith("%, step 3")
    assert shlex.split(evaluate)[2:] == ["eval", "knn", str(run)]
    assert shlex.split(longer)[3:] == ["train", "--resume", str(run), "train.epochs=2"]
    code, out, err = fastssl(*shlex.split(longer)[3:])
    assert code == 0 and "Resuming barlow after step 3" in out and "train.epochs=4" in out, err
    assert re.search(r"^Done: 6 steps in .* s, all starts together\. Saved in", out, re.MULTILINE)
    code, out, err = fastssl("train", "--resume", run)
    assert code == 0 and "barlow is already finished: no step is left to train" in out.splitlines()[0], err
    assert re.search(r"^Already finished: 6 steps in .* s, all starts together\. Saved in", out, re.MULTILINE)
    assert "Resuming" not in out and "Done" not in out


def test_the_command_that_evaluates_a_run_depends_on_its_images(canvas, photos, tmp_path):
    """kNN needs labels of both sides, of the same classes; else the strangest training images are suggested."""
    run = tmp_path / "run"

    def of(*keys):
        recipe = load_recipe("recipes/barlow.yaml", small(canvas, run, *keys))
        return shlex.split(_evaluation_command(recipe, run))[1:]

    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:20]):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(path.read_bytes())
    build_beton("imagefolder", tmp_path / "flat", tmp_path / "unlabeled", canvas=32, workers=1)
    unlabeled = next((tmp_path / "unlabeled").glob("*.beton"))
    assert of() == ["eval", "knn", str(run)]
    for keys in (["data.val=null"], [f"data.val={tmp_path}/gone.beton"], [f"data.val={unlabeled}"],
                 [f"data.train={unlabeled}"]):  # fmt: skip
        train = str(unlabeled) if keys[0].startswith("data.train") else str(canvas / "train.beton")
        assert of(*keys) == [
            "embed", str(run), train, "--out", str(run / "embeddings.npz"),
            "--score", "layers_unlabelled", "--sheet", str(run / "strangest.png"),
        ], keys  # fmt: skip
    assert of(f"data.train={tmp_path}/gone.beton") == [
        "embed",
        str(run),
        "IMAGES",
        "--out",
        str(run / "embeddings.npz"),
    ]


def test_the_sheet_that_is_suggested_after_a_run_without_labels_is_drawn(canvas, tmp_path, fastssl):
    """Also of fewer images than the layers have channels."""
    run = tmp_path / "my run"
    keys = ("train.epochs=1", "data.val=null", "probe.every=0")
    code, out, err = fastssl("train", "recipes/barlow.yaml", *small(canvas, run, *keys))
    assert code == 0, err
    suggested = next(line for line in out.splitlines() if line.startswith("Evaluate:"))
    code, _, err = fastssl(*shlex.split(suggested)[2:])
    assert code == 0 and (run / "strangest.png").exists(), err


def test_a_number_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("barlow")
    assert choose_run_dir(recipe, None, restarted=False).taken is None
    (tmp_path / "runs" / recipe.name).mkdir(parents=True)
    (tmp_path / "runs" / f"{recipe.name}-2").mkdir()
    path, _, taken = choose_run_dir(recipe, None, restarted=False)
    assert (path.name, taken.name) == (f"{recipe.name}-3", f"{recipe.name}-2")
    named = load_recipe("barlow", [f"run.dir=runs/{recipe.name}-3"])
    for chosen in (choose_run_dir(named, None, restarted=False), choose_run_dir(recipe, "auto", restarted=False)):
        assert chosen.taken is None


@pytest.mark.usefixtures("default_signals")
def test_a_second_ctrl_c_says_how_to_continue(canvas, tmp_path, fastssl, at_step):
    run = tmp_path / "my run"
    at_step(2, lambda: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT))
    code, out, err = fastssl("train", "recipes/barlow.yaml", *small(canvas, run, "checkpoint.every=1"))
    *_, said, resume = out.splitlines()
    assert code == EXIT_INTERRUPTED and said.startswith("Ended without a checkpoint of the last step."), err
    assert shlex.split(resume)[1:] == ["train", "--resume", str(run)]
