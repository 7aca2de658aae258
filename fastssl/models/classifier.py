"""The supervised baseline: the same encoder and h head, with a linear classifier where the projector would be."""

import torch
from torch import Tensor, nn

from fastssl.common.randomness import NOISE_H, normals
from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import GaussianHead
from fastssl.models.ssl_model import Draws, Embedding, View, evaluating, make_prior
from fastssl.recipe import Recipe


class Classifier(nn.Module):
    """encoder -> [h head] -> linear classifier, as the recipe's `model`, `embedding` and `objective.classes` say.

    What SSLModel has under these names means the same here, z being the logits; there is no target network.
    """

    target = None

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.seed, self.samples = recipe.seed, recipe.embedding.samples
        self.encoder = build_encoder(recipe.model.backbone, recipe.model.stem, recipe.views.size)
        width = self.encoder.num_features
        spaces = [] if recipe.embedding.stochastic == "none" else ["h"]
        self.heads = nn.ModuleDict({space: GaussianHead(width, width) for space in spaces})
        self.priors = nn.ModuleDict({space: make_prior(recipe.embedding, self.heads[space]) for space in spaces})
        self.classifier = nn.Linear(width, recipe.objective.classes)

    def forward(self, v: Tensor, label: Tensor, index: Tensor, step: Tensor) -> tuple[View]:
        """v (B, 3, size, size): the only view. label (B,). index (B,), step (): what the noise is a function of."""
        h = self.encoder(v)
        if "h" not in self.heads:
            return (View(h, self.classifier(h), {}, label),)
        q = self.heads["h"](h)
        h_SBD = q.rsample(self.samples, normals(self.seed, step, index, 0, self.samples, q.mu.shape[-1], NOISE_H))
        return (View(q.mu, self.classifier(h_SBD), {"h": Draws(q, h_SBD)}, label),)

    @torch.no_grad()
    def mean_z(self, h: Tensor) -> Tensor:
        """h (B, D), a mean where it is stochastic -> logits (B, C): of mu, and their mean over the draws."""
        return self.classifier(h.to(self.classifier.weight.dtype))

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Embedding:
        """images (B, 3, size, size): clean views. Runs in eval mode; batch statistics stay as they are."""
        with evaluating(self):
            h = self.encoder(images)
            if "h" not in self.heads:
                return Embedding(h, None, None, None)
            q = self.heads["h"](h)
            return Embedding(q.mu, q.mu, q.sigma, "h")

    def logits(self, images: Tensor) -> Tensor:
        """images (B, 3, size, size): clean views -> (B, C), without noise. Runs in eval mode, as `embed`."""
        return self.mean_z(self.embed(images).h)
