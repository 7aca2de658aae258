"""Intermediate layers of the encoder, averaged over positions: features for detectors that look at several layers."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.evaluation.arrays import Advance
from fastssl.evaluation.features import (
    Features,
    check_finite,
    eval_input,
    in_fp32,
    load_or_compute_features,
    valid_rows,
)
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import Batch, BetonLoader
from fastssl.models.ssl_model import evaluating
from fastssl.views import describe_eval_transform

# As many as timm's ResNets have (the stem and four stages); of a ViT's blocks, as many in equal steps up to the last.
MAX_LAYERS = 5
# Images whose layers are held at a time: 9 MB each with a ResNet-50 at 224 px.
CHUNK_IMAGES = 64


def has_layers(encoder: nn.Module) -> bool:
    """Whether timm can return the intermediate layers of this backbone."""
    return hasattr(encoder, "forward_intermediates")


def layer_means(encoder: nn.Module, images_BCHW: Tensor) -> list[Tensor]:
    """Return up to five layers of a timm backbone, from the first to the last, each (B, channels).

    Layers are what `encoder.forward_intermediates` returns: the stem and the stages of a ResNet, the blocks of a ViT
    without their class token. Each is averaged over all positions, as in Lee et al. (arXiv 1807.03888).
    """
    chunks = []
    for part_BCHW in images_BCHW.split(CHUNK_IMAGES):
        maps = encoder.forward_intermediates(part_BCHW, intermediates_only=True)  # type: ignore[operator]
        count = min(len(maps), MAX_LAYERS)
        chosen = [maps[(i + 1) * len(maps) // count - 1] for i in range(count)]
        chunks.append([map_BCHW.mean(dim=(2, 3)) for map_BCHW in chosen])
    return [torch.cat(parts) for parts in zip(*chunks)]


def layers_of_batch(encoder: RunEncoder, batch: Batch) -> list[np.ndarray]:
    """Return the layers of the valid images of a batch under the evaluation transform, each (B, channels) float32."""
    with evaluating(encoder.model), in_fp32(batch.index.device), torch.inference_mode():
        layers = layer_means(encoder.model.encoder, eval_input(encoder.recipe.views)(batch))
    return [valid_rows(layer_BC, batch) for layer_BC in layers]


def cached_layers(encoder: RunEncoder, data: BetonSubset) -> list[np.ndarray]:
    """Return the layers of all images of a .beton, each (N, channels), cached in RUN/features/ as one array.

    Raises:
        UserError: as `cached_features`.
    """
    views, in_chans = encoder.recipe.views, encoder.recipe.model.in_chans
    with evaluating(encoder.model), torch.inference_mode():
        one_image = torch.zeros(1, in_chans, views.size, views.size, device=encoder.device)
        widths = [layer_BC.shape[1] for layer_BC in layer_means(encoder.model.encoder, one_image)]

    def side_by_side(loader: BetonLoader, advance: Advance) -> Iterator[Features]:
        for batch in loader:
            layers_BD = np.concatenate(layers_of_batch(encoder, batch), axis=1)
            yield Features(layers_BD, valid_rows(batch.label, batch), valid_rows(batch.index, batch))
            advance(len(layers_BD))

    features = load_or_compute_features(
        encoder,
        data,
        {"view": describe_eval_transform(views), "layers": MAX_LAYERS},
        f"layers of {data.path}",
        lambda loader, advance: check_finite(side_by_side(loader, advance), data.path, "float32"),
        fits=lambda found: found.h.shape[1:] == (sum(widths),),
    )
    return np.split(features.h, np.cumsum(widths)[:-1], axis=1)
