"""`fastssl eval --weights`: encoders that are no runs, through every evaluation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_models import features_of, make_run
from synthetic_images import photo

from fastssl.beton import build_beton
from fastssl.common.errors import UserError
from fastssl.evaluation import evaluate_semisup, find_evaluation_data, linear, load_foreign_encoder, load_run_encoder
from fastssl.evaluation.mutual_information import evaluate as mi_evaluate
from fastssl.recipe import load_recipe


@pytest.fixture
def weights(tmp_path):
    """A file in MoCo's layout, of a random encoder."""
    torch.manual_seed(3)
    state = timm.create_model("test_resnet").state_dict()
    both = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    both |= {f"module.encoder_k.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": both, "epoch": 3}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar"


@pytest.fixture
def options(weights, canvas, tmp_path):
    return ["--weights", weights, "--backbone", "test_resnet", "--size", "32", "--out-dir", tmp_path / "out"]


@pytest.fixture
def data(canvas):
    return ["--train", canvas / "train.beton", "--val", canvas / "val.beton"]


def result_in(folder: Path, name: str) -> dict:
    (path,) = (folder / "eval").glob(f"{name}*.json")
    return json.loads(path.read_text())


def test_features_are_those_of_the_file(weights, canvas, tmp_path):
    encoder, remarks = load_foreign_encoder(
        weights, "test_resnet", train=canvas / "train.beton", size=32, out_dir=tmp_path / "out", device="cpu"
    )
    source = timm.create_model("test_resnet", num_classes=0)
    state = torch.load(weights, weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    source.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, strict=False)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.model.embed(images).h, source.eval()(images))
    features = features_of(encoder.run_dir, canvas / "val.beton", model=encoder.model, views=encoder.recipe.views)
    assert features.h.shape == (12, source.num_features) and features.sigma is None
    assert "under state_dict.module.encoder_q, not those under state_dict.module.encoder_k" in remarks[0]
    assert "mean 0.485/0.456/0.406" in remarks[-1] and str(encoder.run_dir) in remarks[-1]


def test_knn_writes_its_result_to_the_folder(fastssl, options, data, weights, tmp_path):
    code, out, err = fastssl("eval", "knn", *options, *data, "--k", "5")
    assert code == 0, err
    assert "all of the encoder" in out and "Left out: " in out and "top-1, k = 5, T = 0.07" in out
    result = result_in(tmp_path / "out", "knn")
    assert result["weights"] == str(weights) and result["view"]["size"] == 32 and result["view"]["kind"] == "squash"
    assert load_recipe(tmp_path / "out" / "recipe.yaml").model.backbone == "test_resnet"
    # The same command shows the same result, and measures nothing.
    measured_at = result["measured_at"]
    assert fastssl("eval", "knn", *options, *data, "--k", "5")[0] == 0
    assert result_in(tmp_path / "out", "knn")["measured_at"] == measured_at


def test_linear_semisup_and_transfer(fastssl, options, data, canvas, tmp_path, monkeypatch):
    monkeypatch.setitem(linear.sweep.CONSTANTS, "epochs", 3)
    code, _, err = fastssl("eval", "linear", *options, *data)
    assert code == 0, err
    quick = ["--set", "train.epochs=1", "--set", "train.batch_size=8"]
    code, _, err = fastssl("eval", "semisup", *options, *data, "--percent", "50", *quick)
    assert code == 0, err
    code, _, err = fastssl("eval", "transfer", *options, "--to", f"photos={canvas}", "--method", "both", *quick)
    assert code == 0, err
    names = sorted(path.name.split("-train-")[0] for path in (tmp_path / "out" / "eval").glob("*.json"))
    assert [name.split("-seed")[0].removesuffix(".json") for name in names] == [
        "linear-sweep", "semisup-50percent", "transfer-photos-finetune", "transfer-photos-linear-sweep",
    ]  # fmt: skip


def test_folders_of_data_mean_their_files(weights, fastssl, options, canvas, tmp_path):
    code, _, err = fastssl("eval", "knn", *options, "--train", canvas, "--val", canvas, "--k", 5)
    assert code == 0, err
    found = result_in(tmp_path / "out", "knn")
    assert [Path(found[split]["path"]).name for split in ("train", "val")] == ["train.beton", "val.beton"]
    code, _, err = fastssl("eval", "mi", *options, "--data", canvas)
    assert code == 2 and "val.beton has 12 images, too few for mutual information" in " ".join(err.split())


def test_ood_and_uncertainty_leave_out_what_needs_sigma(fastssl, options, data, canvas, canvas_jpeg, tmp_path):
    sets = ["--fit", canvas / "train.beton", "--id", canvas / "val.beton", "--far", canvas / "train.beton"]
    code, _, err = fastssl("eval", "ood", *options, *sets)
    assert code == 0, err
    result = result_in(tmp_path / "out", "ood")
    assert "the embedding is deterministic" in result["skipped"].values()
    assert "knn" in " ".join(result["detectors"])
    code, _, err = fastssl("eval", "uncertainty", *options, *data)
    assert code == 0, err
    assert result_in(tmp_path / "out", "uncertainty")["settings"]["score"].startswith("cosine distance")


