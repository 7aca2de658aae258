"""The views, each operation compared with torchvision's function, and the CPU kernel compared with the torch chain."""

import math

import numba
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from scipy import stats

from fastssl.common.errors import UserError
from fastssl.common.geometry import crop_box, eval_box
from fastssl.loading import ImageRows
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, cpu, eval_transform, kernel_choice, operations, paired
from fastssl.views.cpu import cpu_views
from fastssl.views.operations import crop_resize
from fastssl.views.paired import _stored_per_source, torch_views
from fastssl.views.parameters import draw_parameters, draw_uniforms

# torchvision works on the same float pixels, so only the order of float32 sums differs; 1e-4 is
# 0.03 of a gray level. torchvision's antialiased resize rounds differently: there 2/255 is allowed.
CLOSE = {"rtol": 0, "atol": 1e-4}
PLAIN = ViewsConfig(
    size=32,
    flip=0,
    jitter=JitterConfig(p=0),
    gray=0,
    first=PerViewConfig(),
    second=PerViewConfig(),
    mean=(0, 0, 0),
    std=(1, 1, 1),
)


@pytest.fixture
def images():
    """(6, 3, 40, 52) float images with smooth structure, edges and noise."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 5, 7, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (40, 52), mode="bilinear")
    return (smooth + 0.1 * torch.randn(6, 3, 40, 52, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("box", [(0, 0, 40, 52), (3, 5, 30, 40), (7, 1, 9, 50), (10, 20, 5, 6)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_flip_equals_torchvision(images, box, flip):
    top, left, h, w = box
    every, flips = torch.arange(6), torch.full((6,), flip)
    ours = crop_resize(images.permute(0, 2, 3, 1), every, torch.tensor(box).expand(6, 4), flips, 32)
    want = tvf.resized_crop(images, top, left, h, w, [32, 32], antialias=True)
    want = tvf.horizontal_flip(want) if flip else want
    torch.testing.assert_close(ours, want, rtol=0, atol=2 / 255)
    assert (ours - want).abs().mean() < 2e-4


@pytest.mark.parametrize(
    "operation, function, factors",
    [
        (operations.BRIGHTNESS, tvf.adjust_brightness, [0.6, 0.9, 1.0, 1.2, 1.4, 0.0]),
        (operations.CONTRAST, tvf.adjust_contrast, [0.6, 0.9, 1.0, 1.2, 1.4, 0.0]),
        (2, tvf.adjust_saturation, [0.8, 0.9, 1.0, 1.1, 1.2, 0.0]),
        (operations.HUE, tvf.adjust_hue, [-0.5, -0.1, -0.03, 0.0, 0.1, 0.5]),
    ],
)
def test_each_jitter_operation_equals_torchvision(images, operation, function, factors):
    order = torch.tensor([operation] + [o for o in range(4) if o != operation]).expand(6, 4)
    factor = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(6, 1)
    factor[:, operation] = torch.tensor(factors)
    ours = operations.color_jitter(images, torch.ones(6, dtype=bool), order, factor, with_hue=True)
    want = torch.stack([function(x, f) for x, f in zip(images, factors)])
    torch.testing.assert_close(ours, want, **CLOSE)


def test_jitter_in_random_order_equals_torchvision(images):
    functions = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue]
    drawn = draw_parameters(draw_uniforms(5, 0, torch.arange(3)), ViewsConfig(jitter=JitterConfig(p=0.7)))
    ours = operations.color_jitter(images, drawn.jitter_N, drawn.order_N4, drawn.factor_N4, with_hue=True)
    want = images.clone()
    for i in range(6):
        if drawn.jitter_N[i]:
            for o in drawn.order_N4[i].tolist():
                want[i] = functions[o](want[i], drawn.factor_N4[i, o].item())
    assert drawn.jitter_N.any() and not drawn.jitter_N.all()
    assert len({tuple(o) for o in drawn.order_N4.tolist()}) > 1
    torch.testing.assert_close(ours, want, **CLOSE)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(images, sigma):
    apply = torch.tensor([True] * 5 + [False])
    ours = operations.gaussian_blur(images, apply, torch.full((6,), sigma))
    want = tvf.gaussian_blur(images, [13, 13], [sigma, sigma])
    torch.testing.assert_close(ours[:5], want[:5], **CLOSE)
    assert torch.equal(ours[5], images[5])


def test_grayscale_and_solarize_equal_torchvision(images):
    apply = torch.tensor([True, False] * 3)
    for ours, want in [
        (operations.grayscale(images, apply), tvf.rgb_to_grayscale(images, 3)),
        (operations.solarize(images, apply), tvf.solarize(images, operations.SOLARIZE_THRESHOLD)),
    ]:
        torch.testing.assert_close(ours[::2], want[::2], **CLOSE)
        assert torch.equal(ours[1::2], images[1::2])


def test_parameters_follow_their_distributions():
    n = 6000
    views = ViewsConfig()
    drawn = draw_parameters(draw_uniforms(1, 2, torch.arange(n)), views)
    for view, own in enumerate((views.first, views.second)):
        p = type(drawn)(*(column.chunk(2)[view] for column in drawn))
        for applied, probability in [
            (p.flip_N, views.flip), (p.jitter_N, views.jitter.p), (p.gray_N, views.gray),
            (p.blur_N, own.blur), (p.solarize_N, own.solarize),
        ]:  # fmt: skip
            assert stats.binomtest(int(applied.sum()), n, probability).pvalue > 1e-3
        uniform = [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)]
        for column, low, high in uniform:
            assert stats.kstest(p.factor_N4[:, column], stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert stats.kstest(p.sigma_N, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
        counts = np.unique(p.order_N4.numpy(), axis=0, return_counts=True)[1]
        assert len(counts) == math.factorial(4) and stats.chisquare(counts).pvalue > 1e-3


def uint8(images):
    return (images.permute(0, 2, 3, 1) * 255).round().byte().contiguous()


def test_a_view_does_not_depend_on_its_batch(images):
    views = PairedViews(ViewsConfig(size=32), seed=1)
    index = torch.tensor([11, 3, 8, 1, 99, 1_281_166])
    whole = views(uint8(images), index, 4)
    alone = [views(uint8(images[i : i + 1]), index[i : i + 1], 4) for i in range(6)]
    for view in (0, 1):
        assert torch.equal(whole[view], torch.cat([a[view] for a in alone]))
    assert not torch.allclose(whole[0], whole[1])
    assert torch.equal(whole[0], views(uint8(images), index, 4)[0])
    assert not torch.allclose(whole[0], views(uint8(images), index, 5)[0])


EVERYTHING = ViewsConfig(
    size=32,
    jitter=JitterConfig(p=0.7),
    gray=0.3,
    first=PerViewConfig(blur=0.6),
    second=PerViewConfig(blur=0.3, solarize=0.5),
)


def test_the_whole_chain_equals_torchvision(images):
    """Calls torchvision's functions sample by sample, with the drawn parameters, in the order of the chain."""
    index, height, width = torch.arange(6), 40, 52
    u = draw_uniforms(3, 1, index)
    p = draw_parameters(u, EVERYTHING)
    boxes = crop_box(u, torch.full((12,), height), torch.full((12,), width), EVERYTHING.scale, EVERYTHING.ratio)
    ours = torch.cat(PairedViews(EVERYTHING, seed=3)(uint8(images), index, 1))
    jitter = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue]
    for n in range(12):
        x = uint8(images)[n % 6].permute(2, 0, 1) / 255
        x = tvf.resized_crop(x, *boxes[n].tolist(), [32, 32], antialias=True)
        x = tvf.horizontal_flip(x) if p.flip_N[n] else x
        for operation in p.order_N4[n].tolist() if p.jitter_N[n] else []:
            x = jitter[operation](x, p.factor_N4[n, operation].item())
        x = tvf.rgb_to_grayscale(x, 3) if p.gray_N[n] else x
        x = tvf.gaussian_blur(x, [13, 13], [p.sigma_N[n].item()] * 2) if p.blur_N[n] else x
        solarized = tvf.solarize(x, operations.SOLARIZE_THRESHOLD) if p.solarize_N[n] else x
        want = tvf.normalize(solarized, EVERYTHING.mean, EVERYTHING.std)
        # Solarize jumps at its threshold: rounding may put a pixel near it on either side.
        unsure = (abs(x - operations.SOLARIZE_THRESHOLD) < 2 / 255) & p.solarize_N[n]
        assert (ours[n] - want)[~unsure].abs().max() < 2 / 255 / min(EVERYTHING.std)
        assert (ours[n] - want)[~unsure].abs().mean() < 2e-3
    assert all(column.any() and not column.all() for column in (p.flip_N, p.jitter_N, p.gray_N, p.blur_N))


