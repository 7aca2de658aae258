"""From a uint8 batch to its augmented views (two, or one), on the batch's device; and the one clean view of evaluation.

`paired.py` puts the chain together, `parameters.py` draws every random number of it, `operations.py` holds
the operations as pure functions of (pixels, parameters), `resample.py` the resizing.
"""

from .paired import PairedViews, clean_view, describe_clean_view

__all__ = ["PairedViews", "clean_view", "describe_clean_view"]
