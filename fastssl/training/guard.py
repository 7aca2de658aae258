"""A step that is not finite never reaches the weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.common.distributed import all_gather_values, all_reduce_max, combine, world_size
from fastssl.models.checkpoint import LAST
from fastssl.training.optim import skips_on_device
from fastssl.training.state import TrainState


class FiniteGuard:
    """Skips a step whose loss or gradient is not finite, without the CPU waiting for the device.

    A flag on the device makes the optimizer skip the step and restores the batch norms' running statistics. With an
    optimizer that takes no flag (see `skips_on_device`), the CPU waits once per step. The first such step and its terms
    stay on the device until they are read at a log step.
    """

    def __init__(self, model: nn.Module, state: TrainState):
        self.state = state
        self.buffers = list(model.buffers())
        self.saved = [buffer.clone() for buffer in self.buffers]
        self.first_bad_step = torch.full((), -1, device=state.skipped.device)
        self.first_bad_terms: Tensor | None = None
        self.names: list[str] = []  # of the terms

    def remember(self) -> None:
        """Save the running statistics. Call it before the forward pass."""
        if self.buffers:  # a model without batch norms has none, and foreach functions refuse empty lists
            torch._foreach_copy_(self.saved, self.buffers)

    def step(self, terms: dict[str, Tensor]) -> Tensor:
        """Step the optimizer, or skip the step. Call it after the backward pass.

        Args:
            terms: scalars, with `loss` and `grad_norm` among them.

        Returns:
            Whether the step was skipped, a bool tensor () on the device.
        """
        state, scaler = self.state, self.state.scaler
        self.names = list(terms)
        values = torch.stack([term.detach().float() for term in terms.values()])
        bad_loss, bad_gradient = ~terms["loss"].isfinite(), ~terms["grad_norm"].isfinite()
        if world_size() > 1:
            # With objective.gather=false, the loss may be finite in one process and not in another.
            bad_loss, bad_gradient = all_reduce_max(torch.stack((bad_loss, bad_gradient)).float()).bool()
        bad = bad_loss | bad_gradient
        # fp16 finds its loss scale by letting gradients overflow, so that counts as an error at scale 1 only.
        counts = bad
        if scaler.is_enabled() and scaler._scale is not None:
            counts = bad_loss | (bad_gradient & (scaler._scale <= 1))

        if skips_on_device(state.optimizer):
            setattr(state.optimizer, "found_inf", bad.float())  # noqa: B010, torch does not declare it
            state.optimizer.step()
        elif not bad:  # the CPU waits for the device here
            state.optimizer.step()
        if scaler.is_enabled():
            scaler.update()
        for buffer, saved in zip(self.buffers, self.saved):
            buffer.copy_(torch.where(bad, saved, buffer))

        if self.first_bad_terms is None:
            self.first_bad_terms = torch.zeros_like(values)
        is_first = counts & (self.first_bad_step < 0)
        self.first_bad_terms = torch.where(is_first, values, self.first_bad_terms)
        self.first_bad_step = torch.where(is_first, state.step, self.first_bad_step)
        state.skipped += counts
        return bad

    def read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The terms over all processes and the number of skipped steps, as Python numbers, in one copy."""
        values = torch.stack([*(term.detach().double() for term in terms.values()), self.state.skipped.double()])
        *numbers, skipped = combine([*terms, "skipped"], all_gather_values(values)).tolist()
        return {**dict(zip(terms, numbers)), "skipped_steps": int(skipped)}

    def error_message(self, run_dir: Path) -> str:
        """One sentence about the first step that was not finite, for train.max_skipped_steps."""
        fix = "lower optim.lr, or allow such steps with train.max_skipped_steps."
        if self.first_bad_terms is None or self.first_bad_step < 0:  # skipped before this run was resumed
            return f"{int(self.state.skipped)} earlier steps of {run_dir} were not finite and were skipped: {fix}"
        terms = ", ".join(f"{name}={value:.4g}" for name, value in zip(self.names, self.first_bad_terms.tolist()))
        return (
            f"Step {int(self.first_bad_step)} was not finite ({terms}), and the weights in "
            f"{run_dir / 'checkpoints' / LAST}, of step {self.state.step}, are untouched by it: {fix}"
        )
