"""`fastssl export`: all three formats give the outputs of the run's model, and the card reports what the run holds."""

import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastssl
from fastssl import cli
from fastssl.common.errors import UserError
from fastssl.evaluation import evaluate_knn, find_evaluation_data, load_run_encoder
from fastssl.evaluation.probe import knn_probe
from fastssl.export import export_run
from fastssl.export.card_results import card_legend, card_rows
from fastssl.export.onnx_file import EmbedTuple, compare_with_torch
from fastssl.export.source import EvaluationSummary, MeasuredResult
from fastssl.models import SSLModel
from fastssl.recipe import Recipe, ViewsConfig, load_recipe
from fastssl.training import train
from fastssl.views import eval_transform

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
KINDS = {
    "none": {},
    "z": {"embedding": {"stochastic": "z"}},
    "h": {"embedding": {"stochastic": "h"}},
    "hz": {"embedding": {"stochastic": "hz", "prior": "vamp", "mixture_components": 3}},
    "byol": {"embedding": {"stochastic": "z"}, "objective": {"name": "byol", "predictor_hidden": 16}},
    "sigreg": {"embedding": {"stochastic": "h"}, "objective": {"name": "sigreg"}},
    "visreg": {"embedding": {"stochastic": "z"}, "objective": {"name": "visreg"}},
    "small": {"embedding": {"stochastic": "z"}, "model": {"stem": "small"}},
    "vit": {"embedding": {"stochastic": "z"}, "model": {"backbone": "test_vit", "init": "/home/someone/runs/first"}},
    "center": {"views": {"size": 32, "eval": "center"}},
    "relpos": {"model": {"backbone": "test_vit_relpos"}},
    "hiera": {"model": {"backbone": "hiera_tiny_224"}, "views": {"size": 224}},
    "resnet18": {"embedding": {"stochastic": "h"}, "model": {"backbone": "resnet18"}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function from the name of a kind to a checkpoint file of that kind, whose batch norms have seen a batch."""
    made = {}

    def make(kind: str):
        if kind not in made:
            keys = {"name": kind, "data": {"train": "/home/someone/photos/train.beton"}, "views": {"size": 32}}
            keys |= KINDS[kind]
            keys["model"] = {
                "backbone": "test_resnet", "projector": {"layers": 2, "hidden": 16, "out": 8}, **keys.get("model", {})
            }  # fmt: skip
            recipe = Recipe.model_validate(keys)
            torch.manual_seed(0)
            model = SSLModel(recipe)
            size = recipe.views.size
            model.projector(model.encoder(torch.rand(512 // size, 3, size, size)))
            path = tmp_path_factory.mktemp("checkpoint") / f"{kind}.pt"
            torch.save({"recipe": recipe.model_dump(mode="json"), "model": model.state_dict(), "step": 7}, path)
            made[kind] = path
        return made[kind]

    return make


@pytest.fixture(scope="module")
def run(canvas, tmp_path_factory):
    """A finished Z-prob run of two epochs, with a probe and an evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    recipe = load_recipe(
        "recipes/zprob_barlow.yaml",
        [
            f"data.train={canvas}/train.beton", f"data.val={canvas}/val.beton", f"run.dir={run_dir}", "views.size=32",
            "model={backbone: test_resnet, projector: {layers: 2, hidden: 16, out: 8}}", "embedding.samples=3",
            "train.batch_size=16", "train.epochs=2", "train.device=cpu", "log.every=1", "probe={every: 1, k: 5}",
        ],
    )  # fmt: skip
    train(recipe, probe=knn_probe(recipe))
    encoder = load_run_encoder(run_dir)
    evaluate_knn(encoder, find_evaluation_data(encoder), ks=[5], temperatures=[0.07])
    return run_dir


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run's small files and its checkpoint, to damage."""
    for path in run.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".json", ".jsonl", ".pt"):
            target = tmp_path / "copy" / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastssl", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def run_onnx(path, images):
    return onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})


