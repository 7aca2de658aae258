"""A timm encoder with the interface that evaluations use, for weights that no run of fastssl trained."""

import torch
from torch import Tensor, nn

from fastssl.models.encoder import encoder_of
from fastssl.models.interface import Embedding
from fastssl.models.memory import require_memory
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import Recipe


class EncoderOnly(nn.Module):
    """The encoder of a recipe, without projector and heads: it has an h and no z."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        with torch.device("meta"):
            require_memory(encoder_of(recipe))
        self.encoder = encoder_of(recipe)
        self.heads = nn.ModuleDict()  # empty, as those of a deterministic SSLModel
        self.priors = nn.ModuleDict()

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Embedding:
        """Embed images (B, C, size, size) after `fastssl.views.eval_transform`, in eval mode."""
        with evaluating(self):
            return Embedding(self.encoder(images), None, None, None)
