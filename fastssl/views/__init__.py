"""From a uint8 batch to its augmented views (two, or one), on the batch's device; and the one clean view of evaluation.

`paired.py` puts the chain together, `parameters.py` draws every random number of it, `operations.py` holds
the operations as pure functions of (pixels, parameters), `resample.py` the resizing.
"""

from fastssl.views.paired import PairedViews, describe_eval_transform, eval_transform

__all__ = ["PairedViews", "eval_transform", "describe_eval_transform"]