@pytest.mark.parametrize("kind", ["none", "vit"])
def test_timm_loads_the_file_with_the_printed_code(checkpoint, images, tmp_path, monkeypatch, capsys, kind):
    out = tmp_path / "made" / "here" / "encoder.safetensors"
    code, said, _ = run_command(monkeypatch, capsys, checkpoint(kind), "--format", "timm", "--out", out)
    line = re.search(r"Load it with: (.*)", said)[1]
    card = out.with_name("model_card.md").read_text()
    assert code == 0 and ("img_size=32" in line) == (kind == "vit") and line.replace(str(out), out.name) in card
    with torch.inference_mode():
        h = eval(line, {"timm": timm})(images)
        assert torch.equal(h, fastssl.load_encoder(checkpoint(kind))(images))
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert json.loads(header["eval_transform"]) == {
        "kind": "squash", "size": 32, "interpolation": "bilinear", "antialias": True,
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert header["backbone"] == KINDS[kind].get("model", {}).get("backbone", "test_resnet")
    assert header["fastssl_version"] == importlib.metadata.version("fastssl-trainer")


def test_the_small_stem_is_refused_for_timm_and_exported_as_safetensors(checkpoint, images, tmp_path):
    with pytest.raises(UserError, match="--format safetensors.*fastssl.load_encoder"):
        export_run(checkpoint("small"), "timm", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    made = export_run(checkpoint("small"), "safetensors", tmp_path / "x.safetensors")
    with torch.inference_mode():
        h = eval(made.load_with, {"fastssl": fastssl})(images)
        assert torch.equal(h, fastssl.load_encoder(checkpoint("small"))(images))


@pytest.mark.parametrize("kind", ["z", "h", "hz", "byol", "sigreg", "visreg", "vit"])
def test_safetensors_with_sigma_is_the_whole_model(checkpoint, images, tmp_path, kind):
    """`embed` and the priors are equal bit for bit. BYOL's training parts and this machine's folders are not in it."""
    path, original = tmp_path / "x.safetensors", fastssl.load_model(checkpoint(kind))
    made = export_run(checkpoint(kind), "safetensors", path, sigma=True)
    model = eval(made.load_with, {"fastssl": fastssl})
    for found, expected in zip(model.embed(images), original.embed(images), strict=True):
        assert found == expected if isinstance(found, str) else torch.equal(found, expected)
    for space, prior in original.priors.items():
        x = torch.randn(4, model.heads[space].mu.out_features, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model.priors[space].log_prob(x), prior.log_prob(x))
    assert torch.equal(model.mean_z(original.embed(images).h), original.mean_z(original.embed(images).h))
    assert not model.training and torch.equal(fastssl.load_encoder(path)(images), original.encoder(images))
    assert b"predictor" not in path.read_bytes().replace(b"predictor_hidden", b"")
    assert b"photos/train.beton" in path.read_bytes() and b"someone" not in path.read_bytes()


def test_sigma_is_refused_for_deterministic_runs_and_needed_for_a_whole_model(checkpoint, tmp_path):
    path = tmp_path / "x.safetensors"
    for format in ("safetensors", "timm"):
        with pytest.raises(UserError, match="is deterministic .* leave out --sigma"):
            export_run(checkpoint("none"), format, path, sigma=True)
    with pytest.raises(UserError, match="timm model cannot hold sigma"):
        export_run(checkpoint("z"), "timm", path, sigma=True)
    assert not list(tmp_path.iterdir())
    export_run(checkpoint("z"), "safetensors", path)
    with pytest.raises(UserError, match="holds the encoder only: read it with fastssl.load_encoder"):
        fastssl.load_model(path)


def untrusted_files(folder, checkpoint):
    """Names and contents of files that are no export, or a damaged one."""
    good = folder / "good.safetensors"
    export_run(checkpoint("z"), "safetensors", good, sigma=True)
    with safe_open(good, "pt") as file:
        header, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    recipe = json.loads(header["recipe"])
    yield "absent", None
    yield "garbage", b"\x80\x04\x95 not safetensors"
    yield "empty", b""
    yield "cut off", good.read_bytes()[:-100]
    yield "huge header", (2**40).to_bytes(8, "little") + b"{}"
    for name, changed in {
        "no recipe": None,
        "no JSON": "{",
        "other JSON": "[1]",
        "unknown key": json.dumps({**recipe, "secret": 1}),
        "unknown backbone": json.dumps({**recipe, "model": {**recipe["model"], "backbone": "hf-hub:a/b"}}),
        "other sizes": json.dumps({**recipe, "model": {**recipe["model"], "backbone": "test_vit"}}),
    }.items():
        save_file(weights, folder / "x.safetensors", metadata={"recipe": changed} if changed else None)
        yield name, (folder / "x.safetensors").read_bytes()
    del weights["encoder.conv1.0.weight"]
    save_file(weights, folder / "x.safetensors", metadata=header)
    yield "missing weight", (folder / "x.safetensors").read_bytes()


def test_untrusted_files_are_refused_in_one_sentence(checkpoint, tmp_path):
    seen = []
    for name, content in untrusted_files(tmp_path, checkpoint):
        path = tmp_path / f"{name.replace(' ', '_')}.safetensors"
        if content is not None:
            path.write_bytes(content)
        for load in (fastssl.load_model, fastssl.load_encoder):
            with pytest.raises(UserError) as refusal:
                load(path)
            assert "\n" not in str(refusal.value), name
        seen.append(name)
    assert len(seen) == 12


# relpos: its attention exports only without gradients
@pytest.mark.parametrize("kind", ["h", "small", "vit", pytest.param("relpos", marks=pytest.mark.slow)])
def test_onnx_gives_the_outputs_of_torch(checkpoint, tmp_path, kind):
    """To 1e-4 at several batch sizes. For an H-prob model, h is a mean. (A deterministic model is tested below.)"""
    path, sigma = tmp_path / "x.onnx", kind in ("small", "vit")
    made = export_run(checkpoint(kind), "onnx", path, sigma=sigma)
    model = fastssl.load_model(checkpoint(kind))
    assert 0 <= made.difference < 1e-4
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    names = ["h", "mu", "sigma"] if sigma else ["h"]
    assert [output.name for output in session.get_outputs()] == names
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        for name, found in zip(names, run_onnx(path, images), strict=True):
            np.testing.assert_allclose(found, getattr(model.embed(images), name).numpy(), rtol=1e-4, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["eval_transform"])["size"] == 32 and metadata["outputs"] == " ".join(names)
    assert set(tmp_path.iterdir()) == {path, made.card}
    # The exporter records the source line of every operation; paths of this machine must not stay in the file.
    assert str(timm.__path__[0]).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_onnx_of_a_resnet18_clamps_mu_and_sigma_as_torch_does(checkpoint, images, tmp_path):
    saved = torch.load(checkpoint("resnet18"), weights_only=True)
    for name in ("mu", "log_var"):
        saved["model"][f"heads.h.{name}.weight"] *= 100
    torch.save(saved, tmp_path / "x.pt")
    export_run(tmp_path / "x.pt", "onnx", tmp_path / "x.onnx", sigma=True)
    _, mu, sigma = run_onnx(tmp_path / "x.onnx", images)
    expected = fastssl.load_model(tmp_path / "x.pt").embed(images)
    assert {-20, 20} <= set(mu.flat) and sigma.min() == pytest.approx(0.01) and sigma.max() == pytest.approx(5)
    # The weights, a hundred times those of a fresh head, enlarge the rounding of fp32 as much.
    np.testing.assert_allclose(mu, expected.mu.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(sigma, expected.sigma.numpy(), rtol=1e-3)


@pytest.mark.slow
def test_a_backbone_that_torch_cannot_translate_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="^torch cannot write hiera_tiny_224 as ONNX [^\n]*: use --format timm"):
        export_run(checkpoint("hiera"), "onnx", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_onnx_packages_are_named_and_a_file_that_differs_is_refused(
    checkpoint, images, photos, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "x.onnx"
    arguments = checkpoint("none"), "--format", "onnx", "--out", path
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxscript", None)
        code, _, err = run_command(without, capsys, *arguments)
    assert code == 2 and "onnxscript\nhint: run `pip install onnx onnxscript`" in err and err.count("\n") == 2
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        code, out, _ = run_command(without, capsys, *arguments)
    assert code == 0 and "Not checked against torch" in out

    model = fastssl.load_model(checkpoint("none"))
    (h,) = run_onnx(path, images)
    np.testing.assert_allclose(h, model.embed(images).h.numpy(), rtol=1e-4, atol=1e-4)
    h = run_card(path.with_name("model_card.md"), photos / "train" / "class0" / "000.jpg", monkeypatch)["h"]
    assert h.shape == (1, 96) and compare_with_torch(path, EmbedTuple(model, False), (3, 32, 32)) < 1e-4
    for change in (0.01, torch.nan):
        with torch.no_grad():
            model.encoder.bn1.bias[0] += change
        with pytest.raises(UserError, match="differs from torch by"):
            compare_with_torch(path, EmbedTuple(model, False), (3, 32, 32))


def run_card(card, photo, monkeypatch):
    """Run the card's program in the folder of the file, with a photo, and return its variables."""
    monkeypatch.chdir(card.parent)
    shutil.copy(photo, "photo.jpg")
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1], names)
    return names


@pytest.mark.parametrize(
    "format, sigma", [("timm", False), ("safetensors", False), ("safetensors", True), ("onnx", True)]
)
def test_the_code_of_the_card_gives_the_embedding(run, photos, tmp_path, monkeypatch, format, sigma):
    """Its preprocessing is the evaluation transform up to rounding."""
    made = export_run(run, format, tmp_path / ("x.onnx" if format == "onnx" else "x.safetensors"), sigma)
    names = run_card(made.card, photos / "train" / "class0" / "000.jpg", monkeypatch)
    pixels = torch.from_numpy(np.asarray(Image.open("photo.jpg"))[None].copy())
    images = eval_transform(load_recipe(run / "recipe.yaml").views)(pixels)
    # Pillow rounds to 1/255 after each of its two passes, and std is 0.22.
    np.testing.assert_allclose(names["preprocess"]("photo.jpg"), images.numpy(), atol=1 / 255 / 0.22)
    expected = fastssl.load_model(run).embed(torch.from_numpy(names["preprocess"]("photo.jpg")))
    for name in ["h", "mu", "sigma"] if sigma else ["h"]:
        np.testing.assert_allclose(np.asarray(names[name]), getattr(expected, name).numpy(), rtol=1e-4, atol=1e-4)


def test_the_code_of_the_card_crops_the_center_if_the_run_does(checkpoint, photos, tmp_path, monkeypatch):
    photo = photos / "train" / "class0" / "000.jpg"
    made = export_run(checkpoint("center"), "timm", tmp_path / "x.safetensors", False)
    with safe_open(made.path, "pt") as file:
        view = json.loads(file.metadata()["eval_transform"])
    assert (view["kind"], view["share"]) == ("center", 0.875) and "central square of 0.875" in made.card.read_text()
    names = run_card(made.card, photo, monkeypatch)
    image = Image.open(photo)
    assert image.width != image.height
    images = eval_transform(ViewsConfig(size=32, eval="center"))(torch.from_numpy(np.asarray(image)[None].copy()))
    # As above. The sides of the box lie between pixels, and Pillow weights the pixels there in another way.
    np.testing.assert_allclose(names["preprocess"](photo), images.numpy(), atol=4 / 255 / 0.22)


def test_the_code_of_the_docs_and_of_the_card_preprocess_equally(run, photos, tmp_path, monkeypatch):
    photo = photos / "train" / "class0" / "000.jpg"
    names = run_card(export_run(run, "timm", tmp_path / "x.safetensors").card, photo, monkeypatch)
    blocks = re.findall(r"```(?:python|json)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    documented = {}
    exec(next(block for block in blocks if "def preprocess" in block), documented)
    view = json.loads(next(block for block in blocks if '"kind"' in block))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert view == json.loads(file.metadata()["eval_transform"]) | {"size": 224}
    prepared = documented["preprocess"](photo, 32, view["mean"], view["std"])
    np.testing.assert_array_equal(prepared, names["preprocess"](photo))


def parts_of(card):
    """The metadata at the top of the card, and the text below it."""
    _, front, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_reports_what_the_run_holds(run):
    made = export_run(run, "timm")
    assert made.path == run / "export" / "timm" / "zprob_barlow.safetensors"
    front, text = parts_of(made.card)
    assert front["library_name"] == "timm" and "license" not in front
    assert {"timm", "fastssl", "barlow_twins"} <= set(front["tags"])
    encoder = fastssl.load_encoder(run)
    knn = json.loads((run / "eval" / "knn.json").read_text())["metrics"]["accuracy_k5_t0.07"]
    probe = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "knn" in line][-1]
    environment = json.loads((run / "environment.json").read_text())
    for row in (
        "backbone | test_resnet (timm)",
        f"parameters of the backbone | {sum(p.numel() for p in encoder.parameters()):,}",
        "size | 32 x 32, bilinear, antialiased where it shrinks", "mean | [0.485, 0.456, 0.406]",
        "stochastic | z", "images | 48", "epochs | 2 of 2", "steps | 6", "batch size | 16",
        f"torch | {environment['packages']['torch']}", f"git state | {environment['git']}",
    ):  # fmt: skip
        assert f"| {row} |" in text, row
    (line,) = [line for line in text.splitlines() if line.startswith("| knn | top-1, k = 5, T = 0.07 |")]
    low, high = json.loads((run / "eval" / "knn.json").read_text())["intervals"]["accuracy_k5_t0.07"]
    assert f"| {100 * knn:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | chance " in line
    link = re.search(r"\| \[knn\.json\]\((.*?)\) \|$", line)[1]
    assert (made.card.parent / link).resolve() == (run / "eval" / "knn.json").resolve()
    assert f"at step 6: knn {probe['knn']:.3g}." in text
    assert "unfinished" not in text and "No accuracy" not in text and str(run) not in text

    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert (recipe["embedding"]["beta"], recipe["embedding"]["samples"], recipe["optim"]["name"]) == (0.01, 3, "adamw")
    assert recipe["data"]["limit"] is None and recipe["seed"] == 0 and Recipe.model_validate(recipe)

    # A checkpoint inside a run directory stands for the run; the card names its weights by their hash.
    again = export_run(run / "checkpoints" / "last.pt", "timm", run / "again" / "y.safetensors")
    moved = text.replace("zprob_barlow.safetensors", "y.safetensors").replace("../../eval/", "../eval/")
    assert parts_of(again.card)[1] == moved
    first, second = load_file(made.path), load_file(again.path)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_card_of_a_checkpoint_alone_names_what_is_not_known(checkpoint, tmp_path):
    _, text = parts_of(export_run(checkpoint("h"), "timm", tmp_path / "x.safetensors").card)
    for sentence in (
        "does not tell how many epochs were trained", "No accuracy was measured", "outside a run directory",
        "the mean that the h head computes", "the encoder's features, from which this run's h head computes",
        "images | not recorded in the run", "The run holds no results.",
    ):  # fmt: skip
        assert sentence in text, sentence
    assert "someone" not in text


def test_the_card_of_a_damaged_run_names_what_is_damaged(copy, tmp_path):
    """Results of other weights, damaged lines and steps after the checkpoint's are left out."""
    damaged = ["list", "deep", "bytes"]
    (copy / "environment.json").write_text("{")
    result = json.loads((copy / "eval" / "knn.json").read_text())
    (copy / "eval" / "knn.json").write_text(json.dumps({**result, "encoder_sha256": "another"}))
    (copy / "eval" / "list.json").write_text("[1, 2]")
    (copy / "eval" / "deep.json").write_text("[" * 100_000)
    (copy / "eval" / "bytes.json").write_bytes(b"\xff\xfe{")
    strange = {"evaluation": "<b>x|y\n# z", "metrics": {"auroc": 0.875}}
    (copy / "eval" / "strange.json").write_text(json.dumps(strange))
    for name, change in (
        ("text", {"metrics": {"n": "7"}}), ("nested", {"metrics": {"nested": {"x": 0.5}}}), ("number", {"train": 7}),
        ("huge", {"metrics": {"n": 10**400}}), ("nan", {"metrics": {"n": math.nan}}), ("path", {"val": {"path": 3}}),
        ("null", {"metrics": {"n": None}}), ("count", {"val": {"images": -1}}), ("sha", {"encoder_sha256": []}),
    ):  # fmt: skip
        damaged.append(name)
        (copy / "eval" / f"{name}.json").write_text(json.dumps({**strange, **change}))
    (copy / "metrics.jsonl").write_text(
        '{"step": 3, "epoch": 0, "knn": 0.25}\n{"step": 4, "loss": 1.0}\nnull\n7\n{"step": 5, "epoch": 1, "kn'
        '\n{"step": 5}\n\xff\n{"step": 900, "epoch": 9, "knn": 0.99}\n{"step": 6, "epoch"'
    )
    _, text = parts_of(export_run(copy, "timm", tmp_path / "x.safetensors").card)
    for sentence in (
        "`environment.json` could not be read", "`eval/knn.json` was measured on other weights",
        *(f"`eval/{name}.json` could not be read" for name in damaged),
        "| &lt;b&gt;x\\|y # z | auroc | 0.88 |  |  | eval/strange.json |", "at step 3: knn 0.25.",
        "torch | not recorded in the run",
    ):  # fmt: skip
        assert sentence in text, sentence
    assert "0.99" not in text and text.count("could not be read") == 1 + len(damaged) and "k = 5" not in text


def test_the_card_of_an_unfinished_run_says_so(copy, tmp_path):
    path = copy / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "step": 4, "loader": {**saved["loader"], "epoch": 1}}, path)
    _, text = parts_of(export_run(copy, "timm", tmp_path / "x.safetensors").card)
    assert "unfinished run: 1 of 2 epochs were done, at step 4." in text
    torch.save({key: value for key, value in saved.items() if key != "loader"}, path)
    _, text = parts_of(export_run(copy, "timm", tmp_path / "y" / "x.safetensors").card)
    assert "does not tell how many" in text and "epochs | unknown number of 2" in text


