"""The stochastic embedding q(x | image) = N(mu, diag sigma^2), the layer that computes it, and the standard normal."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The published code's ranges. As torch.clamp does, no gradient reaches a parameter outside of them.
MU_MAX = 20.0
SIGMA_MIN, SIGMA_MAX = 0.01, 5.0
LOG_2PI = math.log(2 * math.pi)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


class Prior(nn.Module):
    """A density p(x) over embeddings."""

    def log_prob(self, x: Tensor) -> Tensor:
        """x (..., D) -> log p(x) (...), summed over D."""
        raise NotImplementedError


class StandardNormal(Prior):
    """The prior N(0, I), without parameters."""

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * (at_least_fp32(x).square() + LOG_2PI).sum(-1)


class DiagonalGaussian:
    """A batch of Gaussians over D dimensions with diagonal covariance, in fp32 (fp64 stays fp64).

    Args:
        mu, log_var: raw parameters (B, D), clamped to mu in [-20, 20] and sigma in [0.01, 5].
    """

    def __init__(self, mu: Tensor, log_var: Tensor):
        self.mu = at_least_fp32(mu).clamp(-MU_MAX, MU_MAX)
        self.log_var = at_least_fp32(log_var).clamp(2 * math.log(SIGMA_MIN), 2 * math.log(SIGMA_MAX))

    @property
    def sigma(self) -> Tensor:
        """Standard deviations (B, D)."""
        return (0.5 * self.log_var).exp()

    def rsample(self, S: int, noise: Tensor | None = None) -> Tensor:
        """S reparametrized draws (S, B, D). noise: standard normal (S, B, D); None: torch.randn."""
        shape = (S, *self.mu.shape)
        if noise is None:
            noise = torch.randn(shape, dtype=self.mu.dtype, device=self.mu.device)
        elif noise.shape != shape:  # would broadcast to the same noise for several draws or images
            raise ValueError(f"Noise must have shape {shape}, not {tuple(noise.shape)}.")
        return self.mu + self.sigma * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """x (B, D) -> log q(x) (B,), or (S, B, D) -> (S, B); summed over D."""
        squares = (at_least_fp32(x) - self.mu).square() * (-self.log_var).exp()
        return -0.5 * (squares + self.log_var + LOG_2PI).sum(-1)

    def kl_to(self, prior: Prior, method: Literal["closed", "mc"] = "closed", samples: Tensor | None = None) -> Tensor:
        """KL(q || prior) (B,) in nats, summed over D.

        Args:
            method: "closed" is exact, for StandardNormal only; "mc" is the mean over S of log q(x) - log p(x).
            samples: x_SBD, the draws from q that the objective used, for "mc".
        """
        if method == "closed":
            if not isinstance(prior, StandardNormal):
                raise ValueError(f"KL to {type(prior).__name__} has no closed form: use method='mc', samples=x.")
            return 0.5 * (self.mu.square() + self.log_var.exp() - 1 - self.log_var).sum(-1)
        if method != "mc":
            raise ValueError(f"method must be 'closed' or 'mc', not {method!r}.")
        if samples is None or samples.shape[1:] != self.mu.shape:
            given = None if samples is None else tuple(samples.shape)
            raise ValueError(f"method='mc' needs samples (S, B, D) from q, not {given}.")
        # A mixture in mode "reference" has averaged over S already: its (B,) broadcasts over S.
        return (self.log_prob(samples) - prior.log_prob(samples)).mean(0)


class GaussianHead(nn.Module):
    """Two linear layers: features (B, in_dim) -> DiagonalGaussian over out_dim.

    They run in their parameters' precision even under autocast: bf16 would round the log-variance to steps of 1/64 to
    1/16, and these two products are small compared with the encoder.

    Args:
        normalize_for_sigma: the layer of log sigma^2 reads the features scaled to the length sqrt(in_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, normalize_for_sigma: bool = False):
        super().__init__()
        self.mu = nn.Linear(in_dim, out_dim)
        self.log_var = nn.Linear(in_dim, out_dim)
        self.normalize_for_sigma = normalize_for_sigma

    def forward(self, x: Tensor) -> DiagonalGaussian:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.mu.weight.dtype)
            sigma_input = F.rms_norm(x, x.shape[-1:]) if self.normalize_for_sigma else x
            return DiagonalGaussian(self.mu(x), self.log_var(sigma_input))