def test_mutual_information_is_that_of_h_alone(weights, canvas, tmp_path):
    encoder, _ = load_foreign_encoder(
        weights, "test_resnet", train=canvas / "train.beton", size=32, out_dir=tmp_path / "out", device="cpu"
    )
    from fastssl.evaluation import BetonSubset

    found = mi_evaluate.compute_representations(encoder, BetonSubset(canvas / "train.beton"), 0)
    assert found.z_NE is None and found.h_ND.shape[0] == 48
    assert list(mi_evaluate.component_pairs(found)) == ["I(V;H)"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--backbone", "resnet18"], "holds .* % of the parameters of --backbone resnet18"),
        (["--backbone", "resnet1"], "no architecture 'resnet1': the nearest are"),
        (["--backbone", "test_resnet.nobody"], "--backbone test_resnet.nobody: timm .* has no such weights: "),
        (["--stem", "small"], "has another stem"),
        (["--backbone", "test_vit", "--size", "33"], "set --size to 32 or 48"),
        (["RUN"], "takes the place of runs: leave out a run"),
        (["--untrained"], "leave out --untrained"),
    ],
)
def test_wrong_options_are_one_sentence(fastssl, options, data, canvas, tmp_path, change, says):
    if change == ["RUN"]:
        change = [make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})[0]]
    code, _, err = fastssl("eval", "knn", *options, *data, "--k", "5", *change)
    assert code == 2 and re.search(says, err.replace("\nhint: ", ": ")), err
    assert err.count("\n") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["knn", "--backbone", "resnet18", "RUN"], "--backbone is for --weights"),
        (["knn", "--size", "32", "RUN"], "--size is for --weights"),
        (["linear", "--out-dir", "x", "RUN"], "--out-dir is for --weights"),
        (["knn"], "There is no run to evaluate: name a run directory, or a file with --weights"),
        (["mi"], "There is no run to evaluate"),
        (["knn", "--weights", "x.pth", "--backbone", "resnet18"], "name images with --train FILE.beton and --val"),
        (["semisup", "--weights", "x.pth", "--backbone", "resnet18", "--train", "a"], "--train FILE.beton and --val"),
        (["ood", "--weights", "x.pth", "--far", "x"], "name images with --fit FILE.beton and --id"),
        (["mi", "--weights", "x.pth", "--backbone", "resnet18"], "name images with --data"),
        (["knn", "--weights", "x.pth", "--train", "a", "--val", "b"], "add --backbone NAME"),
        (["mi", "--weights", "x.pth", "--backbone", "resnet18", "--data", "VAL"], "x.pth holds no checkpoint"),
        (["mi", "--weights", "x.pth", "--backbone", "resnet18", "--data", "a"], "No file a"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(fastssl, arguments, says, canvas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    code, _, err = fastssl("eval", *[{"RUN": run, "VAL": canvas / "val.beton"}.get(each, each) for each in arguments])
    assert code == 2 and re.search(says, err.replace("\nhint: ", ": ")), err


def test_a_folder_is_of_one_file_and_one_size(weights, canvas, tmp_path):
    def load(**changes):
        arguments = {"train": canvas / "train.beton", "size": 32, "out_dir": tmp_path / "out", "device": "cpu"}
        return load_foreign_encoder(weights, "test_resnet", **(arguments | changes))

    load()
    assert load(train=canvas / "val.beton", view="center")[0].suffix == "-center"
    with pytest.raises(UserError, match="has results of other weights, or at another image size: .* --out-dir"):
        load(size=64)
    run, _, _ = make_run(tmp_path / "run", {"train": str(canvas / "train.beton")})
    with pytest.raises(UserError, match="is a run of fastssl train"):
        load(out_dir=run)


def test_the_first_layer_is_adapted_to_the_channels_of_the_images(fastssl, weights, tmp_path):
    for number in range(12):
        folder = tmp_path / "gray" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(number, 40, 40).convert("L").save(folder / f"{number}.png")
    build_beton("imagefolder", tmp_path / "gray", tmp_path / "built", canvas=32, channels=1, workers=1)
    file = tmp_path / "built" / "train.beton"
    arguments = ["--weights", weights, "--backbone", "test_resnet", "--size", "32", "--train", file, "--val", file]
    code, out, err = fastssl("eval", "knn", *arguments, "--k", "5")
    assert code == 0, err
    assert "conv1.0.weight was adapted from RGB to 1 input channels" in out and "mean 0.449, std 0.226" in out
    assert result_in(tmp_path / "moco_eval", "knn")["view"]["mean"] == pytest.approx([0.449], abs=1e-3)


def test_a_tag_of_timm_brings_mean_std_and_size(canvas, tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    config = timm.get_pretrained_cfg("test_vit.r160_in1k")
    encoder, _ = load_foreign_encoder(
        tmp_path / "vit.pth",
        "test_vit.r160_in1k",
        train=canvas / "train.beton",
        out_dir=tmp_path / "out",
        device="cpu",
    )
    views = encoder.recipe.views
    assert (views.mean, views.std, views.size) == (config.mean, config.std, 160)
    assert views.mean == (0.5, 0.5, 0.5) and views.eval == "center"


def test_semisup_of_a_vit_at_another_size(canvas, tmp_path):
    """Positions are resampled; where they cannot be, the sentence names views.size."""
    quick = ["train.epochs=1", "train.batch_size=8", "log.every=1", "views.size=64"]
    data = {"train": str(canvas / "train.beton"), "val": str(canvas / "val.beton")}
    for backbone, works in (("test_vit", True), ("levit_128s", False)):
        sections = {"views": {"size": 32}, "model": {"backbone": backbone, "projector": {"hidden": 16, "out": 8}}}
        folder, _, _ = make_run(tmp_path / backbone, data, **sections)
        encoder = load_run_encoder(folder, device="cpu")
        arguments = (encoder, find_evaluation_data(encoder))
        if works:
            result = evaluate_semisup(*arguments, percent=50, overrides=quick)
            assert result["settings"]["views"]["size"] == 64 and np.isfinite(result["metrics"]["nll"])
        else:
            with pytest.raises(UserError, match=r"was trained at views.size=32, .*: set views.size=32\."):
                evaluate_semisup(*arguments, percent=50, overrides=quick)
