"""Which image sizes a backbone takes."""

import pytest
import torch
from training_runs import small

from fastssl import cli
from fastssl.common.errors import UserError
from fastssl.models import build_encoder
from fastssl.models.image_size import check_image_size, sees_whole_image
from fastssl.recipe import ModelConfig

# Patches that do not divide the image, two branches of tokens, windows that do not fit, too few pixels for the last
# layer, and blocks that do not fit.
REFUSED = [
    ("test_vit_relpos", 100, "does not see all of an image at views.size=100, because .*: set views.size to 96 or 112"),
    ("convmixer_768_32", 64, "does not see all of an image .*: set views.size to 56 or 70"),
    ("crossvit_tiny_240", 96, "takes no images of views.size=96: set views.size to 72 or 120"),
    ("test_coatnet", 72, "takes no images of views.size=72: set views.size to 64 or 96"),
    ("csatv2", 32, "takes no images of views.size=32: set views.size to 64"),
    ("nest_tiny", 72, "takes no images of views.size=72: set views.size to 64 or 80"),
]


@pytest.mark.parametrize(("backbone", "size", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(backbone, size, message):
    with pytest.raises(UserError, match=f"^model.backbone={backbone} {message}"):
        check_image_size(ModelConfig(backbone=backbone), size)


@pytest.mark.parametrize(("backbone", "size"), [("test_resnet", 33), ("test_vit", 48), ("test_convnext", 96)])
def test_other_sizes_pass(backbone, size):
    check_image_size(ModelConfig(backbone=backbone), size)


@pytest.mark.parametrize(("backbone", "size"), [("test_vit_relpos", 72), ("test_vit_relpos", 64), ("test_resnet", 37)])
def test_seeing_the_last_row_agrees_with_the_gradient(backbone, size):
    torch.manual_seed(0)
    encoder = build_encoder(backbone, "imagenet", size).eval()
    image = torch.rand(1, 3, size, size, requires_grad=True)
    encoder(image).square().sum().backward()
    reached = bool((image.grad[:, :, -1] != 0).any())
    assert sees_whole_image(ModelConfig(backbone=backbone), size) == reached


def test_trouble_of_the_machine_is_not_blamed_on_the_size(monkeypatch):
    def no_memory(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("fastssl.models.image_size.sees_whole_image", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        check_image_size(ModelConfig(), 32)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.backbone=test_vit", "views.size=40"],
        ["model.backbone=test_coatnet", "views.size=40"],
        ["model.backbone=pit_ti_224", "views.size=36"],
    ],
)
def test_training_and_profile_refuse_a_size_before_anything_is_written(keys, canvas, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "profile"):
        monkeypatch.setattr("sys.argv", ["fastssl", command, "recipes/barlow.yaml", *small(canvas, "run"), *keys])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert "set views.size to " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_size_of_progressive_resize_is_checked(canvas, tmp_path):
    from fastssl.recipe import load_recipe
    from fastssl.training import train

    keys = ["model.backbone=convmixer_768_32", "views.size=63", "views.progressive_resize={size: 24, epochs: [0, 1]}"]
    with pytest.raises(UserError, match="at views.progressive_resize=24, .* set views.progressive_resize to 14 or 28"):
        train(load_recipe("recipes/barlow.yaml", [*small(canvas, tmp_path / "run"), *keys]))
