"""From a .beton file to uint8 batches on the device.

loader.py    BetonLoader: the loop around all, its place in the epoch, threads, hand-over to the device
order.py     the order of an epoch
samples.py   what is known of every sample, and its crop boxes
decoding.py  a batch's bytes to its pixels, by threads; kernels.py what they run, compiled
memory.py    what a loader will take
"""

from fastssl.loading.loader import Batch, BetonLoader, count_images
from fastssl.loading.memory import estimate_memory

__all__ = ["Batch", "BetonLoader", "count_images", "estimate_memory"]
