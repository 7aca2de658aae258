"""Weights from elsewhere: files in the layouts of other libraries give the encoder that they were made from."""

import argparse
import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from small_models import make_run
from torch import nn

from fastssl.common.errors import UserError
from fastssl.models import build_model
from fastssl.models.pretrained import load_encoder_weights, load_pretrained
from fastssl.recipe import Recipe

KINDS = ["imagenet", "small"]


def recipe_for(backbone="test_resnet", size=32, stem="imagenet", **sections):
    return Recipe.model_validate({
        "name": "new", "data": {"train": "x.beton"}, "views": {"size": size},
        "model": {"backbone": backbone, "stem": stem, "projector": {"layers": 2, "hidden": 16, "out": 8}}, **sections,
    })  # fmt: skip


def randomized(module: nn.Module, seed=0) -> nn.Module:
    """Random numbers in every parameter and buffer, so that no two tensors of a shape could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel())) if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim < 2))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


def source_of(recipe: Recipe, seed=0) -> nn.Module:
    return randomized(build_model(recipe).encoder, seed)


def output(encoder: nn.Module, size=32) -> torch.Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return encoder.eval()(images)


def saved(folder: Path, content: object, name="weights.pth", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def head(prefix: str) -> dict:
    return {f"{prefix}weight": torch.randn(5, 7), f"{prefix}bias": torch.randn(5)}


def check(path, recipe, expected: nn.Module) -> list[str]:
    """Load a file as `fastssl train` and as `fastssl eval` do, and compare the outputs with the source's."""
    size = recipe.views.size
    model = build_model(recipe)
    remarks = load_pretrained(model, recipe, str(path))
    torch.testing.assert_close(output(model.encoder, size), output(expected, size), rtol=1e-6, atol=1e-6)
    encoder = build_model(recipe).encoder
    assert load_encoder_weights(encoder, recipe, str(path))
    torch.testing.assert_close(output(encoder, size), output(expected, size), rtol=1e-6, atol=1e-6)
    assert all("\n" not in remark and remark.endswith(".") for remark in remarks)
    return remarks


