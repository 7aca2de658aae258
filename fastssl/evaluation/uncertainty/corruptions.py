"""Images made worse in four ways at five strengths each, and what an encoder makes of them.

Blur, noise and JPEG are three of the corruptions of Hendrycks and Dietterich (arXiv 1903.12261), at strengths between
theirs for 32 and for 224 px. That a part of an image should be less certain than its whole is what the URL benchmark
asks (Kirchhof et al., arXiv 2307.03810); its crops are central, these anywhere.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch

from fastssl.common.randomness import CORRUPTION, normals, uniforms
from fastssl.evaluation.features import in_fp32
from fastssl.loading import Batch
from fastssl.models import Model
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import ViewsConfig
from fastssl.views import eval_transform

Corruption = Literal["blur", "noise", "jpeg", "crop"]
# From weak to strong. Only those of the noise and of JPEG do not scale with the image: both are about single pixels.
CORRUPTIONS: dict[Corruption, tuple[float, ...]] = {
    "blur": (0.015, 0.025, 0.035, 0.05, 0.07),  # standard deviation of the Gaussian, as a share of each side
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, where black is 0 and white 1
    "jpeg": (80, 50, 30, 15, 7),  # quality, with halved colour resolution
    "crop": (0.75, 0.5, 0.35, 0.2, 0.1),  # share of the area; the shape is the image's
}
# Every version of an image that is embedded: the original (no corruption), then each corruption at each strength.
VERSIONS: list[tuple[Corruption | None, float]] = [
    (None, 0.0),
    *((name, strength) for name, strengths in CORRUPTIONS.items() for strength in strengths),
]
PICK, NOISE, PLACE = range(3)  # what a random number is for
NOISE_ELEMENTS = 1 << 22  # drawn at a time


def some_images(index_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows, ascending, of at most `count` images: those whose ids have the smallest random numbers."""
    u_N = uniforms(seed, PICK, torch.from_numpy(np.array(index_N)), 0, 1, CORRUPTION)[:, 0].numpy()
    return np.sort(np.argsort(u_N, kind="stable")[:count])


def corrupt(
    image_BHWC: np.ndarray, index_B: np.ndarray, name: Corruption, strength: float, seed: int = 0
) -> np.ndarray:
    """uint8 images of one size, with the ids index_B, made worse; strength is one of CORRUPTIONS[name].

    The same size comes back, of a crop its own. What is random is a function of (seed, id), not of other images. Nor
    is it one of the strength: a stronger noise is a multiple of a weaker one, a smaller crop lies in a larger one.
    """
    if name == "noise":
        return _noisy(image_BHWC, index_B, strength, seed)
    if name == "crop":
        return _cropped(image_BHWC, index_B, strength, seed)
    return np.stack([(_blurred if name == "blur" else _as_jpeg)(image, strength) for image in image_BHWC])


def _blurred(image_HWC: np.ndarray, share: float) -> np.ndarray:
    import cv2  # here, as training's probe needs nothing of it

    height, width = image_HWC.shape[:2]
    return cv2.GaussianBlur(image_HWC, (0, 0), sigmaX=share * width, sigmaY=share * height)


def _as_jpeg(image_HWC: np.ndarray, quality: float) -> np.ndarray:
    import cv2

    # cv2 takes the channels for blue, green, red: turned around and back, so that each is weighed as it should.
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    content = cv2.imencode(".jpg", image_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality), *sampling])[1]
    return cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1]


def _noisy(image_BHWC: np.ndarray, index_B: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    numbers = image_BHWC[0].size
    rows, made = max(1, NOISE_ELEMENTS // numbers), []
    for first in range(0, len(image_BHWC), rows):
        part_RHWC = image_BHWC[first : first + rows]
        index_R = torch.from_numpy(np.array(index_B[first : first + rows]))
        noise_RN = normals(seed, NOISE, index_R, 0, 1, numbers, CORRUPTION)[0].numpy()
        noisy_RHWC = part_RHWC + 255 * np.float32(deviation) * noise_RN.reshape(part_RHWC.shape)
        made.append(noisy_RHWC.round().clip(0, 255).astype(np.uint8))
    return np.concatenate(made)


def _cropped(image_BHWC: np.ndarray, index_B: np.ndarray, share: float, seed: int) -> np.ndarray:
    sides = np.array(image_BHWC.shape[1:3])
    height, width = np.maximum(1, np.round(np.sqrt(share) * sides)).astype(int)
    u_B2 = uniforms(seed, PLACE, torch.from_numpy(np.array(index_B)), 0, 2, CORRUPTION).numpy()
    corner_B2 = np.round(u_B2 * (sides - (height, width))).astype(int)
    return np.stack([x[top : top + height, left : left + width] for x, (top, left) in zip(image_BHWC, corner_B2)])


@torch.inference_mode()
def embed_versions(
    model: Model,
    loader: Iterable[Batch],
    views: ViewsConfig,
    seed: int,
    *,
    advance: Callable[[int], object] = lambda images: None,
) -> np.ndarray:
    """Of every version, in the order of VERSIONS, of the loader's N images: the mean over dimensions of sigma, (V, N)
    float64, or where the model gives none h, (V, N, D) float32.

    What is stored is corrupted before the clean view; where the loader has cut out the view's part, that part. All
    versions of a batch go through the model in the same shape, so equal pixels give equal numbers. `advance` is told of
    images embedded, len(VERSIONS) for each.
    """
    found = [[] for _ in VERSIONS]
    with evaluating(model):
        for batch in loader:
            image, sizes, view = batch.image, (batch.height, batch.width), eval_transform(views)
            if image.ndim == 5:  # cut out already: from here on all of it is looked at
                image, sizes = image[:, 0], ()
                view = eval_transform(views.model_copy(update={"eval": "squash"}))
            image_BHWC, index_B, valid_B = (x.cpu().numpy() for x in (image, batch.index, batch.valid))
            for (name, strength), parts in zip(VERSIONS, found):
                version = image_BHWC if name is None else corrupt(image_BHWC, index_B, name, strength, seed)
                with in_fp32(image.device):
                    embedding = model.embed(view(torch.from_numpy(version).to(image.device), *sizes))
                x = embedding.h.float() if embedding.sigma is None else embedding.sigma.double().mean(dim=1)
                parts.append(x.cpu().numpy()[valid_B])
                advance(int(valid_B.sum()))
    return np.stack([np.concatenate(parts) for parts in found])
