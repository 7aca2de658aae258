"""The augmented views of a batch, and the evaluation transform: from uint8 pixels or blocks to normalized floats.

`torch_views` is the readable chain: the oracle of the fast kernels, and what runs where they do not. On a CPU the same
chain runs in `cpu.cpu_views`, a kernel that is twenty times as fast as compiled torch operations; on a GPU in
`gpu.triton_views`, which moves a fifteenth of their bytes.
"""

from functools import lru_cache, partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fastssl.beton.format import RGB
from fastssl.common.geometry import CENTER, crop_box, eval_box
from fastssl.loading import ImageRows
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import PerViewConfig, ViewsConfig
from fastssl.views import operations
from fastssl.views.cpu import cpu_views
from fastssl.views.kernel_choice import TritonChoice, find_difference
from fastssl.views.operations import crop_to_unit_range, normalize, to_unit_range
from fastssl.views.parameters import Parameters, draw_parameters, draw_uniforms, no_augmentation


class PairedViews(nn.Module):
    """Two independent augmentations: crop, resize, flip, color jitter, grayscale, blur, solarize, normalize.

    Every parameter is a function of (seed, epoch, sample index, view), so a view does not depend on the batch that it
    is in. The module holds no weights.

    Args:
        views: the recipe's section; views.kernel is about GPUs.
        count: 1 makes the first view only, bit for bit the same as with 2.
        dtype, memory_format: of the views.
        compiled: torch.compile what Triton's kernels do not do: with them the drawing of the parameters, without them
            the whole chain, also on a CPU (where the kernel that it replaces is faster).
    """

    def __init__(
        self,
        views: ViewsConfig,
        seed: int = 0,
        count: Literal[1, 2] = 2,
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        compiled: bool = False,
    ):
        super().__init__()
        self.views = views
        self.seed = seed
        self.count = count
        self.dtype = dtype
        self.memory_format = memory_format
        self.triton = TritonChoice(views.kernel)
        self._make, self._draw_table = self.make, self.draw_table
        if compiled:
            self._make = torch.compile(self.make, dynamic=False)
            self._draw_table = torch.compile(self.draw_table, dynamic=False)

    @torch.no_grad()
    def forward(
        self,
        image: Tensor | BlockImages | ImageRows,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Make the views of a batch: `count` tensors (B, C, size, size) on the device of `image`.

        image: uint8, (B, H, W, C), or (B, count, size, size, 3) with the crops that the loader has cut and mirrored; or
        images in blocks; or rows of a resident set of images. index: (B,) sample ids. height, width: (B,) sizes of the
        source images, in whose pixels the crop is drawn; None: those of `image`.
        """
        stored, row_B = image if isinstance(image, ImageRows) else (image, None)
        if len(stored.shape) == 5 and stored.shape[1] != self.count:
            raise ValueError(f"The loader cut {stored.shape[1]} crops from each image for {self.count} views.")
        if len(stored.shape) == 5 and stored.shape[2] != self.views.size:
            raise ValueError(f"The loader cut crops of {stored.shape[2]} px for views of {self.views.size} px.")
        arguments = (index, epoch, height, width)

        def by_triton() -> Tensor:
            from fastssl.views.gpu import triton_views  # Triton comes with torch for GPUs

            table = self._draw_table(stored, *arguments)
            return triton_views(stored, table, self.views, self.dtype, self.memory_format, row_B)

        def gathered() -> Tensor | BlockImages:
            return image.gather() if isinstance(image, ImageRows) else image

        def compare() -> str | None:
            box_N4, drawn = self.draw(stored, *arguments)
            by_torch = partial(self._some_by_torch, gathered(), box_N4, drawn)
            return find_difference(by_triton, by_torch, drawn, len(index), self.views)

        views = by_triton() if self.triton.takes(stored, compare) else self._make(gathered(), *arguments)
        return views.chunk(self.count)

    def make(
        self,
        image: Tensor | BlockImages,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None,
        width: Tensor | None,
    ) -> Tensor:
        """(N, C, size, size): the views by numba's kernel on a CPU, else by torch operations."""
        box_N4, drawn = self.draw(image, index, epoch, height, width)
        on_cpu = image.device.type == "cpu" and not torch.compiler.is_compiling()
        make_views = cpu_views if on_cpu else torch_views
        views = make_views(image, box_N4, drawn, self.views)
        return views.to(self.dtype).contiguous(memory_format=self.memory_format)

    def draw(
        self,
        stored: Tensor | BlockImages,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None,
        width: Tensor | None,
    ) -> tuple[Tensor | None, Parameters[Tensor]]:
        """Draw the crop boxes and all other parameters of the views.

        If the loader has cut the crops, the boxes are None, and no view is mirrored: it has done that too.
        """
        u_NU = draw_uniforms(self.seed, epoch, index, self.count)
        drawn = draw_parameters(u_NU, self.views, self.count)
        if len(stored.shape) == 5:
            return None, drawn._replace(flip_N=torch.zeros_like(drawn.flip_N))
        return self.crop_boxes(u_NU, stored, height, width), drawn

    def draw_table(
        self,
        stored: Tensor | BlockImages,
        index: Tensor,
        epoch: int | Tensor,
        height: Tensor | None,
        width: Tensor | None,
    ) -> Tensor:
        """`draw`, as the table that Triton's kernels take."""
        from fastssl.views.gpu import parameter_table

        box_N4, drawn = self.draw(stored, index, epoch, height, width)
        return parameter_table(stored, box_N4, drawn)

    def _some_by_torch(
        self, image: Tensor | BlockImages, box_N4: Tensor | None, drawn: Parameters[Tensor], images: slice
    ) -> Tensor:
        """The views of some images of a batch by `torch_views`."""
        n = torch.arange(len(drawn.flip_N), device=image.device).view(self.count, -1)[:, images].flatten()
        some = Parameters(*(parameter[n] for parameter in drawn))
        return torch_views(image[images], None if box_N4 is None else box_N4[n], some, self.views)

    def crop_boxes(
        self, u_NU: Tensor, stored: Tensor | BlockImages, height: Tensor | None, width: Tensor | None
    ) -> Tensor:
        """(N, 4) float32: the crop boxes in pixels of the stored images, N = count * B."""
        stored_h, stored_w = stored.shape[1:3]
        ones = torch.ones(len(u_NU), dtype=torch.int64, device=stored.device)
        height_N = ones * stored_h if height is None else height.repeat(self.count)
        width_N = ones * stored_w if width is None else width.repeat(self.count)
        box_N4 = crop_box(u_NU, height_N, width_N, self.views.scale, self.views.ratio)
        # The exact product, rounded once: the same bits on every device, where a compiler may fuse it with a sum.
        return (box_N4 * _stored_per_source(stored, height_N, width_N).double()).float()


def torch_views(
    image: Tensor | BlockImages, box_N4: Tensor | None, drawn: Parameters[Tensor], views: ViewsConfig
) -> Tensor:
    """The chain in torch operations, for any device and for torch.compile. Same arguments as `cpu.cpu_views`."""
    count = len(drawn.flip_N) // len(image)
    per_view = (views.first, views.second)[:count]
    if box_N4 is None:
        assert isinstance(image, Tensor)  # the loader cuts its crops from pixels
        x = to_unit_range(image.transpose(0, 1).flatten(0, 1))
        x = torch.where(drawn.flip_N[:, None, None, None], x.flip(3), x)
    else:
        image_index_N = torch.arange(len(image), device=image.device).repeat(count)
        x = crop_to_unit_range(image, image_index_N, box_N4, drawn.flip_N, views.size)
    # A probability of 0 leaves out the operation's arithmetic, also in a compiled graph.
    if views.jitter.p > 0:
        x = operations.color_jitter(x, drawn.jitter_N, drawn.order_N4, drawn.factor_N4, with_hue=views.jitter.hue > 0)
    if views.gray > 0 and x.shape[1] == RGB:
        x = operations.grayscale(x, drawn.gray_N)
    if max(view.blur for view in per_view) > 0:
        x = operations.gaussian_blur(x, drawn.blur_N, drawn.sigma_N)
    if max(view.solarize for view in per_view) > 0:
        x = operations.solarize(x, drawn.solarize_N)
    return normalize(x, views)


class EvalTransform(Protocol):
    """Map a batch to the input of an encoder: (B, C, size, size) float32, normalized, on the batch's device.

    image: uint8, (B, H, W, C), or (B, 1, size, size, 3) as cut by a loader with crop="eval"; or images in blocks; or
    rows of a resident set of images. height, width: (B,) sizes of the source images, in which the central square is
    square; None: those of `image`.
    """

    def __call__(
        self, image: Tensor | BlockImages | ImageRows, height: Tensor | None = None, width: Tensor | None = None
    ) -> Tensor: ...


@lru_cache(maxsize=16)  # so that Triton's kernels are compared with torch once, though callers make it for each batch
def eval_transform(views: ViewsConfig) -> EvalTransform:
    """Return the evaluation transform, as set in views.eval.

    "squash" resizes the whole image to a square of views.size, as in the published code. "center" takes the central
    square of 7/8 of the shorter side, undistorted: the usual "resize to 256, center crop of 224" in one resampling.

    Example:
        >>> transform = eval_transform(recipe.views)
        >>> h = encoder(transform(batch.image, batch.height, batch.width))
    """
    choice = TritonChoice(views.kernel)
    without_blur = views.model_copy(update={"first": PerViewConfig(), "second": PerViewConfig()})

    def transform(
        image: Tensor | BlockImages | ImageRows, height: Tensor | None = None, width: Tensor | None = None
    ) -> Tensor:
        if isinstance(image, ImageRows):
            image = image.gather()
        if isinstance(image, Tensor) and image.ndim == 5:
            return normalize(to_unit_range(image[:, 0]), views)
        count, stored_h, stored_w = image.shape[:3]
        if isinstance(image, Tensor) and views.eval == "squash" and (stored_h, stored_w) == (views.size, views.size):
            return normalize(to_unit_range(image), views)
        image_index_B = torch.arange(count, device=image.device)
        height_B = torch.full_like(image_index_B, stored_h) if height is None else height
        width_B = torch.full_like(image_index_B, stored_w) if width is None else width
        box_B4 = eval_box(height_B, width_B, views.eval) * _stored_per_source(image, height_B, width_B)
        drawn = no_augmentation(count, image.device)

        def by_triton() -> Tensor:
            from fastssl.views.gpu import parameter_table, triton_views  # Triton comes with torch for GPUs

            table = parameter_table(image, box_B4, drawn)
            return triton_views(image, table, without_blur, memory_format=torch.contiguous_format)

        def by_torch(some: slice) -> Tensor:
            index = image_index_B[: len(image_index_B[some])]
            x = crop_to_unit_range(image[some], index, box_B4[some], drawn.flip_N[some], views.size)
            return normalize(x, views)

        if choice.takes(image, lambda: find_difference(by_triton, by_torch, drawn, count, views)):
            return by_triton()
        if image.device.type == "cpu":
            return cpu_views(image, box_B4, drawn, views)
        return by_torch(slice(None))

    return transform


def describe_eval_transform(views: ViewsConfig) -> dict[str, str | int | float | bool | list[float]]:
    """Describe `eval_transform` for programs without fastssl, as values for a JSON file; its input is in [0, 1].

    mean and std have a value for each channel, or one for all of them.

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


def _stored_per_source(image: Tensor | BlockImages, height_N: Tensor, width_N: Tensor) -> Tensor:
    """(N, 4) float32 that scale a box in source pixels to pixels of the stored image, a scaled copy of the source."""
    # Divided in float64, of which float32 is then the correctly rounded quotient: compiled for a GPU, a quotient of
    # float32 is not.
    scale_y_N = (1 / height_N.double()).float() * image.shape[1]
    scale_x_N = (1 / width_N.double()).float() * image.shape[2]
    return torch.stack([scale_y_N, scale_x_N, scale_y_N, scale_x_N], dim=1)