def test_nothing_is_overwritten_or_half_written(run, checkpoint, tmp_path, monkeypatch, capsys):
    taken, card = tmp_path / "x.safetensors", tmp_path / "model_card.md"
    damaged = tmp_path / "damaged.pt"
    saved = torch.load(checkpoint("none"), weights_only=True)
    saved["model"]["encoder.conv1.0.weight"][0] = torch.inf
    torch.save(saved, damaged)
    for arguments, says in (
        ([run, "--format", "timm", "--out", taken], f"{taken} exists already"),
        ([run, "--format", "safetensors", "--out", tmp_path / "y.safetensors"], f"{card} exists already"),
        ([run, "--format", "timm", "--out", tmp_path / "x.pt"], "ends in .safetensors"),
        ([run, "--format", "onnx", "--out", tmp_path], "ends in .onnx"),
        ([run, "--format", "timm", "--out", taken / "below" / "y.safetensors"], "another file with --out"),
        ([tmp_path / "nowhere", "--format", "timm"], "nowhere holds no checkpoint"),
        ([taken, "--format", "timm"], "is not a readable checkpoint"),
        ([damaged, "--format", "timm", "--out", tmp_path / "z" / "x.safetensors"], "not finite"),
    ):
        taken.write_text("mine")
        card.write_text("mine too") if "card" in says else card.unlink(missing_ok=True)
        before = sorted(tmp_path.rglob("*"))
        code, _, err = run_command(monkeypatch, capsys, *arguments)
        assert code == 2 and says in err and err.count("\n") == 2, (arguments, err)
        assert taken.read_text() == "mine" and sorted(tmp_path.rglob("*")) == before


