"""Models: timm encoder, projector, Gaussian heads and their priors, and the whole put together."""

from fastssl.models.checkpoint import load_encoder, load_model
from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead
from fastssl.models.priors import MixtureOfGaussians, StandardNormal
from fastssl.models.projector import Projector, project_draws
from fastssl.models.ssl_model import Embedding, SSLModel, View

__all__ = [
    "DiagonalGaussian",
    "Embedding",
    "GaussianHead",
    "MixtureOfGaussians",
    "Projector",
    "SSLModel",
    "StandardNormal",
    "View",
    "build_encoder",
    "load_encoder",
    "load_model",
    "project_draws",
]
