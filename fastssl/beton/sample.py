"""What a builder yields: one image of the source, not yet read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One image of the source.

    `image` is the path of an image file, the bytes of one, or uint8 pixels (H, W) or (H, W, 3).
    Nothing is read or decoded before a worker process does it.
    `label` counts from 0 and indexes the split's class names.
    `name` is what a person would search for when the image is bad: a path within the source.
    """

    image: Path | bytes | np.ndarray
    label: int
    name: str
