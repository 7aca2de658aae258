"""Runs on images of one channel and of five: trained, evaluated, exported; other images are refused at once."""

import numpy as np
import pytest
import torch
from many_channels import bands, npy, stack, values, write_images
from PIL import Image

import fastssl
from fastssl.beton import build_beton
from fastssl.cli import main
from fastssl.common.errors import UserError
from fastssl.evaluation.probe import knn_probe
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS, corrupt
from fastssl.models import image_size
from fastssl.models.image_size import check_image_size
from fastssl.recipe import ModelConfig, load_recipe
from fastssl.training import setup, train
from fastssl.training.run_dir import save_views

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than.*")
COLORS_SKIPPED = "left out of the views are views.jitter.saturation, views.jitter.hue, views.gray."


def overrides(betons, channels: int, run_dir, *more: str) -> list[str]:
    in_chans = [] if channels == 3 else [f"model.in_chans={channels}", "views.mean=[0.5]", "views.std=[0.25]"]
    folder = betons[channels]
    return [
        "model.backbone=test_resnet", "views.size=32", "model.projector={layers: 2, hidden: 32, out: 32}",
        "embedding.samples=3", "train.batch_size=16", "train.epochs=2", "train.device=cpu", "log.every=1",
        "probe.every=2", "optim.warmup_epochs=1", f"data.train={folder}/train.beton", f"data.val={folder}/val.beton",
        f"run.dir={run_dir}", *in_chans, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    """By the number of channels: a folder with train.beton and val.beton."""
    found = {}
    for channels in (1, 3, 5):
        folder = tmp_path_factory.mktemp(f"channels{channels}")
        for split, count in (("train", 20), ("val", 12)):
            source = folder / "source" / split
            if channels == 3:
                for label in range(2):
                    (source / f"c{label}").mkdir(parents=True)
                    for number in range(count):
                        pixels = values(100 * label + number, (40, 40, 3)) // 2 + np.uint8(100 * label)
                        Image.fromarray(pixels).save(source / f"c{label}" / f"{number}.png")
            else:
                write_images(source, channels, count)
        build_beton("imagefolder", folder / "source", folder / "built", canvas=32, workers=1, channels=channels)
        found[channels] = folder / "built"
    return found


@pytest.fixture(scope="module")
def runs(betons, tmp_path_factory):
    """By the number of channels: the directory of a trained run with a stochastic h."""
    folder = tmp_path_factory.mktemp("runs")
    for channels in (1, 5):
        recipe = load_recipe("recipes/hprob_barlow.yaml", overrides(betons, channels, folder / f"{channels}"))
        train(recipe, probe=knn_probe(recipe))
    return {channels: folder / f"{channels}" for channels in (1, 5)}


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["fastssl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.mark.parametrize("channels", [1, 5])
def test_a_run_learns_from_the_images(runs, channels):
    model = fastssl.load_model(runs[channels])
    assert model.encoder.conv1[0].in_channels == channels
    assert model.embed(torch.randn(2, channels, 32, 32)).h.shape == (2, 96)
    with pytest.raises(ValueError, match=rf"takes a tensor \(B, {channels}, H, W\)"):
        model.embed(torch.randn(2, 3, 32, 32))
    assert Image.open(runs[channels] / "views.png").mode == "RGB"
    assert (runs[channels] / "checkpoints" / "best.pt").is_file()


@pytest.mark.parametrize("channels", [1, 5])
def test_files_are_embedded_as_the_training_images(runs, betons, channels):
    model = fastssl.load_model(runs[channels])
    source = betons[channels].parent / "source" / "val"
    paths = sorted(source.rglob("*.*"))[:4]
    h = model.embed(paths).h
    assert h.shape == (4, 96) and not torch.equal(h[0], h[1])
    pixels = values(0, (40, 40, channels))
    assert model.embed([pixels[..., 0] if channels == 1 else pixels]).h.shape == (1, 96)


@pytest.mark.parametrize("channels", [1, 5])
def test_fastssl_embed_reads_the_same_files(runs, betons, channels, tmp_path, monkeypatch, capsys):
    """A folder of files and the .beton that was built of them give the same embeddings."""
    found = {}
    for name, images in (
        ("files", betons[channels].parent / "source" / "val"),
        ("beton", betons[channels] / "val.beton"),
    ):
        out = tmp_path / f"{name}.npz"
        code, _, err = command(monkeypatch, capsys, "embed", runs[channels], images, "--out", out, "--workers", 1)
        assert code == 0, err
        found[name] = dict(zip(*(np.load(out)[column] for column in ("name", "h"))))
    assert len(found["files"]) == 24 and len(found["beton"]) == 24
    for name, h in found["files"].items():
        np.testing.assert_allclose(found["beton"][f"{name}" if name in found["beton"] else f"val/{name}"], h, atol=1e-5)
    code, _, err = command(monkeypatch, capsys, "embed", runs[channels], betons[3] / "val.beton", "--out", out)
    assert (
        code == 2
        and f"takes {channels}\nhint: name another file, or build it again with --channels {channels}\n" in err
    )


def test_files_of_other_channels_are_named(runs, tmp_path):
    (tmp_path / "x.tif").write_bytes(stack([values(0, (9, 9))] * 4))
    with pytest.raises(ValueError, match=r"x.tif\) is bad: .*has 4 pages, and --channels 5"):
        fastssl.load_model(runs[5]).embed([tmp_path / "x.tif"])


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(
    "evaluation",
    [
        ["knn"],
        ["transfer", "--to", "x={built}"],
        pytest.param(["semisup", "--percent", "50", "--set", "train.epochs=1"], marks=pytest.mark.slow),
        pytest.param(["ood", "--near", "{built}/val.beton", "--id", "{built}/train.beton"], marks=pytest.mark.slow),
        pytest.param(["uncertainty"], marks=pytest.mark.slow),
    ],
)
def test_every_evaluation_runs(runs, betons, channels, evaluation, monkeypatch, capsys):
    name, *options = [word.format(built=betons[channels]) for word in evaluation]
    code, out, err = command(monkeypatch, capsys, "eval", name, runs[channels], *options)
    assert code == 0, err
    assert "measured" in out


@pytest.mark.parametrize(
    "evaluation",
    [
        ["knn", "--val", "{other}/val.beton"],
        ["linear", "--train", "{other}/train.beton"],
        ["semisup", "--val", "{other}/val.beton"],
        ["transfer", "--to", "x={other}"],
        ["transfer", "--method", "finetune", "--to", "x={other}"],
        ["ood", "--near", "{other}/val.beton"],
        ["ood", "--near", "{built}/train.beton", "--fit", "{other}/train.beton"],
        ["uncertainty", "--val", "{other}/val.beton"],
        ["mi", "--data", "{other}/val.beton"],
    ],
)
@pytest.mark.parametrize("channels, other", [(1, 5), (5, 3)])
def test_images_of_other_channels_are_refused(runs, betons, channels, other, evaluation, monkeypatch, capsys):
    before = sorted((runs[channels]).rglob("*"))
    words = [word.format(other=betons[other], built=betons[channels]) for word in evaluation]
    code, _, err = command(monkeypatch, capsys, "eval", words[0], runs[channels], *words[1:])
    assert code == 2 and err.count("\n") == 2
    found = f"holds images of {other} channels, and the encoder of {runs[channels]} takes {channels}"
    assert found in err and err.endswith(f"build it again with --channels {channels}\n")
    assert sorted((runs[channels]).rglob("*")) == before


@pytest.mark.parametrize(
    "data, more, message",
    [
        (5, ["model.in_chans=1"], "holds images of 5 channels, and the encoder (model.in_chans) takes 1: set"),
        (1, ["model.in_chans=5"], "holds images of 1 channel, and the encoder (model.in_chans) takes 5: set model"),
        (5, ["model.in_chans=3"], "set model.in_chans=5, with views.mean and views.std for such images, or build"),
        (3, ["model.in_chans=1", "views.mean=[0.5]", "views.std=[1]"], "holds images of 3 channels"),
        (1, ["data.val={5}/val.beton"], "takes 1: set another data.val, or build it again with --channels 1\n"),
        (5, ["probe.train={3}/train.beton"], "takes 5: set another probe.train, or build"),
        (5, ["data.crop=cpu"], "images of 5 channels, and data.crop=cpu cuts RGB images only: set data.crop=gpu"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_run_begins(
    betons, tmp_path, data, more, message, monkeypatch, capsys
):
    more = [word.replace("{3}", str(betons[3])).replace("{5}", str(betons[5])) for word in more]
    arguments = overrides(betons, data, tmp_path / "run", *more)
    code, _, err = command(monkeypatch, capsys, "train", "recipes/hprob_barlow.yaml", *arguments)
    assert code == 2 and message in err.replace("\nhint: ", ": ") and err.count("\n") == 2
    assert not (tmp_path / "run").exists()


def test_a_backbone_for_rgb_only_is_named(monkeypatch):
    """As timm's csatv2, which takes images of 512 px only."""

    def sees_whole_image(model, size):
        if model.in_chans != 3:
            raise RuntimeError("The size of tensor a (5) must match the size of tensor b (3)")
        return size == 32

    monkeypatch.setattr(image_size, "sees_whole_image", sees_whole_image)
    with pytest.raises(UserError, match="model.backbone=csatv2 takes RGB images only, not model.in_chans=5"):
        check_image_size(ModelConfig(backbone="csatv2", in_chans=5), 32)
    with pytest.raises(UserError, match="takes no images of views.size=40: set another model.backbone"):
        check_image_size(ModelConfig(backbone="csatv2", in_chans=5), 40)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_skipped_operations_are_named(betons, tmp_path, channels):
    def remarks(*more):
        recipe = load_recipe("recipes/barlow.yaml", overrides(betons, channels, tmp_path / "run", *more))
        return " ".join(setup.prepare(recipe, torch.device("cpu"), None)[1])

    assert (COLORS_SKIPPED in remarks()) == (channels != 3)
    partly = remarks("views.jitter.hue=0", "views.gray=0")
    assert ("left out of the views are views.jitter.saturation." in partly) == (channels != 3)
    assert "left out" not in remarks("views.jitter.p=0", "views.gray=0")


@pytest.mark.parametrize("channels", [1, 5])
def test_weights_for_rgb_are_adapted(betons, tmp_path, channels):
    rgb = load_recipe("recipes/barlow.yaml", overrides(betons, 3, tmp_path / "rgb", "train.epochs=1", "probe.every=0"))
    train(rgb)
    arguments = overrides(betons, channels, tmp_path / "run", f"model.init={tmp_path / 'rgb'}")
    run, remarks = setup.prepare(load_recipe("recipes/barlow.yaml", arguments), torch.device("cpu"), None)
    before = fastssl.load_encoder(tmp_path / "rgb").conv1[0].weight
    want = {1: before.sum(1, keepdim=True), 5: before[:, [0, 1, 2, 0, 1]] * 3 / 5}[channels]
    torch.testing.assert_close(run.state.model.encoder.conv1[0].weight, want)
    assert "channels" in " ".join(remarks)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_exports_carry_the_channels(runs, channels, format, tmp_path, monkeypatch, capsys):
    file = tmp_path / "x.safetensors"
    code, out, err = command(monkeypatch, capsys, "export", runs[channels], "--format", format, "--out", file)
    assert code == 0, err
    want = fastssl.load_model(runs[channels]).encoder
    images = torch.randn(2, channels, 32, 32)
    if format == "timm":
        assert f"in_chans={channels}" in out
    expression = out.split("Load it with: ")[1].splitlines()[0]
    loaded = eval(expression, {"timm": __import__("timm"), "fastssl": fastssl})
    torch.testing.assert_close(loaded(images), want(images))

    # The code of the card embeds an image as the run does.
    card = (tmp_path / "model_card.md").read_text()
    assert ("| image | gray, one channel; " if channels == 1 else "| image | 5 channels; ") in card
    code = card.split("```python\n")[1].split("```")[0]
    pixels = values(0, (40, 40, channels))
    monkeypatch.chdir(tmp_path)
    if channels == 1:
        Image.fromarray(pixels[..., 0]).save("photo.jpg", quality=100)
        pixels = np.asarray(Image.open("photo.jpg"))[..., None]
    else:
        np.save("image.npy", np.moveaxis(pixels, 2, 0))
    scope: dict = {}
    exec(code, scope)
    recipe = load_recipe(runs[channels] / "recipe.yaml")
    with torch.inference_mode():
        ours = want(fastssl.views.eval_transform(recipe.views)(torch.from_numpy(pixels.copy())[None]))
    torch.testing.assert_close(scope["h"], ours, rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 5])
def test_onnx_and_profile(runs, betons, channels, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    file = tmp_path / "x.onnx"
    code, _, err = command(monkeypatch, capsys, "export", runs[channels], "--format", "onnx", "--sigma", "--out", file)
    assert code == 0, err
    arguments = overrides(betons, channels, tmp_path / "run")
    profile = tmp_path / "profile.json"
    code, _, err = command(monkeypatch, capsys, "profile", "recipes/barlow.yaml", *arguments, "--json", profile)
    assert code == 0 and profile.is_file(), err


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_views_are_drawn(channels, tmp_path):
    views = load_recipe("recipes/barlow.yaml", ["data.train=x"]).views.model_copy(update={"mean": (0.5,), "std": (1,)})
    save_views(tmp_path, (torch.rand(4, channels, 16, 16),) * 2, views)
    assert Image.open(tmp_path / "views.png").mode == "RGB"


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_corruptions_treat_each_channel_as_a_gray_image(name, channels):
    image = values(0, (3, 24, 20, channels))
    strength = CORRUPTIONS[name][2]
    corrupted = corrupt(image, np.arange(3), name, strength)
    assert corrupted.dtype == np.uint8 and corrupted.shape[3] == channels
    if name != "noise":
        alone = corrupt(image[..., :1], np.arange(3), name, strength)
        np.testing.assert_array_equal(corrupted[..., :1], alone)


def test_gray_files_of_sixteen_bits_and_bands_reach_the_loader(tmp_path):
    """Three kinds of files of the same pixels give the same images."""
    pixels = values(5, (24, 24, 2), "u2")
    source = tmp_path / "source" / "c"
    source.mkdir(parents=True)
    (source / "a.tif").write_bytes(stack([pixels[..., 0], pixels[..., 1]]))
    (source / "b.tif").write_bytes(bands(pixels, tile=16, planar=True))
    (source / "c.npy").write_bytes(npy(pixels))
    build_beton("imagefolder", source.parent, tmp_path / "out", canvas=16, workers=1, channels=2, order="source")
    (batch,) = fastssl.loading.BetonLoader(tmp_path / "out" / "train.beton", 3, shuffle=False)
    assert torch.equal(batch.image[0], batch.image[1]) and torch.equal(batch.image[0], batch.image[2])
    with pytest.raises(UserError, match="cuts RGB images only"):
        views = load_recipe("recipes/barlow.yaml", ["data.train=x"]).views
        fastssl.loading.BetonLoader(tmp_path / "out" / "train.beton", 3, crop="eval", views=views)
