"""From a batch of images to augmented views on the batch's device, and the one transform of evaluation.

Images are uint8 pixels, or still in blocks (fastssl.loading.blocks).

paired.py         PairedViews and eval_transform; the chain in torch operations, which is the oracle and runs on a GPU
cpu.py            the same chain as one fast kernel for the CPU; cpu_blocks.py crops images in blocks for it
gpu.py            the same chain as four Triton kernels, which are in gpu_kernels.py
kernel_choice.py  decides which of them make the views on a GPU
parameters.py     draws all random parameters
operations.py     the operations, as pure functions of (pixels, parameters)
"""

from fastssl.views.paired import PairedViews, describe_eval_transform, eval_transform

__all__ = ["PairedViews", "describe_eval_transform", "eval_transform"]
