"""Whether a model fits into memory, found out before it is built: a recipe may ask for any size."""

from torch import nn

from fastssl.common.errors import UserError
from fastssl.common.system import free_memory

# What makes each part of a model large. A target network has the sizes of what it copies.
FIXES = {
    "encoder": "choose a smaller model.backbone",
    "projector": "lower model.projector.hidden, model.projector.out or model.projector.layers",
    "heads.h": "choose a smaller model.backbone",
    "heads.z": "lower model.projector.out",
    "priors": "lower embedding.mixture_components",
    "predictor": "lower objective.predictor_hidden",
    "classifier": "lower objective.classes",
}


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, also of a model on the meta device, which has none yet."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def suggest_smaller(model: nn.Module) -> str:
    """The keys that make the largest part of a model smaller, as the end of a sentence."""
    sizes = {name: count_bytes(part) for name, part in model.named_modules() if name in FIXES}
    return FIXES[max(sizes, key=lambda name: sizes[name])] if sizes else FIXES["encoder"]


def require_memory(outline: nn.Module) -> None:
    """Raise UserError if there is less memory than the weights of a model take. outline: it, on the meta device."""
    size, free = count_bytes(outline), free_memory()
    if size > free:
        raise UserError(
            f"The weights of this model take {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free",
            hint=suggest_smaller(outline),
        )
