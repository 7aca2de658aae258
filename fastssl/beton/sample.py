"""What a builder yields: one image of the source, not yet read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Where an image is, or what it is: see `Sample.image`.
ImageSource = str | Path | bytes | np.ndarray | tuple[str, int, int] | Callable[[], bytes]


class Sample(NamedTuple):
    """One image of the source.

    `image` is one of
        the path of an image file,
        (path, offset, size): that many bytes of a larger file, such as a member of a tar,
        a function without arguments that gives the bytes of an image file; it must be picklable,
        the bytes of an image file, or uint8 pixels (H, W) or (H, W, 3), where they are in memory.
    Nothing is read, called or decoded before a worker process does it.
    `label` counts from 0 and indexes the split's class names.
    `name` is what a person would search for when the image is bad: a path within the source.
    """

    image: ImageSource
    label: int
    name: str