# A state dict `q` of the encoder that its authors evaluate, and one `k` of another network in the same file.
LAYOUTS = {
    "timm": lambda q, k: q | head("fc."),
    "vicreg, barlow twins: resnet50.pth": lambda q, k: q,
    "vicreg: model.pth": lambda q, k: {
        "epoch": 3, "model": under("module.backbone.", q) | head("module.projector.0."), "optimizer": {"state": {}},
    },
    "barlow twins: checkpoint.pth": lambda q, k: {"model": under("module.backbone.", q) | head("module.bn.")},
    "moco v1, v2": lambda q, k: {
        "epoch": 2, "arch": "resnet50",
        "state_dict": under("module.encoder_k.", k) | under("module.encoder_q.", q) | head("module.encoder_q.fc.0.")
        | head("module.encoder_k.fc.0.") | {"module.queue": torch.randn(4, 6)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
    },
    "moco v3": lambda q, k: {
        "state_dict": under("module.momentum_encoder.", k) | under("module.base_encoder.", q)
        | head("module.predictor.0."),
    },
    "simsiam": lambda q, k: {"state_dict": under("module.encoder.", q) | head("module.encoder.fc.0.")},
    "swav": lambda q, k: under("module.", q) | head("module.projection_head.0."),
    "dino": lambda q, k: {
        "student": under("module.backbone.", k) | head("module.head.mlp.0."),
        "teacher": under("backbone.", q) | head("head.mlp.0."),
        "args": argparse.Namespace(arch="vit_small", lr=1e-3), "epoch": 9,
    },
    "solo-learn": lambda q, k: {
        "epoch": 1, "state_dict": under("momentum_backbone.", k) | under("backbone.", q) | head("projector.0."),
        "hyper_parameters": {"method": "byol", "lr": 0.3},
    },
    "lightly": lambda q, k: {"state_dict": under("student_backbone.", k) | under("teacher_backbone.", q)},
    "lightly byol": lambda q, k: {"state_dict": under("backbone_momentum.", k) | under("backbone.", q)},
    "byol-pytorch": lambda q, k: under("target_encoder.net.", k) | under("online_encoder.net.", q),
    "i-jepa": lambda q, k: {"encoder": under("module.", k), "target_encoder": under("module.", q), "epoch": 4},
    "timm with an average": lambda q, k: {"state_dict": under("module.", k), "state_dict_ema": under("module.", q)},
    "ddp": lambda q, k: under("module.", q),
    "torch.compile": lambda q, k: under("_orig_mod.", q),
    "compiled inside of ddp": lambda q, k: {"network": {"model": under("module._orig_mod.", q)}},
    "compiled blocks": lambda q, k: {name.replace("layer1.", "layer1._orig_mod."): t for name, t in q.items()},
    "an encoder of ours under another name": lambda q, k: {"backbone": q, "head": head("0.")},
    "half precision": lambda q, k: OrderedDict((name, tensor.half()) for name, tensor in q.items()),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_encoder_that_it_was_made_from(tmp_path, layout):
    recipe = recipe_for()
    expected, other = source_of(recipe), source_of(recipe, seed=1)
    if layout == "half precision":
        expected = expected.half().float()
    path = saved(tmp_path, LAYOUTS[layout](expected.state_dict(), other.state_dict()))
    remarks = check(path, recipe, expected)
    assert remarks[0].startswith(f"Starting from {path}: ")


@pytest.mark.parametrize("kind", ["legacy", "tar", "bin", "safetensors", "safetensors with a head", "frozen counters"])
def test_every_kind_of_file_is_read(tmp_path, kind):
    recipe = recipe_for()
    expected = source_of(recipe)
    state = expected.state_dict()
    if kind == "legacy":  # of torch before 1.6
        path = saved(tmp_path, {"state_dict": state}, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(state, path := tmp_path / "model.safetensors")
    elif kind == "safetensors with a head":
        save_file(under("module.encoder.", state) | head("module.predictor."), path := tmp_path / "model.safetensors")
    elif kind == "frozen counters":  # torch before 0.4.1 had no num_batches_tracked
        path = saved(tmp_path, {name: tensor for name, tensor in state.items() if "num_batches" not in name})
    else:
        path = saved(tmp_path, {"state_dict": state}, f"weights.{kind}" if kind == "bin" else "checkpoint.pth.tar")
    assert not any("Missing" in remark for remark in check(path, recipe, expected))


def test_the_remarks_name_what_was_taken_and_what_was_left_out(tmp_path):
    recipe = recipe_for()
    path = saved(tmp_path, LAYOUTS["moco v1, v2"](source_of(recipe).state_dict(), source_of(recipe, 1).state_dict()))
    first, left_out = load_pretrained(build_model(recipe), recipe, str(path))
    assert "under state_dict.module.encoder_q, not those under state_dict.module.encoder_k" in first
    assert "others start at random, such as projector." in first
    assert "state_dict.module.encoder_k (" in left_out and "state_dict.module.queue" in left_out
    assert "state_dict.module.encoder_q.fc (2 tensors)" in left_out and "optimizer.state.0.momentum_buffer" in left_out


def test_a_teacher_is_preferred_and_the_remark_says_so(tmp_path):
    recipe = recipe_for()
    path = saved(tmp_path, LAYOUTS["dino"](source_of(recipe).state_dict(), source_of(recipe, 1).state_dict()))
    first, *_ = load_pretrained(build_model(recipe), recipe, str(path))
    assert "under teacher.backbone, not those under student.module.backbone" in first


# --- Other names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenet_v2", "densenet121"])
def test_torchvision_models_fit_timm(tmp_path, name):
    """The same names, or the same order of modules."""
    backbone = {"mobilenet_v2": "mobilenetv2_100"}.get(name, name)
    theirs = randomized(getattr(torchvision.models, name)())
    recipe = recipe_for(backbone, 64)
    encoder = build_model(recipe).encoder
    remarks = load_encoder_weights(encoder, recipe, str(saved(tmp_path, theirs.state_dict())))
    classifier = theirs.fc if name == "resnet18" else theirs.classifier
    with torch.inference_mode():
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(classifier(encoder.eval()(images)), theirs(images), rtol=1e-4, atol=1e-4)
    assert ("paired in their order" in remarks[0]) == (name in ("efficientnet_b0", "mobilenet_v2"))
    assert "Left out: " in remarks[-1]


def test_a_file_sorted_by_names_is_not_paired_by_order(tmp_path):
    """Blocks 10 and 2 would change places."""
    theirs = randomized(torchvision.models.efficientnet_b0())
    path = saved(tmp_path, dict(sorted(theirs.state_dict().items())))
    recipe = recipe_for("efficientnet_b0")
    with pytest.raises(UserError, match=r"holds 0 % of the parameters of model.backbone=efficientnet_b0; it lacks "):
        load_pretrained(build_model(recipe), recipe, str(path))


def torchvision_vit(size=160):
    vit = torchvision.models.VisionTransformer(
        image_size=size, patch_size=16, num_layers=6, num_heads=2, hidden_dim=64, mlp_dim=192
    )
    return randomized(vit)


def test_torchvision_vits_fit_timm(tmp_path):
    theirs = torchvision_vit()
    recipe = recipe_for("test_vit", 160)
    encoder = build_model(recipe).encoder
    load_encoder_weights(encoder, recipe, str(saved(tmp_path, {"model": theirs.state_dict()})))
    theirs.heads = nn.Identity()
    torch.testing.assert_close(output(encoder, 160), output(theirs, 160), rtol=1e-5, atol=1e-5)


def test_dinov2_and_mae_fit_timm(tmp_path):
    """A mask token, a decoder, register tokens, and blocks that were trained in chunks."""
    recipe = recipe_for("test_vit", 64)
    expected = source_of(recipe)
    state = expected.state_dict()
    mae = {**state, "mask_token": torch.zeros(1, 1, 64), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    remarks = check(saved(tmp_path, {"model": mae}), recipe, expected)
    assert "model.mask_token, model.decoder_pos_embed" in remarks[-1]
    chunks = {name.replace("blocks.", f"blocks.{int(name[7]) // 2}.") if name[:7] == "blocks." else name: t
              for name, t in state.items()}  # fmt: skip
    dinov2 = {"teacher": under("backbone.", chunks | {"mask_token": torch.zeros(1, 64)}) | head("dino_head.mlp.0.")}
    check(saved(tmp_path, dinov2), recipe, expected)

    # With registers, the class token and its position are one parameter in timm.
    recipe = recipe_for("vit_small_patch14_reg4_dinov2", 56)
    expected = source_of(recipe)
    expected.cls_token.data.mul_(64).round_().div_(64)  # so that the sum below is exact
    state = expected.state_dict()
    official = dict(state)
    official["register_tokens"] = official.pop("reg_token")
    official["mask_token"] = torch.zeros(1, 384)
    official["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.5), state["pos_embed"]], dim=1)
    official["cls_token"] = state["cls_token"] - 0.5
    check(saved(tmp_path, official), recipe, expected)


@pytest.mark.parametrize("stem", KINDS)
def test_an_nn_sequential_of_a_resnet_fits_timm(tmp_path, stem):
    """lightly's examples: nn.Sequential(*list(resnet.children())[:-1]); its ResNets for CIFAR have no ReLU module."""
    recipe = recipe_for("resnet18", 32, stem)
    expected = source_of(recipe)
    skipped = ("fc", "global_pool") if stem == "imagenet" else ("fc", "global_pool", "act1", "maxpool")
    backbone = nn.Sequential(*[child for name, child in expected.named_children() if name not in skipped])
    state = {name.replace(".downsample.", ".shortcut.") if stem == "small" else name: tensor
             for name, tensor in under("backbone.", backbone.state_dict()).items()}  # fmt: skip
    check(saved(tmp_path, {"state_dict": state | head("projection_head.layers.0.")}), recipe, expected)


# --- Runs of fastssl -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "checkpoint", "copied checkpoint"])
def test_a_run_brings_its_projector_and_heads(tmp_path, kind):
    sections = {"embedding": {"stochastic": "z", "samples": 2}, "views": {"size": 32}}
    folder, _, old = make_run(tmp_path / "run", {"train": "x.beton"}, **sections)
    path = {"run": folder, "checkpoint": folder / "checkpoints" / "last.pt"}.get(kind, tmp_path / "copy.pth")
    if kind == "copied checkpoint":
        path.write_bytes((folder / "checkpoints" / "last.pt").read_bytes())
    recipe = recipe_for(**{"embedding": {"stochastic": "z", "samples": 2}})
    model = build_model(recipe)
    remarks = load_pretrained(model, recipe, str(path))
    assert len(remarks) == 1 and "random" not in remarks[0]
    assert_equal(model, old)


def test_the_target_network_of_byol_is_loaded_or_copied(tmp_path):
    byol = {"objective": {"name": "byol", "predictor_hidden": 8}}
    folder, recipe, old = make_run(tmp_path / "byol", {"train": "x"}, **byol)
    randomized(old.target, seed=3)
    content = {"recipe": recipe.model_dump(mode="json"), "model": old.state_dict(), "step": 0}
    torch.save(content, folder / "checkpoints" / "last.pt")
    model = build_model(recipe)
    load_pretrained(model, recipe, str(folder))
    assert_equal(model.target, old.target)
    assert_equal(model.encoder, old.encoder)

    path = saved(tmp_path, old.encoder.state_dict())
    model = build_model(recipe)
    load_pretrained(model, recipe, str(path))
    assert_equal(model.target.encoder, old.encoder)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


# --- Other resolutions -----------------------------------------------------------------------------------------------


def vit_as_timm_resamples(backbone, state, size):
    """timm's own way: pretrained weights from a state dict into a model of another image size."""
    return timm.create_model(
        backbone, num_classes=0, img_size=size, pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(state), "num_classes": 0, "custom_load": False},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [
        ("test_vit", (224, 32)), ("test_vit", (224, 64)), ("test_vit", (224, 96)), ("test_vit", (32, 96)),
        ("test_vit4", (160, 64)), ("swin_tiny_patch4_window7_224", (224, 96)),
        ("test_maxvit", (160, 128)),
    ],
)  # fmt: skip
def test_positions_are_resampled_as_timm_does(tmp_path, backbone, sizes):
    old, new = sizes
    state = source_of(recipe_for(backbone, old)).state_dict()
    recipe = recipe_for(backbone, new)
    encoder = build_model(recipe).encoder
    remarks = load_encoder_weights(encoder, recipe, str(saved(tmp_path, {"state_dict": under("module.", state)})))
    expected = vit_as_timm_resamples(backbone, state, new)
    torch.testing.assert_close(output(encoder, new), output(expected, new), rtol=1e-5, atol=1e-5)
    assert f"--size {new}: " in " ".join(remarks)


def test_torchvision_vits_are_resampled(tmp_path):
    recipe = recipe_for("test_vit", 32)
    path = saved(tmp_path, torchvision_vit(160).state_dict())
    remarks = load_pretrained(build_model(recipe), recipe, str(path))
    assert remarks[1] == (
        "Resampled as timm does for model.backbone=test_vit and views.size=32: pos_embed from 1x101x64 to 1x5x64."
    )


@pytest.mark.parametrize("backbone", ["cait_xxs24_224", "convit_tiny", "volo_d1_224"])
def test_positions_that_timm_only_resamples_in_its_layers(tmp_path, backbone):
    """Their filters leave it out, so constant positions must stay constant, and the class token's must not move."""
    source = source_of(recipe_for(backbone, 224))
    with torch.no_grad():
        source.pos_embed.fill_(0.25)
    recipe = recipe_for(backbone, 64)
    encoder = build_model(recipe).encoder
    load_encoder_weights(encoder, recipe, str(saved(tmp_path, source.state_dict())))
    torch.testing.assert_close(encoder.pos_embed, torch.full_like(encoder.pos_embed, 0.25))


def test_a_run_is_resampled_and_byols_target_too(tmp_path):
    for objective in ({"name": "barlow_twins"}, {"name": "byol", "predictor_hidden": 8}):
        sections = {"views": {"size": 96}, "objective": objective}
        sections["model"] = {"backbone": "test_vit", "projector": {"layers": 2, "hidden": 16, "out": 8}}
        folder, recipe, old = make_run(tmp_path / objective["name"], {"train": "x"}, **sections)
        smaller = recipe.model_copy(update={"views": recipe.views.model_copy(update={"size": 64})})
        model = build_model(smaller)
        remarks = load_pretrained(model, smaller, str(folder))
        expected = vit_as_timm_resamples("test_vit", old.encoder.state_dict(), 64)
        torch.testing.assert_close(output(model.encoder, 64), output(expected, 64))
        assert "pos_embed from 1x37x64 to 1x17x64" in " ".join(remarks) and "random" not in remarks[0]
        if objective["name"] == "byol":
            torch.testing.assert_close(model.target.encoder.pos_embed, model.encoder.pos_embed)


@pytest.mark.parametrize("backbone", ["levit_128s", "gmixer_12_224", "gcvit_xxtiny"])
def test_where_a_size_cannot_be_changed_the_sentence_names_it(tmp_path, backbone):
    state = source_of(recipe_for(backbone, 224)).state_dict()
    recipe = recipe_for(backbone, 112)
    path = saved(tmp_path, state)
    with pytest.raises(UserError, match=r"was trained at views.size=224, and .* cannot be resampled to views.size=112"):
        load_pretrained(build_model(recipe), recipe, str(path))

    sections = {"views": {"size": 224}, "model": {"backbone": backbone, "projector": {"hidden": 8, "out": 8}}}
    folder, _, _ = make_run(tmp_path / "run", {"train": "x"}, **sections)
    with pytest.raises(UserError, match=r"was trained at views.size=224, .*: set views.size=224") as error:
        load_pretrained(build_model(recipe), recipe, str(folder))
    assert "model.stem" not in str(error.value)


# --- Other channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "test_vit"])
def test_weights_for_rgb_are_adapted_to_other_channels(tmp_path, backbone, channels):
    recipe = recipe_for(backbone)
    state = source_of(recipe).state_dict()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"in_chans": channels})})
    encoder = build_model(recipe).encoder
    remarks = load_encoder_weights(encoder, recipe, str(saved(tmp_path, state)))
    expected = timm.create_model(
        backbone, num_classes=0, in_chans=channels, pretrained=True, **({"img_size": 32} if "vit" in backbone else {}),
        pretrained_cfg_overlay={"state_dict": dict(state), "num_classes": 0},
    ).eval()  # fmt: skip
    images = torch.randn(2, channels, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(images), expected(images), rtol=1e-5, atol=1e-5)
    assert f"was adapted from RGB to {channels} input channels" in " ".join(remarks)

    back = recipe_for(backbone)
    path = saved(tmp_path, encoder.state_dict())
    with pytest.raises(UserError, match=f"is for images of {channels} channels, and these have 3: set model.in_chans="):
        load_pretrained(build_model(back), back, str(path))


