"""Models: timm encoder, projector or classifier, Gaussian heads and their priors, and the whole put together."""

from fastssl.models.averaging import WeightAverage
from fastssl.models.build import Model, build_model
from fastssl.models.checkpoint import load_encoder, load_model
from fastssl.models.classifier import Classifier
from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead
from fastssl.models.priors import MixtureOfGaussians, StandardNormal, VampPrior
from fastssl.models.projector import Projector, project_draws
from fastssl.models.ssl_model import Draws, Embedding, SSLModel, View
from fastssl.models.sync_bn import GlobalBatchNorm, convert_batch_norms

__all__ = [
    "Classifier",
    "DiagonalGaussian",
    "Draws",
    "Embedding",
    "GaussianHead",
    "GlobalBatchNorm",
    "MixtureOfGaussians",
    "Model",
    "Projector",
    "SSLModel",
    "StandardNormal",
    "VampPrior",
    "View",
    "WeightAverage",
    "build_encoder",
    "build_model",
    "convert_batch_norms",
    "load_encoder",
    "load_model",
    "project_draws",
]
