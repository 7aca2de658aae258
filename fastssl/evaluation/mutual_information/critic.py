"""The critic f(x, y) of every estimator: what Gaussians would need, in closed form, and a neural correction.

    f(x, y) = sum_k s_k log [N(x_k, y_k; rho_k) / N(x_k) N(y_k)] + g(x) . h(y) + a(x) + b(y) + c

x_k, y_k are the canonical directions of the training samples (Hotelling 1936), rho_k their correlations; s, c and the
networks g, h, a, b are trained, and all start where f = 0. For jointly Gaussian x and y the first sum at s = 1 is the
density ratio itself, so the networks have to learn only what is not Gaussian. (Without it, on 10,000 samples of 20
equally correlated dimensions with 4 nats, the networks overfit first and the held-out estimate stopped at 3.4.)
The critic is separable: scoring all B * B pairs of a batch costs one product. F folds are trained side by side.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, WIDTH = 128, 32  # of the networks: hidden units, and entries of g and h
DIRECTIONS = 128  # principal components that are looked at, at most
ROWS_A_DIRECTION = 8  # training samples for each, at least: with fewer, chance alone correlates perfectly
SQUASHED_BEYOND = 4.0  # standard deviations
LARGEST_R2 = 1 - 1e-5  # of a canonical correlation: 5.8 nats a direction; beyond, float32 cannot tell pairs apart


class Inputs(NamedTuple):
    """Both variables in the canonical directions of each fold's training samples, float32, finite."""

    x_FNP: Tensor
    y_FNQ: Tensor
    r2_FK: Tensor  # squared canonical correlations, K = min(P, Q), freed of what chance adds to them


def canonical_inputs(x_ND: Tensor, y_NE: Tensor, train_FM: Tensor) -> Inputs:
    """The fixed map in front of the critic, a function of each fold's training rows alone.

    Standardise, whiten the first DIRECTIONS principal components, turn to the canonical directions, and shorten what
    lies beyond 4 standard deviations. All of it is invertible, up to components that are left out, so the mutual
    information stays (or falls: an estimate of a lower bound stays one).
    """
    x_ND, y_NE = scaled(x_ND), scaled(y_NE)
    folds = []
    for train_M in train_FM:
        (x_NP, x_MP), (y_NQ, y_MQ) = (whitened(data, train_M) for data in (x_ND, y_NE))
        u_PP, r_K, v_QQ = torch.linalg.svd(x_MP.T @ y_MQ / len(train_M))
        # As adjusted R^2: of independent data, the squares average (P + Q) / 2M, not 0.
        spare = len(train_M) / max(len(train_M) - len(u_PP) - len(v_QQ), 1)
        r2_K = (1 - (1 - r_K.square()) * spare).clamp(0, LARGEST_R2)
        folds.append((soft_clip(x_NP @ u_PP).float(), soft_clip(y_NQ @ v_QQ.T).float(), r2_K.float()))
    return Inputs(*(torch.stack(parts) for parts in zip(*folds, strict=True)))


def scaled(x_ND: Tensor) -> Tensor:
    """Columns in float64, largest magnitude 1: squares of any finite input stay finite."""
    x_ND = x_ND.double()
    largest_D = x_ND.abs().amax(dim=0)
    return x_ND / torch.where(largest_D > 0, largest_D, 1.0)


