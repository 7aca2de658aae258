"""The assembled model: encoder, projector, and, for stochastic embeddings, Gaussian heads and prior."""

from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead
from fastssl.models.priors import MixtureOfGaussians, StandardNormal
from fastssl.models.projector import Projector, project_draws
from fastssl.randomness import normals
from fastssl.recipe import Recipe


class Embedding(NamedTuple):
    """What the trained model says about B images. mu and sigma are None for a deterministic model."""

    h: Tensor  # (B, D): the representation; for H-prob its mean
    mu: Tensor | None  # (B, D'): mean and standard deviation of the stochastic embedding
    sigma: Tensor | None
    space: Literal["h", "z"] | None  # where that embedding lives


class View(NamedTuple):
    """One view's way through the model."""

    z: Tensor  # (B, D), or (S, B, D) with S Monte Carlo draws
    q: DiagonalGaussian | None  # the stochastic embedding
    x_SBD: Tensor | None  # the draws from q that led to z


class SSLModel(nn.Module):
    """encoder -> [h head] -> projector -> [z head], as the recipe's `model` and `embedding` say."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        sizes, embedding = recipe.model.projector, recipe.embedding
        self.seed = recipe.seed
        self.stochastic = embedding.stochastic
        self.samples = embedding.samples
        self.encoder = build_encoder(recipe.model.backbone, recipe.model.stem, recipe.views.size)
        width = self.encoder.num_features
        self.projector = Projector(width, sizes.hidden, sizes.out, sizes.layers)
        if self.stochastic != "none":
            width = width if self.stochastic == "h" else sizes.out
            self.head = GaussianHead(width, width)
            self.prior = (
                StandardNormal()
                if embedding.prior == "standard_normal"
                else MixtureOfGaussians(embedding.mixture_components, width, embedding.mixture_mode)
            )

    def forward(self, v1: Tensor, v2: Tensor, index: Tensor, step: Tensor) -> tuple[View, View]:
        """v1, v2: (B, 3, size, size) views. index (B,), step (): what the noise is a function of.

        Each view is a batch of its own to the batch norms, as in the official implementations.
        """
        return self._one_view(v1, index, step, 0), self._one_view(v2, index, step, 1)

    def _one_view(self, v: Tensor, index: Tensor, step: Tensor, view: int) -> View:
        h = self.encoder(v)
        if self.stochastic == "none":
            return View(self.projector(h), None, None)
        q = self.head(h if self.stochastic == "h" else self.projector(h))
        noise_SBD = normals(self.seed, step, index, view, self.samples, q.mu.shape[1])
        x_SBD = q.rsample(self.samples, noise_SBD)
        z = project_draws(self.projector, x_SBD) if self.stochastic == "h" else x_SBD
        return View(z, q, x_SBD)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Embedding:
        """images (B, 3, size, size): clean views. Runs in eval mode; batch statistics stay as they are."""
        with evaluating(self):
            h = self.encoder(images)
            if self.stochastic == "none":
                return Embedding(h, None, None, None)
            if self.stochastic == "h":
                q = self.head(h)
                return Embedding(q.mu, q.mu, q.sigma, "h")
            q = self.head(self.projector(h))
            return Embedding(h, q.mu, q.sigma, "z")


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