def test_a_recipe_name_cannot_lead_out_of_the_folder(checkpoint, tmp_path):
    saved = torch.load(checkpoint("none"), weights_only=True)
    saved["recipe"]["name"] = 'a/b/x"y'
    torch.save(saved, tmp_path / "x.pt")
    made = export_run(tmp_path / "x.pt", "timm")
    assert made.path == tmp_path / "export" / "timm" / "a-b-x-y.safetensors"
    assert '# a/b/x"y\n' in made.card.read_text()


def test_the_weights_are_those_that_load_model_gives(copy, tmp_path):
    """The running average if there is one, and the previous checkpoint if the last is damaged."""
    last, previous = copy / "checkpoints" / "last.pt", copy / "checkpoints" / "previous.pt"
    saved = torch.load(last, weights_only=True)
    average = {name: weight * 0.5 if weight.is_floating_point() else weight for name, weight in saved["model"].items()}
    torch.save({**saved, "ema": average}, previous)
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="last.pt is not a readable checkpoint"):
        made = export_run(copy, "timm", tmp_path / "x.safetensors")
    assert torch.equal(load_file(made.path)["conv1.0.weight"], saved["model"]["encoder.conv1.0.weight"] * 0.5)
    sha256 = hashlib.sha256(previous.read_bytes()).hexdigest()
    assert f"| previous.pt |\n| sha256 of the checkpoint | {sha256} |" in made.card.read_text()
    assert "`eval/knn.json` was measured on other weights" in made.card.read_text()


