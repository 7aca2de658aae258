"""Arrays in, tensors in: what an evaluation is given may be either, or a map of a file."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def as_numpy(x: ArrayLike | Tensor) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def as_tensor(x: ArrayLike | Tensor) -> Tensor:
    """A tensor as it is, anything else as a copy: a map of a file is read-only."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
