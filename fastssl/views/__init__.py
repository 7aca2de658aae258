"""From a uint8 batch to augmented views on the batch's device, and the one transform of evaluation.

paired.py      PairedViews and eval_transform; the chain in torch operations, which is the oracle and runs on a GPU
cpu.py         the same chain as one fast kernel for the CPU
parameters.py  draws all random parameters
operations.py  the operations, as pure functions of (pixels, parameters)
"""

from fastssl.views.paired import PairedViews, describe_eval_transform, eval_transform

__all__ = ["PairedViews", "describe_eval_transform", "eval_transform"]
