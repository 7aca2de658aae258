"""Views of images in blocks by the torch chain, the oracle of the kernels: luma and chroma at their own resolutions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_images import jpeg_bytes

from fastssl.beton import bc4
from fastssl.beton.format import bc4_bytes
from fastssl.loading import ImageRows
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, eval_transform
from fastssl.views.kernel_choice import TritonChoice
from fastssl.views.operations import crop_resize, crop_to_unit_range
from fastssl.views.paired import torch_views
from fastssl.views.parameters import no_augmentation

UNIT = {"mean": (0.0,), "std": (1.0,)}
CROP_ONLY = ViewsConfig(
    size=32, flip=0, jitter=JitterConfig(p=0), gray=0, first=PerViewConfig(), second=PerViewConfig(), **UNIT
)


def random_blocks(batch: int, side: int, seed: int = 0) -> BlockImages:
    """Any bytes, so blocks of both modes."""
    generator = torch.Generator().manual_seed(seed)
    return BlockImages(torch.randint(0, 256, (batch, bc4_bytes(side)), dtype=torch.uint8, generator=generator), side)


def photos(batch: int, side: int, noise: float = 3.0) -> np.ndarray:
    """(B, side, side, 3) uint8: smooth, with noise of a standard deviation in gray levels, as from a camera."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 3, side // 16, side // 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 200 + 28
    noisy = smooth + noise * torch.randn(batch, 1, side, side, generator=generator)
    return noisy.clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def encoded(pixels_BHWC: np.ndarray) -> BlockImages:
    blocks = np.stack([bc4.encode(pixels_HWC) for pixels_HWC in pixels_BHWC])
    return BlockImages(torch.from_numpy(blocks), pixels_BHWC.shape[1])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of values in [0, 1]."""
    return -10 * (a - b).square().mean().log10().item()


def test_the_whole_image_at_its_own_size_is_its_pixels():
    """So chroma is interpolated between the centers of its pixels, at the borders too. Pixels are rounded."""
    images = random_blocks(3, 40)
    box = torch.tensor([0.0, 0, 40, 40]).expand(3, 4)
    made = crop_to_unit_range(images, torch.arange(3), box, torch.tensor([False, True, False]), 40)
    made[1] = made[1].flip(2)
    want = images.pixels().permute(0, 3, 1, 2)
    assert (255 * made - want).abs().max() < 0.51


def test_luma_without_chroma_is_resampled_as_a_gray_image():
    images = random_blocks(4, 32)
    images.blocks[:, 32 * 32 // 2 :] = torch.tensor([128, 128, 0, 0, 0, 0, 0, 0]).byte().repeat(32 * 32 // 32)
    box = torch.tensor([[0.0, 0, 32, 32], [3, 5, 20, 17], [1.5, 2.25, 30.5, 4], [7, 7, 3, 3]])
    arguments = torch.arange(4), box, torch.tensor([False, True, False, True]), 24
    made = crop_to_unit_range(images, *arguments)
    want = crop_resize(images.pixels(), *arguments) / 255
    torch.testing.assert_close(made, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [16, 48])
def test_chroma_is_resampled_at_half_the_resolution(size):
    """Of images that are gray but for one plane of chroma: each color is a multiple of the resampled plane."""
    images = random_blocks(2, 32)
    flat = torch.tensor([128, 128, 0, 0, 0, 0, 0, 0]).byte()
    images.blocks[:] = flat.repeat(images.blocks.shape[1] // 8)
    # Mode of eight levels, from 126 to 140, so that no color is clamped.
    cr = random_blocks(2, 32, seed=1).blocks[:, -128:].clone().unflatten(1, (-1, 8))
    cr[..., :2] = torch.tensor([140, 126]).byte()
    images.blocks[:, -128:] = cr.flatten(1)
    box = torch.tensor([[2.0, 3, 25, 21], [0.5, 1, 9, 30]])
    none = torch.zeros(2, dtype=torch.bool)
    made = crop_to_unit_range(images, torch.arange(2), box, none, size)
    chroma = crop_resize(images.planes()[1][..., 1:], torch.arange(2), box / 2, none, size)[:, 0]
    torch.testing.assert_close(255 * made[:, 0], 128 + 1.402 * (chroma - 128), rtol=0, atol=1e-3)
    torch.testing.assert_close(255 * made[:, 1], 128 - 0.714136 * (chroma - 128), rtol=0, atol=1e-3)
    torch.testing.assert_close(255 * made[:, 2], torch.full_like(chroma, 128), rtol=0, atol=1e-3)


def test_blocks_draw_the_parameters_of_pixels():
    """The same crops, flips and colors: the views of blocks are those of the decoded pixels, up to their chroma."""
    images, index = encoded(photos(6, 64)), torch.tensor([5, 1, 900, 2, 7, 3])
    sizes = torch.full((6,), 375), torch.full((6,), 500)
    paired_views = PairedViews(ViewsConfig(size=32, **UNIT), seed=2)
    rows = ImageRows(images[torch.tensor([3, 1, 0, 2, 5, 4])], torch.tensor([2, 1, 3, 0, 5, 4]))
    made, again = paired_views(images, index, 3, *sizes), paired_views(rows, index, 3, *sizes)
    for view, same, want in zip(made, again, paired_views(images.pixels(), index, 3, *sizes)):
        assert torch.equal(view, same)
        # All but what solarize inverts on one side of its threshold.
        assert ((view - want).abs() > 0.02).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["squash", "center"])
@pytest.mark.parametrize("size", [64, 40])
def test_the_evaluation_transform_takes_blocks(kind, size):
    """At the borders of the box, pixels of chroma that it touches are twice as large."""
    images = encoded(photos(4, 64))
    sizes = torch.full((4,), 375), torch.full((4,), 500)
    transform = eval_transform(ViewsConfig(size=size, eval=kind, **UNIT))
    made, want = transform(images, *sizes), transform(images.pixels(), *sizes)
    assert made.shape == (4, 3, size, size) and (made - want).abs().max() < 0.03
    assert (made - want).abs().mean() < 0.003
    rows = ImageRows(images, torch.arange(4))
    assert torch.equal(made, transform(rows, *sizes))


def test_views_of_blocks_are_nearer_to_the_original_than_those_of_a_jpeg():
    """q90 with chroma at half the resolution, as canvases in JPEG. The same crops of all three."""
    original = photos(4, 128)
    jpegs = [io.BytesIO(jpeg_bytes(Image.fromarray(pixels), quality=90)) for pixels in original]
    as_jpeg = np.stack([np.asarray(Image.open(jpeg).convert("RGB")) for jpeg in jpegs])
    views, index = PairedViews(CROP_ONLY.model_copy(update={"size": 112})), torch.arange(4)

    def quality(images) -> float:
        wanted = views(torch.from_numpy(original), index, 0)
        return min(psnr(view, want) for view, want in zip(views(images, index, 0), wanted))

    of_blocks, of_jpeg = quality(encoded(original)), quality(torch.from_numpy(as_jpeg))
    assert of_blocks > of_jpeg + 1 and of_blocks > 40, (of_blocks, of_jpeg)


@pytest.mark.slow
def test_views_of_blocks_compile_in_one_graph():
    images = random_blocks(4, 32)
    views = PairedViews(ViewsConfig(size=24), seed=1)
    args = images, torch.arange(4), torch.tensor(3)
    for ours, compiled in zip(views(*args), torch.compile(views, fullgraph=True, dynamic=False)(*args)):
        assert (abs(ours - compiled) > 1e-4).float().mean() < 1e-3


def test_one_view_of_blocks_equals_the_first_of_two():
    images, index = random_blocks(3, 32), torch.arange(3)
    one, two = (PairedViews(ViewsConfig(size=16), seed=1, count=count) for count in (1, 2))
    assert torch.equal(one(images, index, 0)[0], two(images, index, 0)[0])


def test_no_augmentation_of_the_whole_image_is_the_evaluation_transform():
    images, views = random_blocks(3, 32), ViewsConfig(size=20)
    box = torch.tensor([0.0, 0, 32, 32]).expand(3, 4)
    plain = no_augmentation(3, torch.device("cpu"))
    torch.testing.assert_close(torch_views(images, box, plain, views), eval_transform(views)(images))


@pytest.mark.parametrize("shape, side", [((2, 431), 24), ((2, 432), 32), ((432,), 24), ((2, 75), 10)])
def test_blocks_of_another_shape_are_refused(shape, side):
    """Kernels compute addresses from the side."""
    with pytest.raises(ValueError, match=f"are not images of {side} px in BC4"):
        BlockImages(torch.zeros(shape, dtype=torch.uint8), side)


def test_the_kernels_are_compared_once_for_pixels_and_once_for_blocks(monkeypatch) -> None:
    monkeypatch.setattr("fastssl.views.kernel_choice.on_gpu", lambda stored: True)
    choice = TritonChoice("auto")
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    blocks = BlockImages(torch.zeros(1, 48, dtype=torch.uint8), 8)
    assert choice.takes(pixels, lambda: None)
    with pytest.warns(UserWarning, match="Triton's kernels for the views are not used: they differ"):
        assert not choice.takes(blocks, lambda: "they differ")
    assert choice.takes(pixels, lambda: "not asked again")
    assert not choice.takes(blocks, lambda: None)


def test_no_images_give_no_views() -> None:
    views = ViewsConfig(size=32)
    index = torch.zeros(0, dtype=torch.int64)
    for images in (
        torch.zeros(0, 64, 64, 3, dtype=torch.uint8),
        BlockImages(torch.zeros(0, 3072, dtype=torch.uint8), 64),
    ):
        assert eval_transform(views)(images).shape == (0, 3, 32, 32)
        assert [view.shape for view in PairedViews(views)(images, index, 0)] == [(0, 3, 32, 32)] * 2
