"""Steps that are not finite never reach the weights, and gradients are clipped."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.common.distributed import all_gather_values, all_reduce_max, combine, world_size
from fastssl.models.checkpoint import LAST
from fastssl.training.optim import skips_on_device
from fastssl.training.state import TrainState


class FiniteGuard:
    """Keeps a step that is not finite away from the weights, without the host looking.

    A flag on the device makes the optimiser leave the step out and puts the batch-norm statistics back.
    Only for an optimiser that takes no flag (`skips_on_device` says which do) the host waits once a step.
    The first bad step and its terms stay on the device until the host asks at a log step.
    """

    def __init__(self, model: nn.Module, state: TrainState):
        self.state = state
        self.buffers = list(model.buffers())
        self.saved = [buffer.clone() for buffer in self.buffers]
        device = state.skipped.device
        self.first_bad_step = torch.full((), -1, device=device)
        self.first_bad_terms: Tensor | None = None
        self.names: list[str] = []

    def remember(self) -> None:
        """Before the forward pass: the running statistics to come back to."""
        torch._foreach_copy_(self.saved, self.buffers)

    def step(self, terms: dict[str, Tensor]) -> Tensor:
        """After the backward pass: the optimiser's step, or nothing. Returns whether it was nothing, on the device."""
        state, scaler = self.state, self.state.scaler
        self.names = list(terms)
        values = torch.stack([term.detach().float() for term in terms.values()])
        bad_loss, bad_gradient = ~terms["loss"].isfinite(), ~terms["grad_norm"].isfinite()
        if world_size() > 1:  # a loss of this rank's batch alone may be finite on one rank and not on another
            bad_loss, bad_gradient = all_reduce_max(torch.stack((bad_loss, bad_gradient)).float()).bool()
        bad = bad_loss | bad_gradient
        # fp16 looks for its scale by letting gradients overflow; at scale 1 there is nothing to find.
        counts = bad_loss | (bad_gradient & (scaler._scale <= 1)) if scaler.is_enabled() else bad

        if skips_on_device(state.optimizer):
            state.optimizer.found_inf = bad.float()
            state.optimizer.step()
        elif not bad:  # the host waits here
            state.optimizer.step()
        if scaler.is_enabled():
            scaler.update()
        for buffer, saved in zip(self.buffers, self.saved):
            buffer.copy_(torch.where(bad, saved, buffer))

        if self.first_bad_terms is None:
            self.first_bad_terms = torch.zeros_like(values)
        first = counts & (self.first_bad_step < 0)
        self.first_bad_terms = torch.where(first, values, self.first_bad_terms)
        self.first_bad_step = torch.where(first, state.step, self.first_bad_step)
        state.skipped += counts
        return bad

    def read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The terms of the last step over all processes and the number of skipped ones, on the host (one copy)."""
        values = torch.stack([*(term.detach().double() for term in terms.values()), self.state.skipped.double()])
        *numbers, skipped = combine([*terms, "skipped"], all_gather_values(values)).tolist()
        return {**dict(zip(terms, numbers)), "skipped_steps": int(skipped)}

    def sentence(self, run_dir: Path) -> str:
        mend = "lower optim.lr, or allow such steps with train.max_skipped_steps."
        if self.first_bad_step < 0:  # they came before this resume
            return f"{int(self.state.skipped)} earlier steps of {run_dir} were not finite and left out: {mend}"
        values = dict(zip(self.names, self.first_bad_terms.tolist()))
        shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        return (
            f"Step {int(self.first_bad_step)} was not finite ({shown}): the weights in "
            f"{run_dir / 'checkpoints' / LAST}, of step {self.state.step}, are untouched by it; {mend}"
        )
