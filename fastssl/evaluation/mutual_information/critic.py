"""The critic f(x, y) of the estimators: the log density ratio of Gaussians in closed form, and a neural correction.

    f(x, y) = sum_k s_k log [N(x_k, y_k; rho_k) / N(x_k) N(y_k)] + g(x) . h(y) + a(x) + b(y) + c

x_k, y_k are the canonical directions of the training samples (Hotelling 1936), rho_k their correlations. The weights
s, c and the networks g, h, a, b are trained, from initial values for which f = 0. For jointly Gaussian x and y the sum
with s = 1 is the log density ratio itself, so the networks only have to learn what is not Gaussian. (Without it, on
10,000 samples of 20 equally correlated dimensions with 4 nats, the networks overfitted first and the held-out estimate
stopped at 3.4.) The critic is separable: scoring all B * B pairs of a batch takes one matrix product. The F folds are
trained in parallel, as the leading dimension of every tensor.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 128  # hidden units of the networks
WIDTH = 32  # dimensions of g and h
DIRECTIONS = 128  # largest number of principal components
ROWS_PER_DIRECTION = 8  # least number of training samples per component: with fewer, random data correlate perfectly
SOFT_CLIP_BEYOND = 4.0  # standard deviations
LARGEST_R2 = 1 - 1e-5  # largest squared canonical correlation, 5.8 nats per direction: the limit of float32


class Inputs(NamedTuple):
    """Samples of both variables in the canonical directions of each fold's training samples, float32, finite."""

    x_FNP: Tensor
    y_FNQ: Tensor
    r2_FK: Tensor  # squared canonical correlations, K = min(P, Q), adjusted for chance correlation


def canonical_inputs(x_ND: Tensor, y_NE: Tensor, train_FM: Tensor) -> Inputs:
    """Standardize, whiten, rotate to the canonical directions of each fold's training rows, and clip softly.

    The map is invertible except for the principal components that are left out, so it preserves the mutual information,
    or reduces it: a lower bound stays one.
    """
    folds = []
    for train_M in train_FM:
        x_NP, x_MP = whiten(x_ND, train_M)
        y_NQ, y_MQ = whiten(y_NE, train_M)
        u_PP, r_K, v_QQ = torch.linalg.svd(x_MP.T @ y_MQ / len(train_M))
        # As for adjusted R^2: the squared correlations of independent data are (P + Q) / 2M on average, not 0.
        correction = len(train_M) / max(len(train_M) - len(u_PP) - len(v_QQ), 1)
        r2_K = (1 - (1 - r_K.square()) * correction).clamp(0, LARGEST_R2)
        folds.append((soft_clip(x_NP @ u_PP).float(), soft_clip(y_NQ @ v_QQ.T).float(), r2_K.float()))
    return Inputs(*(torch.stack(parts) for parts in zip(*folds, strict=True)))


