"""Small constant tensors, made once for each device."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # a compiled graph takes the tensor as it is
def constant(values: Sequence[float] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`torch.tensor(values, device=device)` without its copy to the device, for which the host waits, at every call.

    The caller must not change the tensor.
    """
    key = (tuple(values), device)
    if key not in _constants:
        _constants[key] = torch.tensor(values, device=device)
    return _constants[key]


_constants: dict[tuple[object, torch.device], Tensor] = {}
