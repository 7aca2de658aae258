"""The projector z = projector(h), and S draws of h through it at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """`layers` linear layers with batch norm and ReLU between them; h (B, in_dim) -> z (B, out).

    No biases, as in the official Barlow Twins code: batch norm would cancel them, and so does the
    objectives' centring after the last layer.
    """

    def __init__(self, in_dim: int, hidden: int, out: int, layers: int):
        if layers < 1:
            raise ValueError(f"A projector has at least 1 layer, not {layers}.")
        modules = []
        for _ in range(layers - 1):
            modules += [nn.Linear(in_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            in_dim = hidden
        super().__init__(*modules, nn.Linear(in_dim, out, bias=False))


def project_draws(projector: nn.Sequential, h_SBD: Tensor) -> Tensor:
    """Each draw through the projector with its own batch statistics: h_SBD -> z_SBD.

    Equals torch.stack([projector(h) for h in h_SBD]) to rounding, in training and eval mode, with
    the running statistics left as after that loop, in as many kernels as a single draw takes. (One
    pass over (S*B, D) would not do: its statistics are those of all draws together.)

    projector: a sequence of BatchNorm1d and of modules that treat every row alone.
    """
    # Inside, draws stand next to features: a linear layer sees B*S rows, a batch norm S*D channels.
    x = h_SBD.transpose(0, 1).contiguous()
    for layer in projector:
        if isinstance(layer, nn.BatchNorm1d):
            x = _batch_norm_draws(layer, x)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"project_draws knows BatchNorm1d, not {type(layer).__name__}.")
        else:
            x = layer(x)
    return x.transpose(0, 1)


def _batch_norm_draws(norm: nn.BatchNorm1d, x_BSD: Tensor) -> Tensor:
    """BatchNorm1d on each of the S draws, as one batch norm over S*D channels."""
    B, S, D = x_BSD.shape
    if not norm.training and norm.running_mean is not None:
        return norm(x_BSD.view(B * S, D)).view(B, S, D)

    def tiled(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.repeat(S)

    # At momentum 1 the running statistics are this batch's, as BatchNorm1d takes them (the variance
    # unbiased): one pass gives the output and all that the update below needs.
    mean, var = None, None
    if norm.running_mean is not None:
        mean = norm.running_mean.new_zeros(S * D)
        var = torch.zeros_like(mean)
    y = F.batch_norm(
        x_BSD.view(B, S * D), mean, var, tiled(norm.weight), tiled(norm.bias),
        training=True, momentum=1.0, eps=norm.eps,
    )  # fmt: skip
    if norm.running_mean is not None:
        _update_running_statistics(norm, mean.view(S, D), var.view(S, D))
    return y.view(B, S, D)


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm1d, mean_SD: Tensor, var_SD: Tensor) -> None:
    """S sequential updates in closed form: the later a draw, the more it weighs."""
    S, like_means = len(mean_SD), dict(dtype=mean_SD.dtype, device=mean_SD.device)
    if norm.momentum is None:  # cumulative average over all batches seen
        seen = (norm.num_batches_tracked + S).to(**like_means)
        keep, weights_S1 = (seen - S) / seen, 1 / seen
    else:
        age_S1 = torch.arange(S - 1, -1, -1, **like_means)[:, None]
        keep, weights_S1 = (1 - norm.momentum) ** S, norm.momentum * (1 - norm.momentum) ** age_S1
    norm.running_mean.mul_(keep).add_((weights_S1 * mean_SD).sum(0))
    norm.running_var.mul_(keep).add_((weights_S1 * var_SD).sum(0))
    norm.num_batches_tracked.add_(S)
