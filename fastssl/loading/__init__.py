"""From a .beton file to uint8 batches on the device.

loader.py    BetonLoader: batches in a reproducible order, the position in the epoch, the copy to the device
order.py     which samples of a file are used, and in what order; keyed_order.py: that of very large sets
samples.py   the samples of a file or a set; the crop boxes that the CPU cuts
decoding.py  copies or decodes the images of a batch, with threads; kernels.py holds their compiled functions
blocks.py    images of a batch that are still in BC4 blocks
prefetch.py  runs the decoding ahead of the training loop, in a thread
resident.py  reads all images of a set that stays on the device
image_files.py  batches of images that are in no .beton, for `embed`
spans.py     named time intervals, for the metrics of training and for traces
"""

from fastssl.loading.blocks import BlockImages
from fastssl.loading.loader import Batch, BetonLoader, ImageRows, estimate_memory
from fastssl.loading.order import SampleSelection
from fastssl.loading.samples import count_labels, require_channels, require_labels

__all__ = [
    "Batch",
    "BetonLoader",
    "BlockImages",
    "ImageRows",
    "SampleSelection",
    "count_labels",
    "estimate_memory",
    "require_channels",
    "require_labels",
]
