"""From a .beton file to uint8 batches on the device.

`kernels.py` holds the compiled operations (decode, crop and resize) over FFCV's library,
`loader.py` the loop around them: order, threads, buffers, resume.
"""

from .loader import Batch, BetonLoader

__all__ = ["Batch", "BetonLoader"]
