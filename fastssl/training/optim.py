"""Optimisers and the learning rate. Every optimiser here leaves out a step that is flagged on the device."""

import math

import torch
import torch_optimizer
from torch import Tensor, nn

from fastssl.recipe import Optim

MOMENTUM = 0.9  # of SGD and LARS, as in SimCLR, BYOL and Barlow Twins
TRUST = 1e-3  # of LARS, as in Barlow Twins

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The recipe's optimiser over all of the model's parameters, weight decay as `optim.exclude` says.

    Setting `optimizer.found_inf` to a float tensor of 1 makes the next step change nothing, without the
    host knowing: torch's protocol for fused optimisers (GradScaler uses it), which our LARS follows too.
    """
    decay, plain = split_parameters(model, optim.exclude)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=MOMENTUM, fused=True)
    return LARS(groups, lr=optim.lr, momentum=MOMENTUM, trust_coefficient=TRUST)


def split_parameters(model: nn.Module, exclude: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with and without weight decay."""
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        excluded = (
            ("norm" in exclude and id(parameter) in norms)
            or ("bias" in exclude and name.endswith("bias"))
            or ("prior" in exclude and name.startswith("prior."))
        )
        (plain if excluded else decay).append(parameter)
    return decay, plain


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final_factor: float) -> float:
    """The rate of step 0, 1, ...: linear from 0 to `peak`, then half a cosine down to peak * final_factor.

    The first warm-up step has peak / warmup_steps, the last step of all nearly the final rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2)


class LARS(torch_optimizer.LARS):
    """torch-optimizer's LARS with its step in foreach kernels.

    Its own step asks the device about every tensor's norm and so stops the host once a tensor.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict, params: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        if self.found_inf is not None:
            bad = self.found_inf.bool()
            grads = [torch.where(bad, 0.0, g) for g in grads]  # a product would keep the NaN
            lr, momentum = torch.where(bad, 0.0, lr), torch.where(bad, 1.0, momentum)

        decay = group["weight_decay"]
        if decay != 0:
            p_norm = torch.stack(torch._foreach_norm(params))
            g_norm = torch.stack(torch._foreach_norm(grads))
            scaled = (p_norm > 0) & (g_norm > 0)
            trust = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
            trust, decay = torch.where(scaled, trust, 1.0), torch.where(scaled, decay, 0.0)
            grads = torch._foreach_add(grads, torch._foreach_mul(params, list(decay.unbind())))
            torch._foreach_mul_(grads, list(trust.unbind()))

        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))
