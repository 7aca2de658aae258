"""The self-supervised model: encoder, projector, Gaussian heads, priors, and for BYOL a predictor and a target."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fastssl.common.randomness import NOISE_H, NOISE_Z, normals
from fastssl.models.averaging import move_towards
from fastssl.models.embed import ImageLike, check_input, embed_files
from fastssl.models.encoder import encoder_of
from fastssl.models.gaussian import GaussianHead
from fastssl.models.interface import Draws, Embedding, ModelInput, ViewOutput
from fastssl.models.priors import make_prior
from fastssl.models.projector import Projector, project_draws
from fastssl.recipe import BYOLConfig, Recipe


class TargetNetwork(nn.Module):
    """BYOL's target: a copy of encoder, projector and heads without gradient, which follows them slowly."""

    def __init__(self, encoder: nn.Module, projector: Projector, heads: nn.ModuleDict):
        super().__init__()
        self.encoder, self.projector, self.heads = copy.deepcopy((encoder, projector, heads))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, v: Tensor) -> Tensor:
        """View (B, C, size, size) -> z (B, D), computed from the means where an embedding is stochastic."""
        h = self.encoder(v)
        return mean_embedding(self.projector, self.heads, self.heads["h"](h).mu if "h" in self.heads else h)


class SSLModel(nn.Module):
    """encoder -> [h head] -> projector -> [z head] [-> predictor], built from the recipe's `model` and `embedding`.

    For BYOL, `target` is the target network; else None.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        sizes, embedding = recipe.model.projector, recipe.embedding
        self.seed = recipe.seed
        self.samples, self.chunk = embedding.samples, embedding.chunk
        self.encoder = encoder_of(recipe)
        widths = {"h": cast(int, self.encoder.num_features), "z": sizes.out}
        self.projector = Projector(widths["h"], sizes.hidden, sizes.out, sizes.layers)
        spaces = [] if embedding.stochastic == "none" else list(embedding.stochastic)
        normalize = embedding.sigma_input == "normalized"
        heads = {space: GaussianHead(widths[space], widths[space], normalize) for space in spaces}
        self.heads = nn.ModuleDict(heads)
        self.priors = nn.ModuleDict({space: make_prior(embedding, head) for space, head in heads.items()})
        self.predictor: Projector | None = None
        self.target: TargetNetwork | None = None
        if isinstance(recipe.objective, BYOLConfig):
            self.predictor = Projector(sizes.out, recipe.objective.predictor_hidden, sizes.out, layers=2)
            self.target = TargetNetwork(self.encoder, self.projector, self.heads)

    def forward(self, inputs: ModelInput) -> tuple[ViewOutput, ...]:
        """One ViewOutput for each view.

        Each view passes the batch norms as a batch of its own, as in the official Barlow Twins and VICReg code.
        """
        return tuple(self._forward_view(v, view, inputs) for view, v in enumerate(inputs.views))

    def _forward_view(self, v: Tensor, view: int, inputs: ModelInput) -> ViewOutput:
        def noise(purpose: int, width: int) -> Tensor:  # (S, B, width)
            return normals(self.seed, inputs.step, inputs.index, view, self.samples, width, purpose)

        h = self.encoder(v)
        draws: dict[str, Draws] = {}
        if "h" in self.heads:
            q = self.heads["h"](h)
            h, h_SBD = q.mu, q.rsample(self.samples, noise(NOISE_H, q.mu.shape[-1]))
            draws["h"] = Draws(q, h_SBD)
            z = project_draws(self.projector, h_SBD, self.chunk)
        else:
            z = self.projector(h)
        if "z" in self.heads:
            draws["z"] = self._draw_z(z, noise(NOISE_Z, z.shape[-1]))
            # Where h is stochastic too, the draws of z are stored as one draw of S * B rows.
            z = draws["z"].x_SBD.view(self.samples, len(v), -1)
        if self.predictor is not None:
            z = project_draws(self.predictor, z, self.chunk) if z.ndim == 3 else self.predictor(z)
        return ViewOutput(h, z, draws, None if self.target is None else self.target(v))

    def _draw_z(self, features: Tensor, noise_SBD: Tensor) -> Draws:
        """S draws of z from features (B, D); from features (S, B, D), one for each draw of h, one draw for each."""
        q = self.heads["z"](features.flatten(0, -2))
        if features.ndim == 2:
            return Draws(q, q.rsample(self.samples, noise_SBD))
        return Draws(q, q.rsample(1, noise_SBD.flatten(0, 1)[None]))

    def update_target(self, momentum: float, skip: Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * online, for every parameter (BYOL, equation 1).

        skip: bool () on the device; where it is true, nothing changes. Without a target, this does nothing.
        """
        if self.target is None:
            return
        online: list[Tensor] = [p for part in (self.encoder, self.projector, self.heads) for p in part.parameters()]
        move_towards(list(self.target.parameters()), online, 1 - momentum, skip)

    @torch.no_grad()
    def mean_z(self, h: Tensor) -> Tensor:
        """h (B, D), its mean where it is stochastic -> z (B, D) without noise, before BYOL's predictor.

        Uses the running batch statistics. Noise would hide a collapse of the embeddings.
        """
        with evaluating(self.projector):
            return mean_embedding(self.projector, self.heads, h.to(next(self.projector.parameters()).dtype))

    @torch.inference_mode()
    def embed(self, images: Tensor | Sequence[ImageLike]) -> Embedding:
        """Embed images, in eval mode; the former mode is restored. The batch norms' running statistics do not change.

        Args:
            images: a float tensor (B, C, size, size) after `fastssl.views.eval_transform`, on the model's device. Or a
                list of B paths of image files, images that Pillow has opened, or uint8 pixels (H, W) or (H, W, 3):
                these are converted as the model's training images were, and transformed. A path is best, as the file
                is then read as `fastssl build-beton` reads it.

        Raises:
            TypeError, ValueError: the tensor cannot be a result of the evaluation transform, or an image of the list is
                bad; `fastssl embed` goes on after bad images.

        Example:
            >>> h, mu, sigma, space = fastssl.load_model("runs/zprob_barlow").embed(["a.jpg", "b.png"])
        """
        if not isinstance(images, Tensor):
            return embed_files(self, images)
        check_input(images, self.recipe)
        with evaluating(self):
            h = self.encoder(images)
            if "h" in self.heads:
                q = self.heads["h"](h)
                return Embedding(q.mu, q.mu, q.sigma, "h")
            if "z" in self.heads:
                q = self.heads["z"](self.projector(h))
                return Embedding(h, q.mu, q.sigma, "z")
            return Embedding(h, None, None, None)


def mean_embedding(projector: nn.Module, heads: nn.ModuleDict, h: Tensor) -> Tensor:
    """The projector's output z for h, or the mean of q(z | h) where z is stochastic."""
    z = projector(h)
    return heads["z"](z).mu if "z" in heads else z


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode; it restores the former mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
