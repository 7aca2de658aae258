"""A step that is not finite never reaches the weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.common.distributed import all_gather_values, all_reduce_max, combine, world_size
from fastssl.common.errors import UserError
from fastssl.models.checkpoint import LAST
from fastssl.training.optim import skips_on_device
from fastssl.training.state import TrainState


class FiniteGuard:
    """Skips a step whose loss or gradient is not finite, without the CPU waiting for the device.

    A flag on the device makes the optimizer skip the step and restores the batch norms' running statistics. With an
    optimizer that takes no flag (see `skips_on_device`), the CPU waits once per step. The first such step and its terms
    stay on the device.
    """

    def __init__(self, model: nn.Module, state: TrainState):
        self.state = state
        self.statistics = Statistics(list(model.buffers()))
        self.first_bad_step = torch.full((), -1, device=state.skipped.device)
        self.first_bad_terms: Tensor | None = None
        self.names: list[str] = []  # of the terms

    def remember(self) -> None:
        """Save the running statistics. Call it before the forward pass."""
        self.statistics.save()

    @torch.no_grad()
    def step(self, terms: dict[str, Tensor]) -> Tensor:
        """Step the optimizer, or skip the step. Call it after the backward pass.

        Args:
            terms: scalars, with `loss` and `grad_norm` among them.

        Returns:
            Whether the step was skipped, a bool tensor () on the device.
        """
        state, scaler = self.state, self.state.scaler
        self.names = sorted(terms, key=lambda name: name not in ("loss", "grad_norm"))  # these two first
        values = torch.stack([terms[name].float() for name in self.names])
        # 1 where loss or gradient is not finite. (`isfinite` launches four kernels; 0 times infinity is NaN.)
        zeros = values[:2] * 0
        flags = torch.ne(zeros, 0, out=zeros)
        if world_size() > 1:
            # With objective.gather=false, the loss may be finite in one process and not in another.
            all_reduce_max(flags)
        found_inf = flags.amax()
        bad = found_inf > 0
        # fp16 finds its loss scale by letting gradients overflow, so that counts as an error at scale 1 only.
        counts = bad
        if scaler.is_enabled() and scaler._scale is not None:
            bad_loss, bad_gradient = flags
            counts = torch.maximum(bad_loss, bad_gradient * (scaler._scale <= 1)) > 0

        if skips_on_device(state.optimizer):
            setattr(state.optimizer, "found_inf", found_inf)  # noqa: B010, torch does not declare it
            state.optimizer.step()
        elif not bad:  # the CPU waits for the device here
            state.optimizer.step()
        if scaler.is_enabled():
            scaler.update()
        self.statistics.restore(where=bad)

        if self.first_bad_terms is None:
            self.first_bad_terms = torch.zeros_like(values)
        is_first = counts & (self.first_bad_step < 0)
        torch.where(is_first, values, self.first_bad_terms, out=self.first_bad_terms)
        self.first_bad_step.masked_fill_(is_first, state.step)
        state.skipped += counts
        return bad

    def over_ranks(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms over all processes and the number of skipped steps, float64 scalars on the device."""
        values = torch.stack([term.detach() for term in terms.values()]).double()
        values = torch.cat((values, self.state.skipped.double()[None]))
        names = [*terms, "skipped_steps"]
        return dict(zip(names, combine(names, all_gather_values(values)).unbind()))

    def error(self, run_dir: Path) -> UserError:
        """What to say about the first step that was not finite, for train.max_skipped_steps."""
        fix = "lower optim.lr, or allow such steps with train.max_skipped_steps"
        if self.first_bad_terms is None or self.first_bad_step < 0:  # skipped before this run was resumed
            skipped = f"{int(self.state.skipped)} earlier steps of {run_dir} were not finite and were skipped"
            return UserError(skipped, hint=fix)
        terms = ", ".join(f"{name}={value:.4g}" for name, value in zip(self.names, self.first_bad_terms.tolist()))
        return UserError(
            f"Step {int(self.first_bad_step)} was not finite ({terms}), and the weights in "
            f"{run_dir / 'checkpoints' / LAST}, of step {self.state.step}, are untouched by it",
            hint=fix,
        )


class Statistics:
    """The buffers of a model, which a step that is skipped must not change.

    They are saved and restored as the bytes of one flat tensor each: 4 calls per step for all of them, where one by one
    a ResNet-18 with its projector takes 200.
    """

    def __init__(self, buffers: list[Tensor]):
        self.parts = [_bytes_of(buffer) for buffer in buffers if buffer.numel()]
        device = buffers[0].device if buffers else None
        sizes = [len(part) for part in self.parts]
        self.saved, self.now = (torch.zeros(sum(sizes), dtype=torch.uint8, device=device) for _ in range(2))
        self.parts_now = list(self.now.split(sizes))
        self.save()

    def save(self) -> None:
        if self.parts:  # a model without batch norms has none
            torch.cat(self.parts, out=self.saved)

    def restore(self, where: Tensor) -> None:
        """Return to the saved values if `where`, a bool tensor () on the device, is true."""
        if self.parts:
            torch.cat(self.parts, out=self.now)
            torch.where(where, self.saved, self.now, out=self.now)
            torch._foreach_copy_(self.parts, self.parts_now)


def _bytes_of(buffer: Tensor) -> Tensor:
    """The memory of a tensor, in any memory format, as uint8 (bytes,)."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.stride()))
    start, length = (n * buffer.element_size() for n in (buffer.storage_offset(), elements))
    return torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(
        buffer.untyped_storage(), start, (length,), (1,)
    )
