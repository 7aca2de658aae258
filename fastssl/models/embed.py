"""What `model.embed` takes: tensors after the evaluation transform, checked; or image files, images and pixels.

The latter are converted as the images that the model was trained on (loading/image_files.py) and transformed here.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.beton.images import Encoded, encode_all
from fastssl.common.system import available_cores
from fastssl.loading.image_files import decode_batch, find_conversion
from fastssl.models.encoder import has_fixed_size
from fastssl.models.interface import Embedding
from fastssl.recipe import Recipe
from fastssl.views import eval_transform

if TYPE_CHECKING:
    from fastssl.models.build import Model

BATCH_SIZE = 256
# Times the largest value that the evaluation transform can give: noise on images stays below, pixels of 0..255 do not.
SLACK = 4

# A path of an image file, an image that Pillow has opened, or uint8 pixels (H, W) or (H, W, 3).
ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray


def check_input(images: Tensor, recipe: Recipe) -> None:
    """Refuse a tensor that `fastssl.views.eval_transform` of this recipe cannot have made.

    Values are checked on the CPU only: on a GPU, the host would wait for them.

    Raises:
        TypeError: the tensor is not of floats.
        ValueError: its shape is not (B, channels, H, W), H and W are not those of a backbone of one size, or values are
            not finite or far from normalized ones.
    """
    views = recipe.views
    channels, shape = recipe.model.in_chans, tuple(images.shape)
    pixels = f"uint8 pixels (B, H, W, {channels})"
    fix = f"apply fastssl.views.eval_transform(recipe.views) to {pixels}, or give a list of paths"
    if not images.is_floating_point():
        raise TypeError(f"embed takes a tensor of normalized floats, not of {images.dtype}: {fix}.")
    if images.ndim != 4 or shape[1] != channels:
        one = " (images[None] makes a batch of one image)" if images.ndim == 3 else ""
        raise ValueError(f"embed takes a tensor (B, {channels}, H, W), not {shape}{one}: {fix}.")
    if shape[2:] != (views.size, views.size) and has_fixed_size(recipe.model.backbone):
        raise ValueError(
            f"{recipe.model.backbone} was built for images of {views.size} x {views.size} px, not {shape[2]} x "
            f"{shape[3]}: {fix}."
        )
    if images.device.type != "cpu" or images.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (float(x) for x in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("embed got values that are not finite: check what made the tensor.")
    largest = max(max(mean, 1 - mean) / std for mean, std in np.broadcast(views.mean, views.std))
    if max(-low, high) > SLACK * largest:
        raise ValueError(
            f"embed takes normalized values, at most about {largest:.3g}, and got {low:.4g} to {high:.4g}: {fix}."
        )


def embed_files(model: "Model", images: Sequence[ImageLike]) -> Embedding:
    """Embed paths, images of Pillow or pixels, in batches. See `SSLModel.embed`."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise TypeError("embed takes a list of images: put the one that you have into a list.")
    if len(images) == 0:
        raise ValueError("embed got an empty list of images.")
    parts = [model.embed(batch) for batch in _input_batches(images, model.recipe, next(model.parameters()).device)]
    first = parts[0]
    mu, sigma = (
        torch.cat([cast(Tensor, getattr(part, name)) for part in parts]) if first.space is not None else None
        for name in ("mu", "sigma")
    )
    return Embedding(torch.cat([part.h for part in parts]), mu, sigma, first.space)


def _input_batches(images: Sequence[ImageLike], recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Yield the images after the evaluation transform, (B, C, size, size)."""
    conversion = find_conversion(recipe.data.train, recipe.views, recipe.model.in_chans)
    if not conversion.is_recorded:
        warnings.warn(conversion.reason, stacklevel=2)
    transform = eval_transform(recipe.views)
    pillow_limit = Image.MAX_IMAGE_PIXELS  # which encode_all sets
    try:
        # Pillow and turbojpeg decode without the GIL.
        with ThreadPoolExecutor(available_cores()) as threads:
            for first in range(0, len(images), BATCH_SIZE):
                chunk = [_checked(image) for image in images[first : first + BATCH_SIZE]]
                results = [
                    result for (result,) in threads.map(lambda image: encode_all([image], conversion.plan), chunk)
                ]
                for number, (image, result) in enumerate(zip(chunk, results), first):
                    if isinstance(result, str):
                        name = f" ({image})" if isinstance(image, str | Path) else ""
                        raise ValueError(f"Image {number}{name} is bad: {result}.")
                encoded = cast(list[Encoded], results)
                batch = decode_batch(encoded, range(first, first + len(encoded)), conversion.plan, recipe.views, device)
                yield transform(batch.image, batch.height, batch.width)
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _checked(image: object) -> ImageLike:
    if not isinstance(image, str | Path | Image.Image | np.ndarray):
        raise TypeError(f"embed takes paths, images of Pillow or uint8 arrays (H, W, 3), not {type(image).__name__}.")
    return image
