"""Moving averages of a network's weights: BYOL's target network, and the average of train.ema."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def move_towards(targets: list[Tensor], sources: list[Tensor], share: float, skip: Tensor) -> None:
    """targets <- targets + share * (sources - targets), in place. skip: bool () on the device to change nothing."""
    steps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(steps, ~skip * share)
    torch._foreach_add_(targets, steps)


class WeightAverage(Generic[ModelT]):
    """An exponential moving average of a model's weights and running statistics, itself a model in eval mode.

    The decay grows as min(decay, (1 + step) / (10 + step)), TensorFlow's rule, so that the first steps' weights do not
    stay in the average of a short run. (torch's AveragedModel would read its count from the device at every step.)
    """

    def __init__(self, model: ModelT, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        # Not from the state dictionaries: they list a tensor that two modules share (VampPrior and its head) twice.
        averages, weights = ([*m.parameters(), *m.buffers()] for m in (self.model, model))
        pairs = list(zip(averages, weights))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # batch norms' counts of batches

    def update(self, step: int, skip: Tensor) -> None:
        """Move towards the model after its step 0, 1, ... skip: bool () on the device, true for a skipped step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = zip(*self._averaged)
        move_towards(list(averages), list(weights), 1 - decay, skip)
        if self._copied:
            averages, weights = zip(*self._copied)
            torch._foreach_copy_(list(averages), list(weights))
