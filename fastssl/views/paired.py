"""Two augmented views of a batch, and the clean view: the chain from uint8 pixels to normalised floats."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastssl.recipe import Views

from . import operations
from .parameters import draw_boxes, draw_parameters, draw_uniforms
from .resample import resample, resize_matrix


class PairedViews(nn.Module):
    """Crop + resize + flip, colour jitter, grayscale, blur, solarize, normalise; twice, independently.

    Every parameter is a function of (seed, epoch, sample index, view), so a view does not depend on the
    batch it comes in. The module holds no weights and is not compiled unless asked: torch.compile(views).
    """

    def __init__(self, views: Views, seed: int = 0):
        super().__init__()
        self.views = views
        self.seed = seed

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image uint8: (B, H, W, 3), cropped here, or (B, 2, size, size, 3), cropped by the loader.

        index (B,): sample ids. height, width (B,): the source images' sizes, in whose pixels the crop
        is drawn; None: the stored image is the source.
        Returns two (B, 3, size, size) float32 tensors, normalised, on the image's device.
        """
        cropped = image.ndim == 5
        if height is None and not cropped:
            height = torch.full_like(index, image.shape[1])
            width = torch.full_like(index, image.shape[2])
        return tuple(
            self._one_view(image[:, view] if cropped else image, index, epoch, height, width, view, cropped)
            for view in (0, 1)
        )

    def _one_view(self, image_BHWC, index, epoch, height, width, view: int, cropped: bool) -> Tensor:
        views, own = self.views, (self.views.first, self.views.second)[view]
        u_BN = draw_uniforms(self.seed, epoch, index, view)
        drawn = draw_parameters(u_BN, views, view)

        x = to_unit_range(image_BHWC)
        if cropped:
            x = torch.where(drawn.flip_N[:, None, None, None], x.flip(3), x)
        else:
            x = self._crop(x, draw_boxes(u_BN, views, height, width), height, width, drawn.flip_N)
        if views.jitter.p > 0:
            x = operations.color_jitter(
                x, drawn.jitter_N, drawn.order_N4, drawn.factor_N4, with_hue=views.jitter.hue > 0
            )
        if views.gray > 0:
            x = operations.grayscale(x, drawn.gray_N)
        if own.blur > 0:
            x = operations.gaussian_blur(x, drawn.blur_N, drawn.sigma_N)
        if own.solarize > 0:
            x = operations.solarize(x, drawn.solarize_N)
        return normalize(x, views)

    def _crop(self, x: Tensor, box_B4: Tensor, height: Tensor, width: Tensor, flip_B: Tensor) -> Tensor:
        """Cut boxes given in source pixels out of the stored images, which may be scaled copies."""
        stored_h, stored_w = x.shape[2:]
        top, left, box_h, box_w = box_B4.unbind(1)
        y, x_ = stored_h / height, stored_w / width
        rows = resize_matrix(top * y, box_h * y, torch.zeros_like(flip_B), stored_h, self.views.size)
        columns = resize_matrix(left * x_, box_w * x_, flip_B, stored_w, self.views.size)
        return resample(x, rows, columns)


def clean_view(views: Views) -> Callable[[Tensor], Tensor]:
    """The one transform of evaluation: the whole image, resized to the square of views.size, normalised.

    The function returned maps (B, H, W, 3) uint8 to (B, 3, size, size) float32 on the same device.
    """

    def clean(image_BHWC: Tensor) -> Tensor:
        x = to_unit_range(image_BHWC)
        if x.shape[2:] != (views.size, views.size):
            rows, columns = (_whole(side, views.size, x.device) for side in x.shape[2:])
            x = resample(x, rows, columns)
        return normalize(x, views)

    return clean


def _whole(side: int, size: int, device: torch.device) -> Tensor:
    """(1, size, side): resize a whole axis."""
    zero = torch.zeros(1, device=device)
    return resize_matrix(zero, zero + side, zero.bool(), side, size)


def to_unit_range(image_BHWC: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


def normalize(x: Tensor, views: Views) -> Tensor:
    mean = torch.tensor(views.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(views.std, device=x.device).view(1, 3, 1, 1)
    return (x - mean) / std


def unnormalize(x: Tensor, views: Views) -> Tensor:
    """Back to [0, 1], for pictures."""
    mean = torch.tensor(views.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(views.std, device=x.device).view(1, 3, 1, 1)
    return (x * std + mean).clamp(0, 1)