# --- Wrong files -----------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "whole model"])
def test_no_file_runs_code(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for()
    encoder = source_of(recipe)
    content = encoder if kind == "whole model" else {"state_dict": encoder.state_dict(), "callback": RunsCode()}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(UserError, match=r"holds Python objects \(.*\), .* torch.save\(model.state_dict\(\), ...\)"):
        load_pretrained(build_model(recipe), recipe, str(path))
    assert not Path("owned").exists()


def wrong_files(folder):
    recipe = recipe_for()
    state = source_of(recipe).state_dict()
    optimizer = torch.optim.AdamW(nn.Linear(8, 8).parameters())
    nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
    names = list(state)
    most = names[: round(0.6 * len(names))]
    not_finite = {**state, "layer1.0.bn1.weight": torch.full_like(state["layer1.0.bn1.weight"], math.nan)}
    infinite = {**state, names[-3]: torch.full_like(state[names[-3]].float(), math.inf)}
    text = folder / "readme.pth"
    text.write_text("weights: see the website")
    cut = saved(folder, state, "cut.pth")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    flipped = saved(folder, state, "flipped.pth")
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    steps = {"state": {0: {"exp_avg": torch.zeros(8, 8), "exp_avg_sq": torch.zeros(8, 8)}}}
    return {
        "text": (text, "is not a readable file of weights"),
        "half of a file": (cut, "is not a readable file of weights"),
        "a flipped bit": (flipped, "is not a readable file of weights .the checksum of"),
        "a tensor": (saved(folder, torch.zeros(3), "tensor.pth"), "holds no weights"),
        "integers": (saved(folder, {name: t.int() for name, t in state.items()}, "int.pth"), r"holds 0 % of"),
        "no tensors": (saved(folder, {"epoch": 3, "lr": [0.1]}, "empty.pth"), "holds no weights"),
        "an optimizer": (saved(folder, optimizer.state_dict() | steps, "adam.pth"), r"holds 0 % .* state.0.exp_avg"),
        "60 percent": (saved(folder, {name: state[name] for name in most}, "most.pth"), r"holds [1-8]\d?\S* % of"),
        "nan": (saved(folder, not_finite, "nan.pth"), "not finite, in .*layer1.0.bn1.weight"),
        "infinite": (saved(folder, infinite, "inf.pth"), "not finite"),
        "nothing there": (folder / "nowhere.pth", "holds no checkpoint"),
    }


def test_wrong_files_are_one_sentence_each(tmp_path):
    recipe = recipe_for()
    for kind, (path, says) in wrong_files(tmp_path).items():
        with pytest.raises(UserError, match=says) as error:
            load_pretrained(build_model(recipe), recipe, str(path))
        assert "\n" not in str(error.value), kind


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (("resnet18", "small"), ("resnet18", "imagenet"), "another stem: set model.stem=small"),
        (("resnet18", "imagenet"), ("resnet18", "small"), "another stem: set model.stem=imagenet"),
        (("test_resnet", "imagenet"), ("test_resnet", "small"), "another stem: set model.stem=imagenet"),
        (("test_resnet", "small"), ("test_resnet", "imagenet"), "another stem: set model.stem=small"),
        (("resnet18", "imagenet"), ("resnet18d", "imagenet"), "it fits model.backbone=resnet18"),
        (("resnet18", "imagenet"), ("resnet34", "imagenet"), "it fits model.backbone=resnet18 model.stem=imagenet"),
        (("resnet34", "small"), ("resnet50", "imagenet"), "it fits model.backbone=resnet34 model.stem=small"),
        (("vit_tiny_patch16_224", "imagenet"), ("vit_small_patch16_224", "imagenet"), "vit_tiny_patch16_224"),
        (("test_convnext", "imagenet"), ("resnet18", "imagenet"), "name the backbone that it was trained with"),
    ],
)
def test_another_backbone_or_stem_is_named(tmp_path, theirs, ours, says):
    size = 32
    state = source_of(recipe_for(theirs[0], size, theirs[1])).state_dict()
    recipe = recipe_for(ours[0], size, ours[1])
    path = saved(tmp_path, {"state_dict": under("module.encoder_q.", state) | head("module.encoder_q.fc.")})
    with pytest.raises(UserError, match=says):
        load_pretrained(build_model(recipe), recipe, str(path))
    if "stem: " in says:
        with pytest.raises(UserError, match=says.replace("model.stem=", "--stem ")):
            load_encoder_weights(build_model(recipe).encoder, recipe, str(path))


def test_a_few_missing_tensors_are_a_remark(tmp_path):
    """Parameters and running statistics alike."""
    recipe = recipe_for()
    state = source_of(recipe).state_dict()
    for name in ("bn1.weight", "bn1.running_mean", "bn1.running_var"):
        del state[name]
    model = build_model(recipe)
    first, missing = load_pretrained(model, recipe, str(saved(tmp_path, state)))
    assert "99.9 % of the encoder's parameters" in first
    assert missing == "Missing, so these keep their initial values: bn1 (3 tensors)."
    assert torch.equal(model.encoder.bn1.weight, torch.ones_like(model.encoder.bn1.weight))
