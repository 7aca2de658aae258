"""What goes into a model and what comes out of it: named tuples of tensors, so that torch.compile and DDP take them."""

from typing import Literal, NamedTuple

from torch import Tensor

from fastssl.models.gaussian import DiagonalGaussian


class ModelInput(NamedTuple):
    """One micro-batch of a training step."""

    views: tuple[Tensor, ...]  # each (B, C, size, size), normalized; as many as the objective takes (num_views)
    label: Tensor  # (B,) class, -1 where an image has none; only a Classifier reads it
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; (B,) sample ids, from which the noise of an image is derived
    step: Tensor  # () int64, the optimizer step, from which the noise is derived too; a tensor, as torch.compile
    # would compile the model once for every Python number


class Draws(NamedTuple):
    """A stochastic embedding, and the draws from it that the objective saw."""

    q: DiagonalGaussian  # over (B, D); the q of z over (S * B, D) where h is stochastic too
    x_SBD: Tensor  # (S, B, D); in the second case (1, S * B, D)


class ViewOutput(NamedTuple):
    """The outputs of a model for one view."""

    h: Tensor  # (B, D) representation; its mean where h is stochastic
    z: Tensor  # (B, D), or (S, B, D) with S Monte Carlo draws: the input of the objective; a Classifier's logits
    draws: dict[str, Draws]  # by space, "h" or "z"; empty for a deterministic model
    target: Tensor | None  # what z is to predict, without gradient: BYOL's target z (B, D), a label (B,), or nothing


class Embedding(NamedTuple):
    """The result of `embed` for B images. mu, sigma and space are None for a deterministic model."""

    h: Tensor  # (B, D) representation; its mean where h is stochastic
    mu: Tensor | None  # (B, D') mean and standard deviation of the stochastic embedding
    sigma: Tensor | None
    space: Literal["h", "z"] | None  # the space of that embedding; "h" where both are stochastic
