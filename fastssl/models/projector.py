"""The projector z = projector(h), and S draws of h through it at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.models.sync_bn import GlobalBatchNorm, batch_norm_over_ranks, update_running_statistics


class Projector(nn.Sequential):
    """`layers` linear layers with batch norm and ReLU between them; h (B, in_dim) -> z (B, out).

    No biases, as in the official Barlow Twins code: batch norm would cancel them, and so does the objectives' centring
    after the last layer. (SimCLR and BYOL, which do not centre, have none there either.)
    """

    def __init__(self, in_dim: int, hidden: int, out: int, layers: int):
        if layers < 1:
            raise ValueError(f"A projector has at least 1 layer, not {layers}.")
        modules = []
        for _ in range(layers - 1):
            modules += [nn.Linear(in_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            in_dim = hidden
        super().__init__(*modules, nn.Linear(in_dim, out, bias=False))


def project_draws(projector: nn.Sequential, h_SBD: Tensor, chunk: int | None = None) -> Tensor:
    """Each draw through the projector with its own batch statistics: h_SBD -> z_SBD.

    Equals torch.stack([projector(h) for h in h_SBD]) to rounding, in training and eval mode, with the running
    statistics left as after that loop, in as many kernels as a single draw takes. (One pass over (S*B, D) would not do:
    its statistics are those of all draws together.)

    projector: a sequence of BatchNorm1d (or what train.sync_bn puts in its place) and of modules that treat every row
    alone. chunk: take so many draws at a time, and compute them again in the backward pass, so that memory grows with
    `chunk` where it would grow with S.
    """
    if chunk is None or chunk >= len(h_SBD):
        z_SBD, statistics = _project(projector, h_SBD)
        _update(statistics)
        return z_SBD
    parts = []
    for part in h_SBD.split(chunk):
        z, statistics = checkpoint(_project, projector, part, use_reentrant=False, preserve_rng_state=False)
        _update(statistics)  # here, not inside: what is computed twice must not count twice
        parts.append(z)
    return torch.cat(parts)


def _project(projector: nn.Sequential, h_SBD: Tensor) -> tuple[Tensor, list]:
    """The draws' way through the layers, and (norm, mean_SD, var_SD) for each norm that keeps statistics."""
    # Inside, draws stand next to features: a linear layer sees B*S rows, a batch norm S*D channels.
    x, statistics = h_SBD.transpose(0, 1).contiguous(), []
    for layer in projector:
        if isinstance(layer, (nn.BatchNorm1d, GlobalBatchNorm)):
            x = _batch_norm_draws(layer, x, statistics)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"project_draws knows BatchNorm1d, not {type(layer).__name__}.")
        else:
            x = layer(x)
    return x.transpose(0, 1), statistics


def _batch_norm_draws(norm: nn.BatchNorm1d | GlobalBatchNorm, x_BSD: Tensor, statistics: list) -> Tensor:
    """The norm on each of the S draws, as one batch norm over S*D channels."""
    B, S, D = x_BSD.shape
    if not norm.training and norm.running_mean is not None:
        return norm(x_BSD.view(B * S, D)).view(B, S, D)

    x = x_BSD.view(B, S * D)
    weight, bias = (None if p is None else p.repeat(S) for p in (norm.weight, norm.bias))
    if isinstance(norm, GlobalBatchNorm):
        y, mean, var = batch_norm_over_ranks(x, weight, bias, norm.eps)
    else:
        # At momentum 1 the running statistics are this batch's, as BatchNorm1d takes them (the variance unbiased): one
        # pass gives the output and all that the update needs.
        mean, var = torch.zeros(2, S * D, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=norm.eps)
    if norm.running_mean is not None:
        statistics.append((norm, mean.view(S, D), var.view(S, D)))
    return y.view(B, S, D)


def _update(statistics: list) -> None:
    for norm, mean_SD, var_SD in statistics:
        update_running_statistics(norm, mean_SD, var_SD)