def test_a_write_that_fails_leaves_neither_file_nor_card(run, tmp_path, monkeypatch):
    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("fastssl.export.run.save_file", no_space)
        with pytest.raises(UserError, match="No space left"):
            export_run(run, "timm", path)
    assert list(tmp_path.iterdir()) == []
    assert {made.name for made in export_run(run, "timm", path).card.parent.iterdir()} == {path.name, "model_card.md"}


def test_results_of_a_card_name_sets_and_flag_what_is_not_reliable():
    names = {"draws_disagreement": 0.45, "kmeans_ssd": 0.9, "knn_cosine": 0.7, "vim": 0.95, "energy": 0.6}
    metrics = {f"{name} {group} auroc": value for name, value in names.items() for group in ("near", "far")}
    metrics |= {f"{name} near fpr95_id_positive": 0.5 for name in names}
    intervals = {name: [value - 0.01, value + 0.01] for name, value in metrics.items()}
    result = MeasuredResult(
        metrics=metrics, intervals=intervals, near={"digits-8": {}}, far={"photos": {}, "noise": {}}
    )
    rows = list(card_rows(EvaluationSummary("ood", "ood-x.json", result, 800, "val.beton")))
    assert [row.metric for row in rows] == [
        "AUROC of draws_disagreement, own uncertainty", "AUROC of kmeans_ssd, best label-free",
        "AUROC of vim, best label-based",
    ]  # fmt: skip
    assert rows[1].value == "digits-8 (near): 90.0 % (89.0 to 91.0); photos, noise (far): 90.0 % (89.0 to 91.0)"
    upper = "chosen on these very images, so its AUROC is an upper bound"
    assert rows[0].remark == "inverted on near sets; inverted on far sets" and rows[1].remark == rows[2].remark == upper
    # Single sets are inverted where the mean of the group is not: such a detector is not the best one.
    detectors = {
        "kmeans_ssd": {"sets": {"photos": {"inverted": False}, "noise": {"inverted": True, "metrics": {}}}},
        "draws_disagreement": {"sets": {"digits-8": {"inverted": False}, "noise": {"inverted": True}}},
        "vim": {"sets": {"digits-8": {"inverted": False}}},
    }
    flagged = MeasuredResult.model_validate(result.model_dump() | {"detectors": detectors})
    rows = list(card_rows(EvaluationSummary("ood", "ood-x.json", flagged, 800, "val.beton")))
    assert [row.metric.split()[2] for row in rows] == ["draws_disagreement,", "knn_cosine,", "vim,"]
    assert rows[0].remark == "inverted on noise: do not use it there" and rows[2].remark == upper

    result = MeasuredResult(
        metrics={"I(V;H) js": 5.123, "I(V;H) mine": 5.0, "I(V;Z) js": 4.0, "I(X;H) upper": 9.0},
        failed=["I(V;Z) <= I(X;H), upper bound"], saturated=["I(V;H) js"],
    )  # fmt: skip
    rows = list(card_rows(EvaluationSummary("mi", "mi.json", result, 800, None)))
    assert [(row.metric, row.value) for row in rows] == [
        ("I(V;H)", "at least 5.12 nats"), ("I(V;Z)", "4.00 nats"),
    ]  # fmt: skip
    assert "saturated" in rows[0].remark and rows[1].remark == "not reliable: a self-check failed"
    result = MeasuredResult(metrics={"I(V;H) js": -0.2})
    assert [row.value for row in card_rows(EvaluationSummary("mi", "mi.json", result, 800, None))] == ["-0.20 nats"]

    linear = MeasuredResult(
        metrics={"accuracy": 0.91234, "nll": 1.0}, intervals={"accuracy": [0.9, 0.92]}, chance={"accuracy": 0.1}
    )
    (row,) = card_rows(EvaluationSummary("linear-sweep", "linear-sweep.json", linear, 800, None))
    assert (row.metric, row.value, row.remark) == ("top-1 accuracy", "91.2 % (90.0 to 92.0)", "chance is 10.0 %")
    uncertain = MeasuredResult(metrics={"r_auroc": 0.6, "accuracy": 0.5, "aurc": 0.2})
    rows = list(card_rows(EvaluationSummary("uncertainty", "u.json", uncertain, 800, None)))
    assert [row.value for row in rows] == ["60.0 %", "20.0 %"] and rows[0].remark == "chance is 50.0 %"


