"""Learned priors p(x), to which the KL term draws the embedding's distribution (arXiv 2310.18080, section 3)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastssl.models.gaussian import LOG_2PI, GaussianHead, Prior, StandardNormal, at_least_fp32
from fastssl.recipe import EmbeddingConfig

MixtureMode = Literal["joint", "per_dim", "reference"]


def make_prior(embedding: EmbeddingConfig, head: GaussianHead) -> Prior:
    """The recipe's prior for the embedding that `head` computes."""
    if embedding.prior == "standard_normal":
        return StandardNormal()
    if embedding.prior == "vamp":
        return VampPrior(embedding.mixture_components, head)
    return MixtureOfGaussians(embedding.mixture_components, head.mu.out_features, embedding.mixture_mode)


class MixtureOfGaussians(Prior):
    """A learned mixture of K Gaussians with diagonal covariances.

    Parameters `means` (K, D) and `log_vars` (K, D) start as N(0, 1) draws, `logits` (K,) as zeros.

    Args:
        mode: "joint": the density of a mixture over whole vectors, log sum_k w_k N(x; mu_k, var_k).
            "per_dim": one mixture in every dimension, sum_d log sum_k w_k N(x_d; mu_kd, var_kd), which has K^D modes
            where joint has K. Needs a tensor (S, B, K, D).
            "reference": as the published code, the log-densities of the components are averaged over the S draws and
            then mixed in every dimension. Not a density: by Jensen's inequality it is never above the mean of per_dim
            over the draws. Needs a tensor (B, K, D).
    """

    def __init__(self, components: int, dim: int, mode: MixtureMode = "joint"):
        super().__init__()
        if mode not in get_args(MixtureMode):
            raise ValueError(f"mode must be one of {get_args(MixtureMode)}, not {mode!r}.")
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


class VampPrior(Prior):
    """A mixture whose K components are the Gaussian head's outputs for K learned pseudo-features.

    It is the VampPrior (arXiv 1705.07120, equation 9) with learned weights, and with pseudo-inputs of the head in place
    of pseudo-images. The components belong to the family of q, so the prior moves with the embedding.

    Args:
        head: the GaussianHead of the embedding, in_dim -> D. Its parameters are shared and get this prior's gradients
            too. Parameters `pseudo` (K, in_dim) start as N(0, 1) draws, `logits` (K,) as zeros.
    """

    def __init__(self, components: int, head: GaussianHead):
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

    The square is multiplied out into matrix products with K columns, so that no tensor (..., K, D) is needed.
    """
    # The parts of the square reach 1e7 and cancel to about D, too much for fp32. In fp64 the products are still
    # negligible compared with the encoder, as K is small.
    exact, means_KD, log_vars_KD = x.double(), means_KD.double(), log_vars_KD.double()
    precisions_KD = (-log_vars_KD).exp()
    squares = (
        exact.square() @ precisions_KD.T
        - 2 * exact @ (means_KD * precisions_KD).T
        + (means_KD.square() * precisions_KD).sum(-1)
    )
    log_probs = -0.5 * (squares + (log_vars_KD + LOG_2PI).sum(-1))
    return (logits_K.double().log_softmax(0) + log_probs).logsumexp(-1).to(x.dtype)
