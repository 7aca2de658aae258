"""The fast kernels of the views on a GPU, in Triton: each pixel is read and written as rarely as the chain allows.

torch.compile's kernels for the same chain run every operation on every view and move fifteen times as many bytes
(records/gpu-budget.md). Here an operation runs only on the views that drew it, and four kernels do all:

    crop_kernel           crop (from pixels or from blocks, decoding those pixels that it reads), resize, flip, the
                          operations before contrast; sums of the gray values, for contrast
    contrast_kernel       contrast, the operations after it, grayscale; views without blur are finished here
    blur_columns_kernel   the vertical half of the blur, for the views that drew it
    blur_rows_kernel      the horizontal half, which finishes them
    (to finish a view: solarize, normalize, write it in the type and memory format that the network takes)

Parameters come from parameters.py; the pixels equal those of paired.torch_views, the oracle, up to rounding.
"""

import torch
import triton
from torch import Tensor

from fastssl.loading.blocks import BlockImages
from fastssl.recipe import ViewsConfig
from fastssl.views.gpu_kernels import (
    COLUMNS,
    blur_columns_kernel,
    blur_rows_kernel,
    contrast_kernel,
    crop_kernel,
)
from fastssl.views.operations import BLUR_RADIUS, box_limits
from fastssl.views.parameters import CONTRAST, Parameters

TILE = 32  # rows and columns of the pixels that one program makes
OPTIONS = {"enable_fp_fusion": True}  # a product and a sum may be rounded once; Triton 3.9 warns without it


def parameter_table(stored: Tensor | BlockImages, box_N4: Tensor | None, drawn: Parameters[Tensor]) -> Tensor:
    """(N, COLUMNS) float32: all that the kernels need to know of N views. See the columns in gpu_kernels.py.

    stored: the images, of which only the size matters. box_N4: the crop boxes in their pixels; None: the whole images,
    which are crops that the loader has cut.
    """
    height, width = stored.shape[-3:-1]
    if box_N4 is None:
        zero_N = torch.zeros_like(drawn.sigma_N)
        box_N4 = torch.stack([zero_N, zero_N, zero_N + height, zero_N + width], dim=1)
    top_N, left_N, height_N, width_N = box_N4.double().unbind(1)
    limits = torch.stack([*box_limits(top_N, height_N, height), *box_limits(left_N, width_N, width)], dim=1)
    offset_K = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=box_N4.device)
    taps_NK = torch.exp(-0.5 * (offset_K / drawn.sigma_N[:, None]) ** 2)
    before_N = torch.where(drawn.jitter_N, (drawn.order_N4 == CONTRAST).int().argmax(dim=1), 0)
    flags = [drawn.flip_N, drawn.jitter_N, drawn.gray_N, drawn.blur_N, drawn.solarize_N]
    # In at most eight parts: torch.compile makes a kernel for each part of a longer concatenation.
    parts = [
        box_N4, limits, torch.stack(flags, dim=1), before_N[:, None], drawn.order_N4, drawn.factor_N4,
        (taps_NK / taps_NK.sum(dim=1, keepdim=True))[:, BLUR_RADIUS:],
    ]  # fmt: skip
    unused = box_N4.new_zeros(len(box_N4), COLUMNS.value - sum(part.shape[1] for part in parts))
    return torch.cat([*(part.float() for part in parts), unused.float()], dim=1)


def triton_views(
    image: Tensor | BlockImages,
    table: Tensor,
    views: ViewsConfig,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    row_B: Tensor | None = None,
) -> Tensor:
    """(N, 3, size, size), normalized: N = count * B views of a batch, all first ones before all second ones.

    Args:
        image: uint8, (B, H, W, 3), or crops of the final size, (B, count, size, size, 3); or images in blocks.
        table: the parameters of the N views, from `parameter_table`.
        dtype, memory_format: of the result. For bf16 and fp16, pixels in between are fp16 in [0, 1].
        row_B: int64. If given, `image` holds more images, and image b of the batch is its row row_B[b].
    """
    source = image.blocks.contiguous().view(torch.int64) if isinstance(image, BlockImages) else image.contiguous()
    row_B = None if row_B is None else row_B.contiguous()
    size, count = views.size, len(table)
    crops = image.shape[1] if len(image.shape) == 5 else 1
    batch = len(image) if row_B is None else len(row_B)
    height, width = image.shape[-3:-1]
    across = triton.cdiv(size, TILE)
    tiles = across * across
    device = image.device
    between = torch.float32 if dtype == torch.float32 else torch.float16
    planes = torch.empty(count, 3, size, size, dtype=between, device=device)
    gray_sums = torch.empty(count, tiles, device=device)
    out = torch.empty(count, 3, size, size, dtype=dtype, device=device, memory_format=memory_format)
    step_C, step_P = (1, 3) if memory_format == torch.channels_last else (size * size, 1)
    mean, scale = ((*values, *values, *values)[:3] for values in (views.mean, [1 / std for std in views.std]))
    finish = (*mean, *scale, step_C, step_P)
    blurs = max(view.blur for view in (views.first, views.second)[: count // batch]) > 0
    with torch.cuda.device_of(source):  # Triton launches on the current device
        crop_kernel[(count * tiles,)](
            source, source if row_B is None else row_B, table, planes, gray_sums,
            batch, height, width, size, crops, isinstance(image, BlockImages), row_B is not None, TILE, **OPTIONS,
        )  # fmt: skip
        contrast_kernel[(count * tiles,)](
            planes, table, gray_sums, out, *finish, size, tiles, triton.next_power_of_2(tiles), TILE, **OPTIONS
        )
        if blurs:
            halfway = torch.empty(planes.shape, dtype=between, device=device)
            blur_columns_kernel[(count * 3 * tiles,)](planes, table, halfway, size, TILE, **OPTIONS)
            blur_rows_kernel[(count * tiles,)](halfway, table, out, *finish, size, TILE, **OPTIONS)
    return out
