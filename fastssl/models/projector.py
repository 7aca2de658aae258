"""The projector z = projector(h), and S draws of h through it in one pass."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.models.sync_bn import GlobalBatchNorm, batch_norm_over_ranks, update_running_statistics


class Projector(nn.Sequential):
    """`layers` linear layers with batch norm and ReLU between them; h (B, in_dim) -> z (B, out).

    No biases, as in the official Barlow Twins code: batch norm would cancel them, and so does the centering of the
    objectives after the last layer. (SimCLR and BYOL, which do not center, have none there either.)
    """

    def __init__(self, in_dim: int, hidden: int, out: int, layers: int):
        if layers < 1:
            raise ValueError(f"A projector has at least 1 layer, not {layers}.")
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            modules += [nn.Linear(in_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            in_dim = hidden
        super().__init__(*modules, nn.Linear(in_dim, out, bias=False))


class DrawStatistics(NamedTuple):
    """The batch statistics of S draws in one batch norm."""

    norm: nn.BatchNorm1d | GlobalBatchNorm
    mean_SD: Tensor
    var_SD: Tensor  # unbiased


def project_draws(projector: nn.Sequential, h_SBD: Tensor, chunk: int | None = None) -> Tensor:
    """Each draw through the projector with its own batch statistics: h_SBD -> z_SBD.

    Equals torch.stack([projector(h) for h in h_SBD]) to rounding, in training and eval mode, and leaves the running
    statistics as that loop does, in as many kernels as a single draw takes. (One pass over (S*B, D) would use the
    statistics of all draws together.)

    Args:
        projector: BatchNorm1d (or GlobalBatchNorm) and modules that treat every row independently.
        chunk: take this many draws at a time, and compute them again in the backward pass, so that the memory grows
            with `chunk` instead of S.
    """
    if chunk is None or chunk >= len(h_SBD):
        z_SBD, statistics = _project(projector, h_SBD)
        _update(statistics)
        return z_SBD
    parts = []
    for part in h_SBD.split(chunk):
        z, statistics = checkpoint(_project, projector, part, use_reentrant=False, preserve_rng_state=False)
        _update(statistics)  # outside of `_project`, which runs twice: each draw must count once
        parts.append(z)
    return torch.cat(parts)


def _project(projector: nn.Sequential, h_SBD: Tensor) -> tuple[Tensor, list[DrawStatistics]]:
    """The draws through all layers, and the statistics of each batch norm that has running ones."""
    # Inside, draws stand next to features: a linear layer sees B*S rows, a batch norm S*D channels.
    x = h_SBD.transpose(0, 1).contiguous()
    statistics: list[DrawStatistics] = []
    for layer in projector:
        if isinstance(layer, (nn.BatchNorm1d, GlobalBatchNorm)):
            x = _batch_norm_draws(layer, x, statistics)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"project_draws needs BatchNorm1d, not {type(layer).__name__}.")
        else:
            x = layer(x)
    return x.transpose(0, 1), statistics


def _batch_norm_draws(
    norm: nn.BatchNorm1d | GlobalBatchNorm, x_BSD: Tensor, statistics: list[DrawStatistics]
) -> Tensor:
    """The norm on each of the S draws, as one batch norm over S*D channels. Appends to `statistics`."""
    B, S, D = x_BSD.shape
    if not norm.training and norm.running_mean is not None:
        return norm(x_BSD.view(B * S, D)).view(B, S, D)

    x = x_BSD.view(B, S * D)
    weight, bias = (None if p is None else p.repeat(S) for p in (norm.weight, norm.bias))
    if isinstance(norm, GlobalBatchNorm):
        y, mean, var = batch_norm_over_ranks(x, weight, bias, norm.eps)
    else:
        # At momentum 1 the running statistics become this batch's, with the unbiased variance that BatchNorm1d takes:
        # one pass gives the output and all that the update needs.
        mean, var = torch.zeros(2, S * D, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=norm.eps)
    if norm.running_mean is not None:
        statistics.append(DrawStatistics(norm, mean.view(S, D), var.view(S, D)))
    return y.view(B, S, D)


def _update(statistics: list[DrawStatistics]) -> None:
    for norm, mean_SD, var_SD in statistics:
        update_running_statistics(norm, mean_SD, var_SD)