def test_a_card_compares_with_chance_and_explains_its_words():
    def remarks(r_auroc, difference, accuracy=0.85):
        result = MeasuredResult(
            metrics={"r_auroc": r_auroc, "accuracy": accuracy, "aurc": 0.2, "e_aurc": 0.1},
            intervals={"r_auroc": [r_auroc - 0.02, r_auroc + 0.02], "aurc": [0.1, 0.3]},
            aurc_minus_error=difference,
        )
        summary = EvaluationSummary("uncertainty", "u.json", result, 800, None)
        rows = list(card_rows(summary))
        assert rows[1].metric == "AURC by uncertainty (lower is better)"
        legend = card_legend([summary])
        assert "R-AUROC: " in legend and "AURC: " in legend and "V: " not in legend and "\n" not in legend
        return [row.remark for row in rows]

    assert remarks(0.4, [0.01, 0.09]) == [
        "inverted: below chance (50.0 %)", "above that of a random order, 15.0 %",
    ]  # fmt: skip
    assert remarks(0.51, [-0.01, 0.01])[0] == "not better than chance (50.0 %)"
    assert remarks(0.6, [-0.09, -0.01]) == ["chance is 50.0 %", "below that of a random order, 15.0 %"]
    assert remarks(0.6, None)[1] == "that of a random order 15.0 %"
    low = MeasuredResult(metrics={"accuracy": 0.05}, intervals={"accuracy": [0.04, 0.06]}, chance={"accuracy": 0.1})
    (row,) = card_rows(EvaluationSummary("linear-sweep", "l.json", low, 800, None))
    assert row.remark == "below chance (10.0 %)"
    knn = EvaluationSummary("knn", "knn.json", MeasuredResult(metrics={"accuracy_k20_t0.07": 0.5}), 800, None)
    mi = EvaluationSummary("mi", "mi.json", MeasuredResult(metrics={"I(V;H) js": 1.0}), 800, None)
    assert all(word in card_legend([knn, mi]) for word in ("k: ", "T: ", "V: ", "H: ", "Z: "))
    assert card_legend([]) == ""
