"""The assembled model: encoder, projector, Gaussian heads with their priors, and for BYOL predictor and target."""

import copy
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.common.randomness import NOISE_H, NOISE_Z, normals
from fastssl.models.averaging import move_towards
from fastssl.models.encoder import build_encoder
from fastssl.models.gaussian import DiagonalGaussian, GaussianHead
from fastssl.models.priors import MixtureOfGaussians, StandardNormal, VampPrior
from fastssl.models.projector import Projector, project_draws
from fastssl.recipe import EmbeddingConfig, Recipe


class Embedding(NamedTuple):
    """What the trained model says about B images. mu and sigma are None for a deterministic model."""

    h: Tensor  # (B, D): the representation; where h is stochastic, its mean
    mu: Tensor | None  # (B, D'): mean and standard deviation of the stochastic embedding
    sigma: Tensor | None
    space: Literal["h", "z"] | None  # where that embedding lives; "h" where both are stochastic


class Draws(NamedTuple):
    """A stochastic embedding and the draws from it that the objective saw."""

    q: DiagonalGaussian  # over (B, D); with both spaces stochastic, z's over (S * B, D)
    x_SBD: Tensor  # (S, B, D); then (1, S * B, D)


class View(NamedTuple):
    """One view's way through the model."""

    h: Tensor  # (B, D): the representation, a mean where it is stochastic
    z: Tensor  # (B, D), or (S, B, D) with S Monte Carlo draws: what the objective compares; a Classifier's logits
    draws: dict[str, Draws]  # by space: "h", "z", both or none
    target: Tensor | None  # what is predicted, without gradient: BYOL's target z of this view (B, D), or the label (B,)


class SSLModel(nn.Module):
    """encoder -> [h head] -> projector -> [z head] [-> predictor], as the recipe's `model` and `embedding` say."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        sizes, embedding, objective = recipe.model.projector, recipe.embedding, recipe.objective
        self.seed = recipe.seed
        self.samples, self.chunk = embedding.samples, embedding.chunk
        self.encoder = build_encoder(recipe.model.backbone, recipe.model.stem, recipe.views.size)
        width = self.encoder.num_features
        self.projector = Projector(width, sizes.hidden, sizes.out, sizes.layers)
        widths = {"h": width, "z": sizes.out}
        spaces = [] if embedding.stochastic == "none" else list(embedding.stochastic)
        self.heads = nn.ModuleDict({space: GaussianHead(widths[space], widths[space]) for space in spaces})
        self.priors = nn.ModuleDict({space: make_prior(embedding, self.heads[space]) for space in spaces})
        self.target = None
        if objective.name == "byol":
            self.predictor = Projector(sizes.out, objective.predictor_hidden, sizes.out, layers=2)
            online = {"encoder": self.encoder, "projector": self.projector, "heads": self.heads}
            self.target = copy.deepcopy(nn.ModuleDict(online)).requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor, index: Tensor, step: Tensor) -> tuple[View, View]:
        """v1, v2: (B, 3, size, size) views. index (B,), step (): what the noise is a function of.

        Each view is a batch of its own to the batch norms, as in the official implementations.
        """
        return self._one_view(v1, index, step, 0), self._one_view(v2, index, step, 1)

    def _one_view(self, v: Tensor, index: Tensor, step: Tensor, view: int) -> View:
        def noise(purpose: int, width: int) -> Tensor:
            return normals(self.seed, step, index, view, self.samples, width, purpose)

        h, draws = self.encoder(v), {}
        if "h" in self.heads:
            q = self.heads["h"](h)
            h, h_SBD = q.mu, q.rsample(self.samples, noise(NOISE_H, q.mu.shape[-1]))
            draws["h"] = Draws(q, h_SBD)
            z = project_draws(self.projector, h_SBD, self.chunk)
        else:
            z = self.projector(h)
        if "z" in self.heads:
            z, draws["z"] = self._draw_z(z, noise)
        if self.target is not None:
            z = project_draws(self.predictor, z, self.chunk) if z.ndim == 3 else self.predictor(z)
        return View(h, z, draws, self._target_of(v))

    def _draw_z(self, features: Tensor, noise) -> tuple[Tensor, Draws]:
        """(B, D) -> S draws; where each draw of h has led to features of its own (S, B, D), one draw for each."""
        q = self.heads["z"](features.flatten(0, -2))
        noise_SBD = noise(NOISE_Z, q.mu.shape[-1])
        if features.ndim == 2:
            z_SBD = q.rsample(self.samples, noise_SBD)
            return z_SBD, Draws(q, z_SBD)
        x = q.rsample(1, noise_SBD.flatten(0, 1)[None])
        return x.view(noise_SBD.shape), Draws(q, x)

    @torch.no_grad()
    def _target_of(self, v: Tensor) -> Tensor | None:
        """What BYOL predicts: the target network's z, by the means where an embedding is stochastic."""
        if self.target is None:
            return None
        heads, h = self.target["heads"], self.target["encoder"](v)
        return without_noise(self.target["projector"], heads, heads["h"](h).mu if "h" in heads else h)

    def update_target(self, momentum: float, skip: Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * online, parameter by parameter (BYOL, equation 1).

        unless: a flag () on the device that makes it change nothing.
        """
        online = [p for part in (self.encoder, self.projector, self.heads) for p in part.parameters()]
        move_towards(list(self.target.parameters()), online, 1 - momentum, skip)

    @torch.no_grad()
    def mean_z(self, h: Tensor) -> Tensor:
        """h (B, D), a mean where it is stochastic -> z (B, D) without noise, which would hide a collapse.

        Before BYOL's predictor, and with the running batch statistics.
        """
        with evaluating(self.projector):
            return without_noise(self.projector, self.heads, h.to(next(self.projector.parameters()).dtype))

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Embedding:
        """images (B, 3, size, size): clean views. Runs in eval mode; batch statistics stay as they are."""
        with evaluating(self):
            h = self.encoder(images)
            if "h" in self.heads:
                q = self.heads["h"](h)
                return Embedding(q.mu, q.mu, q.sigma, "h")
            if "z" in self.heads:
                q = self.heads["z"](self.projector(h))
                return Embedding(h, q.mu, q.sigma, "z")
            return Embedding(h, None, None, None)


def without_noise(projector: nn.Module, heads: nn.ModuleDict, h: Tensor) -> Tensor:
    """What the projector makes of h, or where z is stochastic its mean."""
    z = projector(h)
    return heads["z"](z).mu if "z" in heads else z


def make_prior(embedding: EmbeddingConfig, head: GaussianHead) -> nn.Module:
    """The recipe's prior for the embedding that `head` makes."""
    if embedding.prior == "standard_normal":
        return StandardNormal()
    if embedding.prior == "vamp":
        return VampPrior(embedding.mixture_components, head)
    return MixtureOfGaussians(embedding.mixture_components, head.mu.out_features, embedding.mixture_mode)


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
