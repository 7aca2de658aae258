"""Small synthetic images for tests."""

import io

import numpy as np
from PIL import Image


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Return a smooth random image, which JPEG changes by only a few grey levels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg_bytes(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()
