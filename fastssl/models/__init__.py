"""Models: from augmented views to representations h and embeddings z, points or Gaussians.

encoder.py        any timm backbone, without its classifier
projector.py      the projector, and S draws through it in one pass
gaussian.py       DiagonalGaussian, its linear heads, the standard normal prior
priors.py         learned priors: a mixture of Gaussians, the VampPrior
ssl_model.py      the self-supervised model, which joins the above; with BYOL's predictor and target network
classifier.py     the supervised baseline
interface.py      ModelInput, ViewOutput, Embedding: what goes into a model and what comes out
embed.py          what `embed` takes: tensors, which are checked, or image files and images
encoder_only.py   an encoder without the rest, for evaluations of weights from elsewhere
build.py          from a recipe to its untrained model
sync_bn.py        batch norm over all processes
averaging.py      moving averages of weights
checkpoint.py     a training checkpoint, written and read; load_model, load_encoder
image_size.py     which image sizes a backbone takes
pretrained.py     weights from fastssl or from elsewhere into a new model: which part of a file is the encoder
weights_file.py   all tensors of a file of weights; weight_layouts.py: the names of other libraries as timm's
exported.py       the safetensors file of `fastssl export`, written and read
"""

from fastssl.models.averaging import WeightAverage
from fastssl.models.build import Model, build_model
from fastssl.models.checkpoint import load_encoder, load_model
from fastssl.models.classifier import Classifier
from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead, StandardNormal
from fastssl.models.interface import Draws, Embedding, ModelInput, ViewOutput
from fastssl.models.priors import MixtureOfGaussians, VampPrior
from fastssl.models.projector import Projector, project_draws
from fastssl.models.ssl_model import SSLModel
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
    "ModelInput",
    "Projector",
    "SSLModel",
    "StandardNormal",
    "VampPrior",
    "ViewOutput",
    "WeightAverage",
    "build_encoder",
    "build_model",
    "convert_batch_norms",
    "load_encoder",
    "load_model",
    "project_draws",
]
