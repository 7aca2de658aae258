"""Views of images in blocks by the CPU kernel, compared with the torch chain."""

import numpy as np
import pytest
import torch

from fastssl.beton import bc4
from fastssl.beton.format import bc4_bytes
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, eval_transform
from fastssl.views.cpu import cpu_views
from fastssl.views.cpu_blocks import Scratch, new_scratch, resize_blocks_to_planes
from fastssl.views.operations import crop_to_unit_range
from fastssl.views.paired import torch_views
from fastssl.views.parameters import no_augmentation

UNIT = {"mean": (0.0,), "std": (1.0,)}
CROP_ONLY = ViewsConfig(jitter=JitterConfig(p=0), gray=0, first=PerViewConfig(), second=PerViewConfig(), **UNIT)
EVERYTHING = ViewsConfig(
    jitter=JitterConfig(p=0.7), gray=0.3, first=PerViewConfig(blur=0.6), second=PerViewConfig(blur=0.3, solarize=0.5)
)


def blocks_of_both_modes(batch: int, side: int) -> BlockImages:
    """Half of the images of any bytes, half of them smooth with a little noise."""
    generator = torch.Generator().manual_seed(side)
    blocks = torch.randint(0, 256, (batch, bc4_bytes(side)), dtype=torch.uint8, generator=generator)
    coarse = torch.rand(batch // 2, 3, 2, 2, generator=generator)
    smooth = 255 * torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth + 4 * torch.randn(smooth.shape, generator=generator)
    for image, pixels in zip(blocks, noisy.clamp(0, 255).byte().permute(0, 2, 3, 1)):
        image[:] = torch.from_numpy(bc4.encode(np.ascontiguousarray(pixels)))
    return BlockImages(blocks, side)


def boxes_at_borders(side: int) -> torch.Tensor:
    """Boxes of a part of a pixel, of one row or column, at every border, and of nearly all of the image."""
    near, far = side - 1, side - 0.75
    return torch.tensor(
        [
            [0, 0, side, side], [0, 0, 1, 1], [near, near, 1, 1], [far, 0, 0.75, side], [0, far, side, 0.75],
            [0.25, 0.5, 0.25, 0.125], [1.5, 2.5, 1, 1], [2.25, 3, 0.5, 4], [near, 0, 1, side], [0, near, side, 1],
            [3.75, 4.25, 3.5, 3.5], [0.125, 0.125, side - 0.25, side - 0.25],
        ],
        dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("side", [8, 24, 40, 96, 256])
@pytest.mark.parametrize("size", [8, 33, 64])
def test_every_crop_equals_the_torch_chain(side, size):
    images = blocks_of_both_modes(12, side)
    box = boxes_at_borders(side)
    plain = no_augmentation(12, torch.device("cpu"))
    drawn = plain._replace(flip_N=torch.arange(12) % 2 == 1)
    made = cpu_views(images, box, drawn, CROP_ONLY.model_copy(update={"size": size}))
    want = crop_to_unit_range(images, torch.arange(12), box, drawn.flip_N, size)
    torch.testing.assert_close(made, want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("side, size", [(64, 32), (40, 57), (256, 224)])
def test_every_operation_equals_the_torch_chain(side, size):
    """A hue may jump where the channels are almost equal, solarize at its threshold."""
    images, index = blocks_of_both_modes(8, side), torch.arange(8)
    views = PairedViews(EVERYTHING.model_copy(update={"size": size}), seed=3)
    for epoch in range(2):
        box, drawn = views.draw(images, index, epoch, torch.full((8,), 375), torch.full((8,), 500))
        made, want = (chain(images, box, drawn, views.views) for chain in (cpu_views, torch_views))
        assert ((made - want).abs() > 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("kind", ["squash", "center"])
@pytest.mark.parametrize("size", [32, 40])
def test_the_evaluation_transform_equals_the_torch_chain(kind, size):
    images = blocks_of_both_modes(6, 40)
    views = ViewsConfig(size=size, eval=kind, **UNIT)
    made = eval_transform(views)(images)
    box = torch.tensor([[0.0, 0, 40, 40] if kind == "squash" else [2.5, 2.5, 35, 35]]).expand(6, 4)
    want = crop_to_unit_range(images, torch.arange(6), box, torch.zeros(6, dtype=torch.bool), size)
    torch.testing.assert_close(made, want, rtol=0, atol=5e-5)


def test_views_of_blocks_do_not_depend_on_the_number_of_threads():
    images, index, before = blocks_of_both_modes(20, 48), torch.arange(20), torch.get_num_threads()
    views = PairedViews(EVERYTHING.model_copy(update={"size": 40}), seed=1)
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(views(images, index, 0))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


@pytest.mark.parametrize("side, size", [(8, 8), (24, 33), (40, 12)])
def test_a_crop_writes_inside_its_memory_only(side, size):
    """For every box, whatever its window, also where its sides are no whole tiles."""
    images = blocks_of_both_modes(2, side)
    guarded = []

    def within_guards(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        guarded.append(np.full(np.prod(shape) + 128, 77, dtype))
        return guarded[-1][64:-64].reshape(shape)

    scratch = Scratch(*(within_guards(array.shape, array.dtype) for array in new_scratch(side, size)))
    out = within_guards((3, size, size), np.float32)
    for box in boxes_at_borders(side).numpy():
        for flip in (False, True):
            resize_blocks_to_planes(images.blocks[0].numpy(), side, box, flip, out, scratch)
            assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    for array in guarded:
        assert (array[:64] == 77).all() and (array[-64:] == 77).all()
