"""fastssl: self-supervised image encoders with per-image uncertainty.

recipe = fastssl.load_recipe("recipes/zprob_barlow.yaml", ["train.epochs=1"])
encoder = fastssl.load_encoder("runs/zprob_barlow")     # a timm backbone in eval mode
model = fastssl.load_model("runs/zprob_barlow")         # model.embed(images) -> h, mu, sigma
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.models import load_encoder, load_model
    from fastssl.recipe import load_recipe

__all__ = ["load_encoder", "load_model", "load_recipe"]
__version__ = "0.1.0"

# Imported when they are first used, because `fastssl doctor` must run where torch is missing.
_MODULES = {"load_encoder": "fastssl.models", "load_model": "fastssl.models", "load_recipe": "fastssl.recipe"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
