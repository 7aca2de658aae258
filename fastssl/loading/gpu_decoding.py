"""A batch's JPEGs to its crops on the GPU: torchvision's nvJPEG decoder, then both crops from full resolution.

The CPU only copies compressed bytes. Experimental: written against torchvision's interface and tested with
its CPU decoder in place of nvJPEG; records/gpu-pending.md says what is still to be measured.
"""

import io
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from fastssl.beton.format import RAW
from fastssl.common.errors import UserError
from fastssl.common.geometry import crop_resize
from fastssl.loading import kernels
from fastssl.loading.decoding import Crop, Decoded
from fastssl.loading.samples import Samples
from fastssl.recipe import ViewsConfig

ROOM = 1 << 26  # values in the largest intermediate result of cropping, 256 MB


class Bytes(NamedTuple):
    """A batch on its way: compressed bytes, and the boxes to cut out (None: the whole stored image)."""

    rows_B: np.ndarray
    jpegs: list[Tensor]
    box_BV4: np.ndarray | None


class GpuDecoder:
    """The same images as ThreadDecoder's, within the rounding of another JPEG decoder.

    Raises UserError where the file holds pixels in place of JPEGs, or the device cannot decode.
    """

    def __init__(
        self,
        samples: Samples,
        crop: Crop,
        views: ViewsConfig | None,
        seed: int,
        device: torch.device,
        crops: Literal[1, 2] = 2,
    ) -> None:
        self.samples, self.crop, self.views, self.seed, self.device = samples, crop, views, seed, device
        self.crops = crops
        if (samples.mode_N == RAW).any():
            raise UserError(f"data.decode=gpu needs JPEGs, but {samples.path} stores pixels: set data.decode=cpu.")
        probe = io.BytesIO()
        Image.new("RGB", (16, 16)).save(probe, "JPEG")
        try:
            self._decode([torch.frombuffer(bytearray(probe.getvalue()), dtype=torch.uint8)])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"data.decode=gpu cannot work here ({reason}): set data.decode=cpu.") from error

    def start(self, rows_B: np.ndarray, epoch: int) -> Bytes:
        jpegs = [torch.from_numpy(np.array(self.samples.stored(row))) for row in rows_B]
        if self.crop == "gpu":
            return Bytes(rows_B, jpegs, None)
        if self.crop == "eval":
            return Bytes(rows_B, jpegs, self.samples.eval_boxes(rows_B, self.views))
        boxes = self.samples.crop_boxes(rows_B, self.seed, epoch, self.views, self.crops)
        return Bytes(rows_B, jpegs, boxes)

    def finish(self, batch: Bytes) -> Decoded:
        shape_B2 = self.samples.shape_N2[batch.rows_B]
        images = self._decode_each(batch.jpegs)
        status_B = np.full(len(images), kernels.DECODED, np.int8)
        for b, image in enumerate(images):
            if image is None or image.shape[1:] != tuple(shape_B2[b]):
                status_B[b] = kernels.FAILED
                images[b] = torch.zeros(3, *shape_B2[b].tolist(), dtype=torch.uint8, device=self.device)
        if batch.box_BV4 is None:
            return Decoded(torch.stack(images).permute(0, 2, 3, 1), status_B)
        return Decoded(self._crops(images, torch.from_numpy(batch.box_BV4).to(self.device)), status_B)

    def cancel(self, batch: Bytes) -> None:
        """Nothing runs yet."""

    def close(self) -> None:
        """No threads to end."""

    def _decode(self, jpegs: list[Tensor]) -> list[Tensor]:
        return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=self.device)

    def _decode_each(self, jpegs: list[Tensor]) -> list[Tensor | None]:
        """One bad image fails torchvision's whole batch: then each for itself, None for the bad ones."""
        try:
            return self._decode(jpegs)
        except RuntimeError:
            pass
        images = []
        for jpeg in jpegs:
            try:
                images += self._decode([jpeg])
            except RuntimeError:
                images.append(None)
        return images

    def _crops(self, images: list[Tensor], box_BV4: Tensor) -> Tensor:
        """(B, V, size, size, 3) uint8. Images of several sizes are laid into one tensor, some at a time."""
        size, views = self.views.size, box_BV4.shape[1]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        at_once = max(1, ROOM // (views * size * width * 3))
        parts = []
        for first in range(0, len(images), at_once):
            some = images[first : first + at_once]
            padded = torch.zeros(len(some), height, width, 3, dtype=torch.uint8, device=self.device)
            for b, image in enumerate(some):
                padded[b, : image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)
            image_index_N = torch.arange(len(some), device=self.device).repeat_interleave(views)
            boxes = box_BV4[first : first + at_once].flatten(0, 1)
            cut = crop_resize(padded, image_index_N, boxes, torch.zeros_like(image_index_N, dtype=torch.bool), size)
            parts.append((cut + 0.5).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (len(some), views)))
        return torch.cat(parts).contiguous()
