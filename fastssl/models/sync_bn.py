"""Batch norm over the batches of all processes (`train.sync_bn`), on GPUs and CPUs alike.

torch's own SyncBatchNorm refuses CPU tensors, so without a GPU a run of two processes could not be compared with a run
of one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.common.distributed import all_reduce_sum, world_size
from fastssl.models.gaussian import at_least_fp32


class GlobalBatchNorm(_BatchNorm):
    """Replaces a batch norm of any dimension, with the same parameters, buffers and names in the state dictionary.

    It keeps the dropout and the activation of timm's BatchNormAct2d. In eval mode, and in a single process, it computes
    the same as the norm that it replaces.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            y, mean, var = batch_norm_over_ranks(x, self.weight, self.bias, self.eps)
            update_running_statistics(self, mean[None], var[None])
        return self.act(self.drop(y))


def convert_batch_norms(model: nn.Module) -> nn.Module:
    """Replace every batch norm inside `model` in place, and return it (a new module if it is itself a batch norm)."""
    if isinstance(model, _BatchNorm):
        return GlobalBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, convert_batch_norms(child))
    return model


def batch_norm_over_ranks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, ...) normalized by the statistics over all processes.

    Returns y like x, and without gradient the mean (C,) and the unbiased variance (C,), both fp32 (fp64 for fp64).
    Raises ValueError if a channel has a single value over all processes.
    """
    if world_size() * x.numel() // x.shape[1] < 2:
        raise ValueError(f"Batch statistics need more than 1 value per channel, not an input of {tuple(x.shape)}.")
    y, mean, var, count = _BatchNormOverRanks.apply(x, weight, bias, eps)
    return y, mean, var * (count / (count - 1))


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean_SC: Tensor, var_SC: Tensor) -> None:
    """S sequential updates of the running mean and (unbiased) variance in closed form; later draws weigh more.

    Does nothing for a norm without running statistics.
    """
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    S = len(mean_SC)
    if norm.momentum is None:  # cumulative average over all batches seen
        seen = (norm.num_batches_tracked + S).to(device=mean_SC.device, dtype=mean_SC.dtype)
        kept_share: Tensor | float = (seen - S) / seen
        weights_S1 = 1 / seen
    else:
        age_S1 = torch.arange(S - 1, -1, -1, device=mean_SC.device, dtype=mean_SC.dtype)[:, None]
        kept_share = (1 - norm.momentum) ** S
        weights_S1 = norm.momentum * (1 - norm.momentum) ** age_S1
    norm.running_mean.mul_(kept_share).add_((weights_S1 * mean_SC).sum(0))
    norm.running_var.mul_(kept_share).add_((weights_S1 * var_SC).sum(0))
    norm.num_batches_tracked.add_(S)


class _BatchNormOverRanks(torch.autograd.Function):
    """One all-reduce of (sum, square sum, count) in the forward pass, one of (sum dy, sum dy * xhat) in the backward.

    Only x, the statistics and the weight are saved for the backward pass. The variance is a mean square minus a squared
    mean: in fp32 its relative error is about 1e-7 * (1 + mean^2 / var), which does not matter for features that a
    convolution or a linear layer computes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = at_least_fp32(x)
        over = [d for d in range(x.ndim) if d != 1]
        sums = torch.stack([exact.sum(over), exact.square().sum(over)])
        count = sums.new_full((1,), x.numel() // x.shape[1])
        total = torch.cat([sums.flatten(), count])
        all_reduce_sum(total)
        count, (sum_, square_sum) = total[-1], total[:-1].view_as(sums)
        mean = sum_ / count
        var = (square_sum / count - mean.square()).clamp_min(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        xhat = (exact - _channels(mean, x)) * _channels((var + eps).rsqrt(), x)
        y = xhat if weight is None else xhat * _channels(weight, x)
        return (y if bias is None else y + _channels(bias, x)).to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        over = [d for d in range(x.ndim) if d != 1]
        dy = dy.to(mean.dtype)
        xhat = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inverse_std, x)
        sums = torch.stack([dy.sum(over), (dy * xhat).sum(over)])
        # This process's part: DDP sums it over processes, as every other weight's gradient.
        d_bias, d_weight = sums.clone()
        all_reduce_sum(sums)
        mean_dy, mean_dy_xhat = sums / count
        scale = inverse_std if weight is None else inverse_std * weight
        dx = (dy - _channels(mean_dy, x) - xhat * _channels(mean_dy_xhat, x)) * _channels(scale, x)
        return (
            dx.to(x.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            d_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _channels(values_C: Tensor, like: Tensor) -> Tensor:
    """(C,), reshaped to broadcast along dimension 1 of `like`."""
    return values_C.view(-1, *[1] * (like.ndim - 2))
