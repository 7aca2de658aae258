"""From a recipe to a run directory. `loop.py` is the training; the other files are its parts."""

from fastssl.training.loop import train

__all__ = ["train"]