@pytest.mark.parametrize("shape", [(40, 52), (32, 32), (90, 20), (5, 200)])
def test_the_cpu_kernel_equals_the_torch_chain(shape):
    """Enlarging, shrinking and both, up to rounding. A hue may jump where the channels are almost equal."""
    image = torch.randint(0, 256, (16, *shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views, index = PairedViews(EVERYTHING, seed=3), torch.arange(16)
    for epoch in range(4):
        u = draw_uniforms(3, epoch, index)
        drawn = draw_parameters(u, EVERYTHING)
        boxes = views.crop_boxes(u, image, torch.full((16,), 61), torch.full((16,), 83))
        ours, want = (chain(image, boxes, drawn, EVERYTHING) for chain in (cpu_views, torch_views))
        assert (abs(ours - want) > 1e-4).float().mean() < 1e-3
        pair = image[:, None, :5, :5].repeat(1, 2, 7, 7, 1)[:, :, :32, :32]
        ours, want = (chain(pair, None, drawn, EVERYTHING) for chain in (cpu_views, torch_views))
        assert (abs(ours - want) > 1e-4).float().mean() < 1e-3


def test_the_scale_of_a_box_is_the_rounded_quotient_and_product():
    """In float64 and then rounded, it has the bits of float32, which a kernel for a GPU does not compute."""
    source = torch.arange(1, 5000)
    for stored in (32, 96, 256, 375):
        image = torch.empty(1, stored, stored, 3)
        ours, want = _stored_per_source(image, source, source)[:, 0], stored / source
        assert torch.equal(ours, want)
        box = torch.randint(0, 5000, (len(source),), generator=torch.Generator().manual_seed(0))
        assert torch.equal((box * ours.double()).float(), box * want)


@pytest.mark.parametrize("kind", ["squash", "center"])
def test_the_evaluation_transform_of_both_chains_is_equal_at_every_size(kind):
    """Rounding must not decide whether the border of the box is within a pixel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (100, 96, 96, 3), dtype=torch.uint8, generator=generator)
    height, width = torch.randint(50, 900, (2, 100), generator=generator)
    box = eval_box(height, width, kind) * _stored_per_source(image, height, width)
    none = torch.zeros(100, dtype=torch.bool)
    views = ViewsConfig(size=64, eval=kind)
    in_torch = operations.normalize(crop_resize(image, torch.arange(100), box, none, 64) / 255, views)
    torch.testing.assert_close(eval_transform(views)(image, height, width), in_torch, rtol=0, atol=1e-4)


def test_cpu_views_do_not_depend_on_the_number_of_threads(images):
    views, before = PairedViews(EVERYTHING, seed=1), torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(views(uint8(images), torch.arange(6), 0))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


@numba.njit(error_model="numpy", fastmath={"contract"})  # the options of the kernel
def mean_luma_in_order(red, green, blue):
    total = 0.0
    for i in range(len(red)):
        total += cpu._luma(red[i], green[i], blue[i])
    return np.float32(total / len(red))


@pytest.mark.parametrize("count", [64, 1_001, 50_176])
def test_the_mean_gray_value_on_the_cpu_has_the_bits_of_a_sum_in_order(count):
    rng = np.random.default_rng(count)
    for exponent in range(1, 20):
        colors = (rng.random((3, count)) ** exponent).astype(np.float32)
        assert cpu._mean_luma(*colors) == mean_luma_in_order(*colors)
    # Half of the pixels each have one of two neighboring gray values: the mean is between two float32.
    values = np.float32(0.3) + np.arange(8, dtype=np.float32) * np.spacing(np.float32(0.3))
    gray = np.array([mean_luma_in_order(*np.full((3, 1), value)) for value in values], np.float32)
    first = next(i for i in range(7) if gray[i + 1] == np.nextafter(gray[i], np.float32(1)))
    colors = np.tile(values[first : first + 2], (3, count // 2))
    assert cpu._mean_luma(*colors) == mean_luma_in_order(*colors)


def test_views_on_the_cpu_reuse_the_memory_of_views_that_nobody_holds(images):
    views, index = PairedViews(EVERYTHING, seed=1), torch.arange(6)
    kept = [views(uint8(images), index, epoch)[1] for epoch in range(5)]
    again = [views(uint8(images), index, epoch)[1] for epoch in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(kept, again))
    assert len({view.data_ptr() for view in kept + again}) == 10
    del kept, again
    assert len({views(uint8(images), index, epoch)[0].data_ptr() for epoch in range(5)}) <= 2


@pytest.mark.parametrize("make", [cpu_views, torch_views])
def test_one_view_equals_the_first_of_two_bit_for_bit(images, monkeypatch, make):
    """With crops cut by the views and by the loader; no number is drawn for a second view."""
    monkeypatch.setattr(paired, "cpu_views", make)
    index, pixels = torch.arange(6), uint8(images)
    pair = torch.stack([pixels[:, :32, :32], pixels[:, -32:, -32:]], dim=1)
    one, two = PairedViews(EVERYTHING, seed=3, count=1), PairedViews(EVERYTHING, seed=3)
    for epoch in range(3):
        (cropped_here,) = one(pixels, index, epoch)
        assert torch.equal(cropped_here, two(pixels, index, epoch)[0])
        (cropped_before,) = one(pair[:, :1].contiguous(), index, epoch)
        assert torch.equal(cropped_before, two(pair, index, epoch)[0])
    assert len(draw_uniforms(3, 0, index, 1)) == 6
    with pytest.raises(ValueError, match="cut 2 crops from each image for 1 views"):
        one(pair, index, 0)
    with pytest.raises(ValueError, match="cut crops of 31 px for views of 32 px"):
        two(pair[:, :, :31, :31].contiguous(), index, 0)


def test_views_come_in_the_type_and_memory_format_of_the_network(images):
    index, formats = torch.arange(6), {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    plain = PairedViews(EVERYTHING, seed=3)(uint8(images), index, 2)
    for ours, want in zip(PairedViews(EVERYTHING, seed=3, **formats)(uint8(images), index, 2), plain):
        assert ours.is_contiguous(memory_format=torch.channels_last) and torch.equal(ours, want.bfloat16())


def test_images_may_be_rows_of_a_larger_tensor(images):
    index, row_B = torch.arange(3), torch.tensor([4, 0, 5])
    views = PairedViews(EVERYTHING, seed=3)
    for ours, want in zip(views(ImageRows(uint8(images), row_B), index, 1), views(uint8(images)[row_B], index, 1)):
        assert torch.equal(ours, want)


def test_triton_views_of_other_than_rgb_images_are_refused_or_made_in_torch(monkeypatch):
    monkeypatch.setattr(kernel_choice, "on_gpu", lambda stored: True)
    gray, index = torch.zeros(2, 16, 16, 1, dtype=torch.uint8), torch.arange(2)
    views = ViewsConfig(size=16, mean=(0.5,), std=(1.0,))
    assert PairedViews(views)(gray, index, 0)[0].shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match="views.kernel=triton makes views of RGB images only"):
        PairedViews(views.model_copy(update={"kernel": "triton"}))(gray, index, 0)


def test_crops_do_not_depend_on_the_canvas(images):
    """An image stored at its own size and one squashed to a square show the same region."""
    big = torch.nn.functional.interpolate(images, (200, 260), mode="bilinear")
    canvas = tvf.resize(big, [160, 160], antialias=True)
    views = PairedViews(PLAIN.model_copy(update={"scale": (0.3, 1.0)}), seed=0)
    index, size = torch.arange(6), (torch.full((6,), 200), torch.full((6,), 260))
    from_source = views(uint8(big), index, 0)[0]
    from_canvas = views(uint8(canvas), index, 0, *size)[0]
    assert (from_source - from_canvas).abs().mean() < 0.01


def test_crops_of_the_loader_are_not_flipped_again(images):
    """The loader has mirrored them, by the number that mirrors a crop of the views."""
    size = 32
    pair = torch.stack([uint8(images)[:, :size, :size], uint8(images)[:, -size:, -size:]], dim=1)
    plain = PairedViews(PLAIN.model_copy(update={"flip": 0.5}), seed=0)
    index = torch.arange(6)
    flip_N = plain.draw(uint8(images), index, 0, None, None)[1].flip_N
    assert flip_N.any() and not flip_N.all()
    for view, out in enumerate(plain(pair, index, 0)):
        torch.testing.assert_close(out, pair[:, view].permute(0, 3, 1, 2) / 255, **CLOSE)


def test_a_probability_of_zero_switches_an_operation_off(images):
    views = PairedViews(PLAIN.model_copy(update={"scale": (1, 1), "ratio": (1, 1)}), seed=0)
    square = uint8(images[:, :, :32, :32])
    first, second = views(square, torch.arange(6), 0)
    torch.testing.assert_close(first, square.permute(0, 3, 1, 2) / 255, **CLOSE)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_evaluation_transform_is_an_antialiased_resize(images):
    views = ViewsConfig(size=24)
    transformed = eval_transform(views)(uint8(images))
    want = tvf.resize(uint8(images).permute(0, 3, 1, 2) / 255, [24, 24], antialias=True)
    want = tvf.normalize(want, views.mean, views.std)
    torch.testing.assert_close(transformed, want, rtol=0, atol=2 / 255 / min(views.std))
    assert eval_transform(views)(uint8(images[:, :, :24, :24])).shape == (6, 3, 24, 24)


def test_the_center_equals_resize_and_center_crop_of_torchvision():
    """With a smooth image, because torchvision crops at whole pixels and this transform between them."""
    y, x = torch.meshgrid(torch.arange(375.0), torch.arange(500.0), indexing="ij")
    image = torch.stack([x / 2, y / 2, (x + y) / 4]).clamp(0, 255).to(torch.uint8)
    views = ViewsConfig(size=224, eval="center", mean=(0, 0, 0), std=(1, 1, 1))
    want = tvf.center_crop(tvf.resize(image[None] / 255, 256, antialias=True), 224)
    transform = eval_transform(views)
    torch.testing.assert_close(transform(image.permute(1, 2, 0)[None]), want, rtol=0, atol=1.5 / 255)
    # In a canvas, which is squashed, the central square of the source is not a square.
    canvas = tvf.resize(image[None], [256, 256], antialias=True).permute(0, 2, 3, 1)
    source = torch.tensor([375]), torch.tensor([500])
    torch.testing.assert_close(transform(canvas, *source), want, rtol=0, atol=2.5 / 255)
    # The same in torch operations, as on a GPU.
    box = eval_box(*source, "center") * torch.tensor([256 / 375, 256 / 500] * 2)
    none = torch.zeros(1, dtype=torch.int64)
    in_torch = crop_resize(canvas, none, box, none.bool(), 224) / 255
    torch.testing.assert_close(transform(canvas, *source), in_torch, **CLOSE)


@pytest.mark.slow
def test_views_compile_in_one_graph_with_the_same_parameters(images):
    views = PairedViews(ViewsConfig(size=32), seed=1)
    args = uint8(images), torch.arange(6), torch.tensor(3)
    for ours, compiled in zip(views(*args), torch.compile(views, fullgraph=True, dynamic=False)(*args)):
        assert (abs(ours - compiled) > 1e-4).float().mean() < 1e-3
