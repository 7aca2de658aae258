"""fastssl: JPEGs in, a self-supervised encoder with calibrated uncertainty out.

recipe = fastssl.load_recipe("recipes/zprob_barlow.yaml", ["train.epochs=1"])
encoder = fastssl.load_encoder("runs/zprob_barlow")     # a timm backbone, eval mode
model = fastssl.load_model("runs/zprob_barlow")         # model.embed(images) -> h, mu, sigma
"""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use: `fastssl doctor` must run where torch is missing.
_HOMES = {"load_recipe": "recipe", "load_model": "models", "load_encoder": "models"}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"fastssl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