def whitened(x_ND: Tensor, train_M: Tensor) -> tuple[Tensor, Tensor]:
    """All rows and the training rows, in at most DIRECTIONS components of variance 1 (constant ones 0); in fewer where
    there are fewer than eight training rows for each."""
    mean_D, sd_D = x_ND[train_M].mean(dim=0), x_ND[train_M].std(dim=0, correction=0)
    x_ND = torch.where(sd_D > 1e-12, (x_ND - mean_D) / sd_D.clamp_min(1e-12), 0.0)
    x_MD = x_ND[train_M]
    variance_D, axes_DD = torch.linalg.eigh(x_MD.T @ x_MD / len(x_MD))
    keep = min(DIRECTIONS, len(variance_D), max(1, len(train_M) // ROWS_A_DIRECTION))
    variance_P, axes_DP = variance_D[-keep:], axes_DD[:, -keep:]
    alive_P = variance_P > 1e-6 * variance_P[-1].clamp_min(1e-6)
    axes_DP = torch.where(alive_P, axes_DP / variance_P.clamp_min(1e-12).sqrt(), 0.0)
    return x_ND @ axes_DP, x_MD @ axes_DP


def principal_components(x_ND: Tensor, count: int) -> Tensor:
    """The first `count` principal components of standardised x, each of variance 1 (constant ones 0), (N, P)."""
    every_N = torch.arange(len(x_ND), device=x_ND.device)
    return whitened(scaled(x_ND), every_N)[0][:, -count:]


def soft_clip(x: Tensor) -> Tensor:
    """The identity up to 4, then a logarithm: an outlier at 1,000 standard deviations must not decide a mean of e^f."""
    beyond = (x.abs() - SQUASHED_BEYOND).clamp_min(0)
    return torch.sign(x) * (x.abs() - beyond + torch.log1p(beyond))


def initial_critic(inputs: Inputs, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters with a leading dimension of folds: the Gaussian part's, and the networks'. f = 0."""
    folds, directions = inputs.r2_FK.shape
    gaussian = {"s": torch.zeros(folds, 1, directions), "c": torch.zeros(folds, 1, 1)}
    networks = {}
    for name, data in (("x", inputs.x_FNP), ("y", inputs.y_FNQ)):
        sizes = (data.shape[2], HIDDEN, HIDDEN)
        for layer, (wide, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            networks[f"{name}{layer}"] = math.sqrt(2 / wide) * torch.randn(1, wide, out, generator=generator)
            networks[f"{name}{layer}_bias"] = torch.zeros(1, 1, out)
        # g and a start at 0, h does not: else no gradient would reach either of g and h.
        last = torch.randn(1, HIDDEN, WIDTH, generator=generator) / math.sqrt(HIDDEN)
        networks[f"{name}_out"] = torch.cat([last * (name == "y"), torch.zeros(1, HIDDEN, 1)], dim=2)
    # The folds start from the same weights, and differ by their samples alone.
    networks = {name: weight.expand(folds, *weight.shape[1:]).clone() for name, weight in networks.items()}
    return gaussian, networks


def scores(critic: dict[str, Tensor], x_FBP: Tensor, y_FCQ: Tensor, r2_FK: Tensor) -> Tensor:
    """f of every pair, times the critic's factor if it has one: (F, B, C)."""
    directions = r2_FK.shape[1]
    s_F1K, r2_F1K = critic["s"], r2_FK[:, None]
    product_F1K = s_F1K * r2_F1K.sqrt() / (1 - r2_F1K)
    square_F1K = -0.5 * s_F1K * r2_F1K / (1 - r2_F1K)
    constant_F11 = -0.5 * (s_F1K * torch.log1p(-r2_F1K)).sum(dim=2, keepdim=True) + critic["c"]

    g_FBW, a_FB1 = network(critic, "x", x_FBP)
    h_FCW, b_FC1 = network(critic, "y", y_FCQ)
    x_FBK, y_FCK = x_FBP[..., :directions], y_FCQ[..., :directions]
    a_FB1 = a_FB1 + (x_FBK.square() * square_F1K).sum(dim=2, keepdim=True) + constant_F11
    b_FC1 = b_FC1 + (y_FCK.square() * square_F1K).sum(dim=2, keepdim=True)
    left_FBU, right_FCU = torch.cat([x_FBK * product_F1K, g_FBW], dim=2), torch.cat([y_FCK, h_FCW], dim=2)
    if "factor" in critic:
        left_FBU, a_FB1, b_FC1 = (part * critic["factor"] for part in (left_FBU, a_FB1, b_FC1))
    return torch.baddbmm(a_FB1 + b_FC1.transpose(1, 2), left_FBU, right_FCU.transpose(1, 2))


def network(critic: dict[str, Tensor], name: str, data_FBP: Tensor) -> tuple[Tensor, Tensor]:
    """g and a, or h and b: (F, B, WIDTH) and (F, B, 1)."""
    for layer in range(2):
        data_FBP = F.silu(torch.baddbmm(critic[f"{name}{layer}_bias"], data_FBP, critic[f"{name}{layer}"]))
    out = torch.bmm(data_FBP, critic[f"{name}_out"])
    return out[..., :WIDTH], out[..., WIDTH:]
