"""Which kernels make the views on a GPU: Triton's or torch operations (views.kernel)."""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastssl.beton.format import RGB
from fastssl.common.errors import UserError, in_short
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import ViewsConfig
from fastssl.views.parameters import Parameters

# How far a value may be from the oracle's: a gray level, before it is divided by std, and what bf16 rounds.
TOLERANCE, ROUNDING = 1 / 255, 2**-8
TOLERATED_SHARE = 1e-3  # of a view's values that may be further away: pixels at the threshold of solarize
COMPARED_IMAGES = 32  # at once: the torch chain takes 20 MB for each of 224 px


class TritonChoice:
    """Decides whether Triton's kernels make the views. With "auto", the first batch on a GPU is made by both."""

    def __init__(self, kernel: Literal["auto", "triton", "torch"]):
        self.kernel = kernel
        self.works: dict[bool, bool] = {}  # images in blocks or not -> whether the kernels do; empty: not known yet

    def takes(self, stored: Tensor | BlockImages, compare: Callable[[], str | None]) -> bool:
        """Whether Triton's kernels make the views of these images.

        compare: called at most once for pixels, and once for blocks, which another kernel reads. Returns in what
            Triton's views differ from those of the torch chain, if they do.

        Raises:
            UserError: for views.kernel=triton with images that are not RGB.
        """
        if self.kernel == "torch" or not on_gpu(stored):
            return False
        if stored.shape[-1] != RGB:
            if self.kernel == "triton":
                raise UserError("views.kernel=triton makes views of RGB images only", hint="leave out views.kernel")
            return False
        in_blocks = isinstance(stored, BlockImages)
        if self.kernel == "auto" and in_blocks not in self.works:
            difference = compare()
            self.works[in_blocks] = difference is None
            if difference:
                warnings.warn(
                    f"Triton's kernels for the views are not used: {difference}. Torch operations make the same views, "
                    "more slowly (views.kernel=torch leaves out this check).",
                    stacklevel=2,
                )
        return self.kernel == "triton" or self.works[in_blocks]


def on_gpu(stored: Tensor | BlockImages) -> bool:
    # Within torch.compile the torch operations are what can be compiled.
    return stored.is_cuda and not torch.compiler.is_compiling()


def find_difference(
    by_triton: Callable[[], Tensor],
    by_torch: Callable[[slice], Tensor],
    drawn: Parameters[Tensor],
    batch: int,
    views: ViewsConfig,
) -> str | None:
    """Compare the views of a batch by Triton's kernels with those of the torch chain.

    Args:
        by_triton: makes all N views.
        by_torch: makes the views of some of the images; of all at once they would take too much memory.
        drawn: the parameters of the N views.
        batch: the number of images.

    Returns:
        What differs by more than rounding, as the reason in a sentence; None if nothing does.
    """
    try:
        made_N = by_triton()
        if made_N.is_cuda:
            torch.cuda.synchronize(made_N.device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # torch operations would not run either
        raise
    except Exception as error:  # missing compilers and unknown devices raise errors of many types
        return f"they do not run here ({in_short(error)})"
    made = made_N.unflatten(0, (-1, batch))
    differs = torch.zeros(made.shape[:2], dtype=torch.bool, device=made.device)
    largest = torch.zeros((), device=made.device)
    tolerance = TOLERANCE / min(views.std)
    for first in range(0, batch, COMPARED_IMAGES):
        images = slice(first, min(first + COMPARED_IMAGES, batch))
        part = made[:, images]
        want = by_torch(images).view_as(part)
        distance = (part.float() - want).abs()
        # NaN is not within the tolerance either.
        wrong = ~(distance <= tolerance + ROUNDING * want.abs())
        differs[:, images] = wrong.float().flatten(2).mean(dim=2) > TOLERATED_SHARE
        largest = torch.maximum(largest, distance.max())
    if not differs.any():
        return None
    kinds = ("flip", "jitter", "gray", "blur", "solarize")
    common = [kind for kind in kinds if getattr(drawn, f"{kind}_N")[differs.flatten()].all()]
    return (
        f"{int(differs.sum())} of {len(made_N)} differ from the torch chain's by up to {largest:.3g} "
        f"(all of these drew: {', '.join(common) or 'no operation in common'})"
    )
