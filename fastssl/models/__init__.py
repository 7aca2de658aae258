"""Models: timm encoder, projector, Gaussian heads and their priors."""

from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead
from fastssl.models.priors import MixtureOfGaussians, StandardNormal
from fastssl.models.projector import Projector, project_draws

__all__ = [
    "DiagonalGaussian",
    "GaussianHead",
    "MixtureOfGaussians",
    "Projector",
    "StandardNormal",
    "build_encoder",
    "project_draws",
]