def whiten(x_ND: Tensor, train_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal components of all rows, (N, P), and of the training rows, (M, P).

    On the training rows they have variance 1 (constant ones are 0).
    """
    # Scaled to a largest magnitude of 1 in float64, so that squares of any finite input stay finite.
    x_ND = x_ND.double()
    largest_D = x_ND.abs().amax(dim=0)
    x_ND = x_ND / torch.where(largest_D > 0, largest_D, 1.0)
    mean_D = x_ND[train_M].mean(dim=0)
    sd_D = x_ND[train_M].std(dim=0, correction=0)
    x_ND = torch.where(sd_D > 1e-12, (x_ND - mean_D) / sd_D.clamp_min(1e-12), 0.0)
    x_MD = x_ND[train_M]
    # eigh sorts by ascending variance, so the first principal components are the last columns.
    variance_D, axes_DD = torch.linalg.eigh(x_MD.T @ x_MD / len(x_MD))
    count = min(DIRECTIONS, len(variance_D), max(1, len(train_M) // ROWS_PER_DIRECTION))
    variance_P = variance_D[-count:]
    varies_P = variance_P > 1e-6 * variance_P[-1].clamp_min(1e-6)
    axes_DP = torch.where(varies_P, axes_DD[:, -count:] / variance_P.clamp_min(1e-12).sqrt(), 0.0)
    return x_ND @ axes_DP, x_MD @ axes_DP


def principal_components(x_ND: Tensor, count: int) -> Tensor:
    """Return the first `count` principal components (N, P) of standardized x, with variance 1 (constant ones: 0)."""
    return whiten(x_ND, torch.arange(len(x_ND), device=x_ND.device))[0][:, -count:]


def soft_clip(x: Tensor) -> Tensor:
    """Return x up to a magnitude of 4, and a logarithm beyond, so that outliers do not dominate means of e^f."""
    beyond = (x.abs() - SOFT_CLIP_BEYOND).clamp_min(0)
    return torch.sign(x) * (x.abs() - beyond + torch.log1p(beyond))


def initial_critic(inputs: Inputs, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Create parameters for which f = 0, with folds as leading dimension: of the Gaussian part, and of the networks."""
    folds, directions = inputs.r2_FK.shape
    gaussian = {"s": torch.zeros(folds, 1, directions), "c": torch.zeros(folds, 1, 1)}
    networks = {}
    for name, data in (("x", inputs.x_FNP), ("y", inputs.y_FNQ)):
        for layer, wide in enumerate((data.shape[2], HIDDEN)):
            networks[f"{name}{layer}"] = math.sqrt(2 / wide) * torch.randn(1, wide, HIDDEN, generator=generator)
            networks[f"{name}{layer}_bias"] = torch.zeros(1, 1, HIDDEN)
        # g and a start at 0, but not h: if both g and h were 0, neither would receive a gradient.
        last = torch.randn(1, HIDDEN, WIDTH, generator=generator) / math.sqrt(HIDDEN)
        networks[f"{name}_out"] = torch.cat([last * (name == "y"), torch.zeros(1, HIDDEN, 1)], dim=2)
    # All folds start from the same weights, and only differ in their samples.
    networks = {name: weight.expand(folds, *weight.shape[1:]).clone() for name, weight in networks.items()}
    return gaussian, networks


def scores(critic: dict[str, Tensor], x_FBP: Tensor, y_FCQ: Tensor, r2_FK: Tensor) -> Tensor:
    """Return f of every pair (F, B, C), times the critic's entry "factor" if it has one."""
    directions = r2_FK.shape[1]
    s_F1K = critic["s"]
    r2_F1K = r2_FK[:, None]
    product_F1K = s_F1K * r2_F1K.sqrt() / (1 - r2_F1K)
    square_F1K = -0.5 * s_F1K * r2_F1K / (1 - r2_F1K)
    constant_F11 = -0.5 * (s_F1K * torch.log1p(-r2_F1K)).sum(dim=2, keepdim=True) + critic["c"]

    g_FBW, a_FB1 = network(critic, "x", x_FBP)
    h_FCW, b_FC1 = network(critic, "y", y_FCQ)
    x_FBK = x_FBP[..., :directions]
    y_FCK = y_FCQ[..., :directions]
    a_FB1 = a_FB1 + (x_FBK.square() * square_F1K).sum(dim=2, keepdim=True) + constant_F11
    b_FC1 = b_FC1 + (y_FCK.square() * square_F1K).sum(dim=2, keepdim=True)
    left_FBU = torch.cat([x_FBK * product_F1K, g_FBW], dim=2)
    right_FCU = torch.cat([y_FCK, h_FCW], dim=2)
    if "factor" in critic:
        left_FBU, a_FB1, b_FC1 = (part * critic["factor"] for part in (left_FBU, a_FB1, b_FC1))
    return torch.baddbmm(a_FB1 + b_FC1.transpose(1, 2), left_FBU, right_FCU.transpose(1, 2))


def network(critic: dict[str, Tensor], name: str, data_FBP: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and a for name "x", h and b for name "y": (F, B, WIDTH) and (F, B, 1)."""
    for layer in range(2):
        data_FBP = F.silu(torch.baddbmm(critic[f"{name}{layer}_bias"], data_FBP, critic[f"{name}{layer}"]))
    out = torch.bmm(data_FBP, critic[f"{name}_out"])
    return out[..., :WIDTH], out[..., WIDTH:]
