"""The supervised baseline: the same encoder and h head, with a linear classifier in place of the projector."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastssl.common.randomness import NOISE_H, normals
from fastssl.models.embed import ImageLike, check_input, embed_files
from fastssl.models.encoder import encoder_of
from fastssl.models.gaussian import GaussianHead
from fastssl.models.interface import Draws, Embedding, ModelInput, ViewOutput
from fastssl.models.priors import make_prior
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import Recipe, SupervisedConfig


class Classifier(nn.Module):
    """encoder -> [h head] -> linear classifier, built from the recipe's `model`, `embedding` and `objective.classes`.

    It has the methods of SSLModel; its z are logits. There is no target network.
    """

    target = None

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.seed, self.samples = recipe.seed, recipe.embedding.samples
        self.encoder = encoder_of(recipe)
        width = cast(int, self.encoder.num_features)
        self.heads = nn.ModuleDict()
        self.priors = nn.ModuleDict()
        if recipe.embedding.stochastic != "none":
            head = GaussianHead(width, width, recipe.embedding.sigma_input == "normalized")
            self.heads["h"] = head
            self.priors["h"] = make_prior(recipe.embedding, head)
        self.classifier = nn.Linear(width, cast(SupervisedConfig, recipe.objective).classes)

    def forward(self, inputs: ModelInput) -> tuple[ViewOutput, ...]:
        """One ViewOutput, of the only view; its z are logits (B, C) or (S, B, C), its target the label (B,)."""
        (v,) = inputs.views
        h = self.encoder(v)
        if "h" not in self.heads:
            return (ViewOutput(h, self.classifier(h), {}, inputs.label),)
        q = self.heads["h"](h)
        noise_SBD = normals(self.seed, inputs.step, inputs.index, 0, self.samples, q.mu.shape[-1], NOISE_H)
        h_SBD = q.rsample(self.samples, noise_SBD)
        return (ViewOutput(q.mu, self.classifier(h_SBD), {"h": Draws(q, h_SBD)}, inputs.label),)

    @torch.no_grad()
    def mean_z(self, h: Tensor) -> Tensor:
        """h (B, D), its mean where it is stochastic -> logits (B, C), which are also the mean of the draws' logits."""
        return self.classifier(h.to(self.classifier.weight.dtype))

    @torch.inference_mode()
    def embed(self, images: Tensor | Sequence[ImageLike]) -> Embedding:
        """Embed a float tensor (B, C, size, size), or a list of paths, images or pixels, as `SSLModel.embed` does."""
        if not isinstance(images, Tensor):
            return embed_files(self, images)
        check_input(images, self.recipe)
        with evaluating(self):
            h = self.encoder(images)
            if "h" not in self.heads:
                return Embedding(h, None, None, None)
            q = self.heads["h"](h)
            return Embedding(q.mu, q.mu, q.sigma, "h")

    def logits(self, images: Tensor) -> Tensor:
        """Images as for `embed` -> logits (B, classes), without noise."""
        return self.mean_z(self.embed(images).h)
