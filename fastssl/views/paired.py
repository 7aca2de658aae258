"""The augmented views of a batch, two or one, and the clean view: the chain from uint8 pixels to normalised floats."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.common.geometry import CENTER, crop_resize, eval_box
from fastssl.recipe import ViewsConfig
from fastssl.views import cpu, operations
from fastssl.views.parameters import Parameters, draw_boxes, draw_parameters, draw_uniforms, nothing_drawn


class PairedViews(nn.Module):
    """Crop + resize + flip, colour jitter, grayscale, blur, solarize, normalise; twice, independently.

    count=1 makes the first view alone, the same in every bit, and draws and computes nothing for a second.

    Every parameter is a function of (seed, epoch, sample index, view), so a view does not depend on the
    batch it comes in. The module holds no weights and is not compiled unless asked: torch.compile(views).
    """

    def __init__(self, views: ViewsConfig, seed: int = 0, count: Literal[1, 2] = 2):
        super().__init__()
        self.views = views
        self.seed = seed
        self.count = count

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """image uint8: (B, H, W, 3), cropped here, or (B, count, size, size, 3), cropped by the loader.

        index (B,): sample ids. height, width (B,): the source images' sizes, in whose pixels the crop
        is drawn; None: the stored image is the source.
        Returns `count` (B, 3, size, size) float32 tensors, normalised, on the image's device.
        """
        if image.ndim == 5 and image.shape[1] != self.count:
            raise ValueError(f"The loader cut {image.shape[1]} crops from each image for {self.count} views.")
        u_NU = draw_uniforms(self.seed, epoch, index, self.count)
        drawn = draw_parameters(u_NU, self.views, self.count)
        box_N4 = None if image.ndim == 5 else self._boxes(u_NU, image, height, width)
        if image.device.type == "cpu" and not torch.compiler.is_compiling():
            return cpu.make_views(image, box_N4, drawn, self.views).chunk(self.count)
        return portable_views(image, box_N4, drawn, self.views).chunk(self.count)

    def _boxes(self, u_NU: Tensor, image: Tensor, height: Tensor | None, width: Tensor | None) -> Tensor:
        """(N, 4) in pixels of the stored image, which may be a scaled copy of the source."""
        stored_h, stored_w = image.shape[1:3]
        ones = torch.ones(len(u_NU), dtype=torch.int64, device=image.device)
        height_N = ones * stored_h if height is None else height.repeat(self.count)
        width_N = ones * stored_w if width is None else width.repeat(self.count)
        scale_N4 = torch.stack([stored_h / height_N, stored_w / width_N] * 2, dim=1)
        return draw_boxes(u_NU, self.views, height_N, width_N) * scale_N4


def portable_views(image: Tensor, box_N4: Tensor | None, drawn: Parameters, views: ViewsConfig) -> Tensor:
    """The chain in torch operations, for any device and for torch.compile; what cpu.make_views computes."""
    jitter, count = views.jitter, len(drawn.flip_N) // len(image)
    only = (views.first, views.second)[:count]
    if box_N4 is None:
        x = to_unit_range(image.transpose(0, 1).flatten(0, 1))
        x = torch.where(drawn.flip_N[:, None, None, None], x.flip(3), x)
    else:
        image_index_N = torch.arange(len(image), device=image.device).repeat(count)
        x = crop_resize(image, image_index_N, box_N4, drawn.flip_N, views.size) / 255
    if jitter.p > 0:
        x = operations.color_jitter(x, drawn.jitter_N, drawn.order_N4, drawn.factor_N4, with_hue=jitter.hue > 0)
    if views.gray > 0:
        x = operations.grayscale(x, drawn.gray_N)
    if max(view.blur for view in only) > 0:
        x = operations.gaussian_blur(x, drawn.blur_N, drawn.sigma_N)
    if max(view.solarize for view in only) > 0:
        x = operations.solarize(x, drawn.solarize_N)
    return normalize(x, views)


def eval_transform(views: ViewsConfig) -> Callable[..., Tensor]:
    """The one transform of evaluation, as views.eval says, normalised.

    "squash": the whole image, resized to the square of views.size, as in the published code. "center": the central
    square of 7/8 of the shorter side, undistorted: the usual "resize to 256, centre crop of 224", in one resampling.

    The function returned maps (image, height=None, width=None) to (B, 3, size, size) float32 on the same device.
    image uint8: (B, H, W, 3), or (B, 1, size, size, 3), cut out by the loader. height, width (B,): the source images'
    sizes, in which the centre is square; None: the stored image is the source.
    """

    def clean(image: Tensor, height: Tensor | None = None, width: Tensor | None = None) -> Tensor:
        if image.ndim == 5:
            return normalize(to_unit_range(image[:, 0]), views)
        count, stored_h, stored_w = image.shape[:3]
        if views.eval == "squash" and (stored_h, stored_w) == (views.size, views.size):
            return normalize(to_unit_range(image), views)
        each = torch.arange(count, device=image.device)
        height_B = torch.full_like(each, stored_h) if height is None else height
        width_B = torch.full_like(each, stored_w) if width is None else width
        scale_B4 = torch.stack([stored_h / height_B, stored_w / width_B] * 2, dim=1)
        box_B4 = eval_box(height_B, width_B, views.eval) * scale_B4
        if image.device.type == "cpu":
            return cpu.make_views(image, box_B4, nothing_drawn(count), views)
        x = crop_resize(image, each, box_B4, torch.zeros_like(each, dtype=torch.bool), views.size) / 255
        return normalize(x, views)

    return clean


def describe_eval_transform(views: ViewsConfig) -> dict:
    """What `eval_transform` does to an RGB image in [0, 1], for programs without fastssl; values that JSON knows.

    kind "squash": the whole image becomes a square of `size` pixels, whatever its aspect ratio. "center": its central
    square of `share` of the shorter side does.
    """
    return {
        "kind": views.eval,
        "size": views.size,
        **({"share": CENTER} if views.eval == "center" else {}),
        "interpolation": "bilinear",
        "antialias": True,  # along an axis that shrinks
        "mean": list(views.mean),
        "std": list(views.std),
    }


def to_unit_range(image_BHWC: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


def normalize(x: Tensor, views: ViewsConfig) -> Tensor:
    mean = torch.tensor(views.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(views.std, device=x.device).view(1, 3, 1, 1)
    return (x - mean) / std


def unnormalize(x: Tensor, views: ViewsConfig) -> Tensor:
    """Back to [0, 1], for pictures."""
    mean = torch.tensor(views.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(views.std, device=x.device).view(1, 3, 1, 1)
    return (x * std + mean).clamp(0, 1)
