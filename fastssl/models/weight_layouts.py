"""Names of weights in the layouts of other libraries, as timm's names: one function for each layout."""

import re
from collections.abc import Mapping, Sequence

from timm.models.resnet import ResNet
from torch import Tensor, nn

COUNTER = "num_batches_tracked"  # of batch norms: nothing depends on it, and old files lack it

TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.(0|linear_1)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.(3|linear_2)\.", r"\1.mlp.fc2."),
)


def torchvision_vit(name: str) -> str:
    """A name of torchvision's VisionTransformer as timm's."""
    for pattern, replacement in TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def without_chunks(name: str) -> str:
    """DINOv2 trains its blocks in chunks: blocks.CHUNK.BLOCK is blocks.BLOCK."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def sequences(encoder: nn.Module) -> list[list[str]]:
    """The modules of nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples, for timm's ResNets.

    The second one is that of ResNets for CIFAR, which apply ReLU as a function and have no max-pool.
    """
    if not isinstance(encoder, ResNet):
        return []
    children = [name for name, _ in encoder.named_children()]
    return [children, [name for name in children if name not in ("act1", "maxpool")]]


def numbered(name: str, modules: Sequence[str]) -> str:
    """A name such as 4.0.conv1.weight in an nn.Sequential of the modules; `shortcut` is timm's `downsample`."""
    first, dot, rest = name.partition(".")
    if first.isdecimal() and int(first) < len(modules):
        name = f"{modules[int(first)]}{dot}{rest}"
    return name.replace(".shortcut.", ".downsample.")


def pair_by_order(inside: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Pair the encoder's names with those in a file in the order of the modules, as timm's load_checkpoint(remap=True).

    Shapes and last words of the names must all agree, so torchvision's EfficientNets fit timm's, and an architecture
    whose modules are ordered otherwise does not. Only a classifier may follow.
    """
    theirs = [name for name in inside if not name.endswith(COUNTER)]
    ours = [name for name in own if not name.endswith(COUNTER)]
    if len(theirs) < len(ours) or theirs == sorted(theirs):  # sorted by name, so not in the order of the modules
        return None
    pairs = dict(zip(ours, theirs, strict=False))
    for name, other in pairs.items():
        if own[name].shape != inside[other].shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            return None
    return pairs
