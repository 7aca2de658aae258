"""The encoder h = encoder(v): any timm backbone by name, untrained, without its classifier."""

import difflib
from typing import Any, Literal

import timm
from timm.models import is_model_in_modules
from timm.models._manipulate import adapt_input_conv
from timm.models.resnet import ResNet
from torch import Tensor, nn

from fastssl.common.errors import UserError, quote
from fastssl.recipe import Recipe


def encoder_of(recipe: Recipe) -> nn.Module:
    """The untrained encoder of a recipe."""
    return build_encoder(recipe.model.backbone, recipe.model.stem, recipe.views.size, recipe.model.in_chans)


def build_encoder(backbone: str, stem: Literal["imagenet", "small"], image_size: int, in_chans: int = 3) -> nn.Module:
    """A timm model that maps views (B, in_chans, image_size, image_size) to h (B, encoder.num_features).

    Parameters keep timm's names. Weights are drawn from torch's global generator; nothing is ever downloaded.

    Args:
        backbone: an architecture of timm.list_models().
        stem: "imagenet" leaves the model as timm builds it; "small" is the usual change of a ResNet for images of 32 to
            64 px: a 3x3 convolution with stride 1 and no max-pool.

    Raises:
        UserError: for an unknown backbone, or a small stem on another family.
    """
    names = timm.list_models()
    if backbone not in names:  # also refuses hf-hub: and local-dir: names, which may download
        nearest = difflib.get_close_matches(backbone[:100], names, n=3, cutoff=0.0)
        raise UserError(
            f"model.backbone: timm {timm.__version__} has no architecture {quote(backbone)}",
            hint=f"the nearest are {', '.join(nearest)}",
        )
    options: dict[str, Any] = {"in_chans": in_chans}
    if has_fixed_size(backbone):  # a transformer, whose position embedding must fit our image size
        options["img_size"] = image_size
    # timm initializes the last batch norm of each block to zero. At 32 px with the ImageNet stem, that leaves only
    # strided 1x1 shortcuts: an untrained encoder sees a corner of the image, and learns late. torchvision initializes
    # it to one, and so did the published runs.
    if is_model_in_modules(backbone, ["resnet"]):
        options["zero_init_last"] = False
    encoder: Any = timm.create_model(backbone, pretrained=False, num_classes=0, **options)
    # Some families (MobileNetV3, VGG) pool into a wider layer before the classifier: that layer's output is h.
    encoder.num_features = getattr(encoder, "head_hidden_size", encoder.num_features)
    if stem == "small":
        is_resnet = isinstance(encoder, ResNet)
        if not is_resnet:
            raise UserError(
                f"model.stem=small is defined for timm's ResNets only, not for {backbone}",
                hint="set model.stem=imagenet",
            )
        conv = nn.Conv2d(in_chans, encoder.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm initializes convolutions
        encoder.conv1 = conv
        encoder.maxpool = nn.Identity()
    return encoder


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor | None:
    """The weight of a layer that reads RGB images, for images of `in_chans` channels, as timm adapts it.

    One channel: the sum over red, green and blue. More: the three are repeated in turn, scaled by 3 / in_chans. None if
    timm cannot adapt such a layer.
    """
    try:
        return adapt_input_conv(in_chans, weight)
    except (NotImplementedError, AssertionError):
        return None


def has_fixed_size(backbone: str) -> bool:
    """Whether a backbone takes images of one size only, the one that it was built for."""
    config = timm.get_pretrained_cfg(backbone)
    return config is not None and config.fixed_input_size
