"""Priors p(x) that the KL term pulls the embedding's distribution towards (arXiv 2310.18080, 3)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)
MixtureMode = Literal["joint", "per_dim", "reference"]


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precisions become fp32, fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class StandardNormal(nn.Module):
    """N(0, I); no parameters."""

    def log_prob(self, x: Tensor) -> Tensor:
        """x (..., D) -> log p(x) (...), summed over D."""
        return -0.5 * (at_least_fp32(x).square() + LOG_2PI).sum(-1)


class MixtureOfGaussians(nn.Module):
    """A learned mixture of K Gaussians with diagonal covariances.

    Parameters `means` (K, D) and `log_vars` (K, D) start as N(0, 1) draws, `logits` (K,) as zeros.

    mode:
    - "joint": the density of a mixture over whole vectors, log sum_k w_k N(x; mu_k, var_k).
    - "per_dim": one mixture in every dimension, sum_d log sum_k w_k N(x_d; mu_kd, var_kd). It has
      K^D modes where joint has K. Needs (S, B, K, D) of memory.
    - "reference": as the published code: component log-densities are first averaged over the S
      draws, then mixed in every dimension. Not a density; by Jensen's inequality never above the
      draws' mean of per_dim. Needs (B, K, D) of memory.
    """

    def __init__(self, components: int, dim: int, mode: MixtureMode = "joint"):
        super().__init__()
        if mode not in get_args(MixtureMode):
            raise ValueError(f"A mixture's mode is one of {get_args(MixtureMode)}, not {mode!r}.")
        self.mode = mode
        self.means = nn.Parameter(torch.randn(components, dim))
        self.log_vars = nn.Parameter(torch.randn(components, dim))
        self.logits = nn.Parameter(torch.zeros(components))

    def log_prob(self, x: Tensor) -> Tensor:
        """x (..., D) -> (...), summed over D. In reference mode x (S, B, D) -> (B,)."""
        x = at_least_fp32(x)
        if self.mode == "joint":
            return joint_mixture_log_prob(x, self.logits, self.means, self.log_vars)

        log_w_K = at_least_fp32(self.logits).log_softmax(0)
        means_KD, log_vars_KD = at_least_fp32(self.means), at_least_fp32(self.log_vars)
        if self.mode == "per_dim":
            squares = (x.unsqueeze(-2) - means_KD).square()  # (..., K, D)
        else:
            if x.ndim != 3:
                raise ValueError(f"Mode 'reference' takes draws (S, B, D), not {tuple(x.shape)}.")
            # The mean over draws of (x - mu)^2 needs the draws' mean and variance only.
            var_BD, mean_BD = torch.var_mean(x, dim=0, correction=0)
            squares = (mean_BD.unsqueeze(1) - means_KD).square() + var_BD.unsqueeze(1)
        log_probs = -0.5 * (squares * (-log_vars_KD).exp() + log_vars_KD + LOG_2PI)
        return (log_probs + log_w_K[:, None]).logsumexp(-2).sum(-1)


class VampPrior(nn.Module):
    """A mixture whose K components are what the Gaussian head makes of K learned pseudo-features.

    As the VampPrior (arXiv 1705.07120, equation 9, there with learned pseudo-images), with learned weights, and with
    the pseudo-inputs at the head's input: q's own family, so the prior moves with the embedding.

    head: the GaussianHead of the embedding, in_dim -> D. Parameters `pseudo` (K, in_dim) start as N(0, 1) draws,
    `logits` (K,) as zeros; the head's parameters are shared, and get this prior's gradients too.
    """

    def __init__(self, components: int, head: nn.Module):
        super().__init__()
        self.head = head
        self.pseudo = nn.Parameter(torch.randn(components, head.mu.in_features))
        self.logits = nn.Parameter(torch.zeros(components))

    def log_prob(self, x: Tensor) -> Tensor:
        """x (..., D) -> log p(x) (...), of a mixture over whole vectors."""
        q = self.head(self.pseudo)
        return joint_mixture_log_prob(at_least_fp32(x), self.logits, q.mu, q.log_var)


def joint_mixture_log_prob(x: Tensor, logits_K: Tensor, means_KD: Tensor, log_vars_KD: Tensor) -> Tensor:
    """log sum_k w_k N(x; mu_k, var_k) over whole vectors, x (..., D) -> (...).

    The square is multiplied out so that only matrix products with K columns remain, and nothing of size (..., K, D).
    Its parts reach 1e7 and cancel to about D, too much for fp32; in fp64 the products are still negligible beside the
    encoder, as K is small.
    """
    exact, means_KD, log_vars_KD = x.double(), means_KD.double(), log_vars_KD.double()
    precisions_KD = (-log_vars_KD).exp()
    squares = (
        exact.square() @ precisions_KD.T
        - 2 * exact @ (means_KD * precisions_KD).T
        + (means_KD.square() * precisions_KD).sum(-1)
    )
    log_probs = -0.5 * (squares + (log_vars_KD + LOG_2PI).sum(-1))
    return (logits_K.double().log_softmax(0) + log_probs).logsumexp(-1).to(x.dtype)
