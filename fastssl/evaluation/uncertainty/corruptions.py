"""Corrupt images in four ways at five strengths each, and embed them.

Blur, noise and JPEG are three of the corruptions of Hendrycks and Dietterich (arXiv 1903.12261), with strengths between
theirs for 32 and for 224 px. That a part of an image should be more uncertain than the whole is a test of the URL
benchmark (Kirchhof et al., arXiv 2307.03810), whose crops are central; these may be anywhere.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastssl.beton.format import RGB
from fastssl.common.randomness import CORRUPTION, normals, uniforms
from fastssl.evaluation.features import in_fp32
from fastssl.loading import Batch
from fastssl.models import Model
from fastssl.models.encoder_only import EncoderOnly
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import ViewsConfig
from fastssl.views import eval_transform

Corruption = Literal["blur", "noise", "jpeg", "crop"]
# From weak to strong. Blur and crop scale with the size of the image; noise and JPEG act on single pixels.
CORRUPTIONS: dict[Corruption, tuple[float, ...]] = {
    "blur": (0.015, 0.025, 0.035, 0.05, 0.07),  # standard deviation of the Gaussian, as a share of each side
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, where black is 0 and white 1
    "jpeg": (80, 50, 30, 15, 7),  # quality, with halved color resolution
    "crop": (0.75, 0.5, 0.35, 0.2, 0.1),  # share of the area; the shape is the image's
}
# Every version of an image that is embedded: the original (no corruption), then each corruption at each strength.
VERSIONS: list[tuple[Corruption | None, float]] = [
    (None, 0.0),
    *((name, strength) for name, strengths in CORRUPTIONS.items() for strength in strengths),
]
# Purposes of the random numbers.
PICK, NOISE, CROP = range(3)
NOISE_ELEMENTS = 1 << 22  # numbers of noise drawn at a time


def some_images(index_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return sorted rows of at most `count` random images, as a function of their ids and the seed only."""
    u_N = uniforms(seed, PICK, torch.from_numpy(np.array(index_N)), 0, 1, CORRUPTION)[:, 0].numpy()
    return np.sort(np.argsort(u_N, kind="stable")[:count])


def corrupt(
    image_BHWC: np.ndarray, index_B: np.ndarray, name: Corruption, strength: float, seed: int = 0
) -> np.ndarray:
    """Corrupt uint8 images of one size; all keep their size except crops.

    Randomness is a function of the seed and the image's id only. It does not depend on the strength either: a stronger
    noise is a multiple of a weaker one, and a smaller crop lies inside a larger one.

    Args:
        image_BHWC: the images, of any number of channels.
        index_B: their ids.
        name: a key of `CORRUPTIONS`.
        strength: one of `CORRUPTIONS[name]`.
        seed: of noise and crops.
    """
    if name == "noise":
        return _add_noise(image_BHWC, index_B, strength, seed)
    if name == "crop":
        return _crop(image_BHWC, index_B, strength, seed)
    corrupt_one = _blur if name == "blur" else _compress
    return np.stack([corrupt_one(image_HWC, strength) for image_HWC in image_BHWC])


def _blur(image_HWC: np.ndarray, share: float) -> np.ndarray:
    # Imported here because the kNN probe of a training run does not need it.
    import cv2

    height, width = image_HWC.shape[:2]
    blurred = cv2.GaussianBlur(image_HWC, (0, 0), sigmaX=share * width, sigmaY=share * height)
    return np.asarray(blurred).reshape(image_HWC.shape)  # cv2 drops the axis of a single channel


def _compress(image_HWC: np.ndarray, quality: float) -> np.ndarray:
    import cv2

    # cv2 expects channels in the order blue, green, red. Colors are reversed and back, so JPEG weighs them correctly.
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    options = [cv2.IMWRITE_JPEG_QUALITY, int(quality), *sampling]
    if image_HWC.shape[2] != RGB:  # JPEG has no such images: each channel is compressed as a gray one
        planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(image_HWC, 2, 0)]
        contents = [cv2.imencode(".jpg", plane, options)[1] for plane in planes]
        return np.stack([np.asarray(cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)) for content in contents], 2)
    content = cv2.imencode(".jpg", image_HWC[..., ::-1], options)[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR))[..., ::-1]


def _add_noise(image_BHWC: np.ndarray, index_B: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    values = image_BHWC[0].size
    rows = max(1, NOISE_ELEMENTS // values)
    noisy_BHWC = np.empty_like(image_BHWC)
    for first in range(0, len(image_BHWC), rows):
        part = slice(first, first + rows)
        noise_RN = normals(seed, NOISE, torch.from_numpy(np.array(index_B[part])), 0, 1, values, CORRUPTION)[0].numpy()
        noisy_RHWC = image_BHWC[part] + 255 * np.float32(deviation) * noise_RN.reshape(image_BHWC[part].shape)
        noisy_BHWC[part] = noisy_RHWC.round().clip(0, 255)
    return noisy_BHWC


def _crop(image_BHWC: np.ndarray, index_B: np.ndarray, share: float, seed: int) -> np.ndarray:
    sides = np.array(image_BHWC.shape[1:3])
    height, width = np.maximum(1, np.round(np.sqrt(share) * sides)).astype(int)
    u_B2 = uniforms(seed, CROP, torch.from_numpy(np.array(index_B)), 0, 2, CORRUPTION).numpy()
    corner_B2 = np.round(u_B2 * (sides - (height, width))).astype(int)
    return np.stack([x[top : top + height, left : left + width] for x, (top, left) in zip(image_BHWC, corner_B2)])


@torch.inference_mode()
def embed_versions(
    model: Model | EncoderOnly, loader: Iterable[Batch], views: ViewsConfig, seed: int, advance: Callable[[int], object]
) -> np.ndarray:
    """Embed all `VERSIONS` of the N images of a loader.

    The stored image is corrupted, before the evaluation transform. Where the loader has cropped the view already (files
    with images of several sizes), that crop is corrupted. All versions of a batch have the same shape, so equal pixels
    give equal numbers.

    Returns:
        The mean of sigma over dimensions (V, N) float64 or, for a deterministic encoder, h (V, N, D) float32.
    """
    parts_V: list[list[np.ndarray]] = [[] for _ in VERSIONS]
    with evaluating(model):
        for batch in loader:
            image = batch.pixels()
            sizes: tuple[Tensor, ...] = (batch.height, batch.width)
            transform = eval_transform(views)
            if image.ndim == 5:  # (B, 1, H, W, 3): cropped already, so only resized from here on
                image = image[:, 0]
                sizes = ()
                transform = eval_transform(views.model_copy(update={"eval": "squash"}))
            image_BHWC, index_B, valid_B = (x.cpu().numpy() for x in (image, batch.index, batch.valid))
            for (name, strength), parts in zip(VERSIONS, parts_V):
                version = image_BHWC if name is None else corrupt(image_BHWC, index_B, name, strength, seed)
                with in_fp32(image.device):
                    embedding = model.embed(transform(torch.from_numpy(version).to(image.device), *sizes))
                x = embedding.h.float() if embedding.sigma is None else embedding.sigma.double().mean(dim=1)
                parts.append(x.cpu().numpy()[valid_B])
                advance(int(valid_B.sum()))
    return np.stack([np.concatenate(parts) for parts in parts_V])
