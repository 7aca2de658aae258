"""The views, operation by operation, against torchvision's own functions, and the rules of the randomness."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from scipy import stats

from fastssl.common import geometry, randomness
from fastssl.common.geometry import crop_resize, eval_box
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, cpu, eval_transform, operations
from fastssl.views.paired import portable_views
from fastssl.views.parameters import draw_boxes, draw_parameters, draw_uniforms

# torchvision works on the same float pixels, so only the order of float32 sums differs; 1e-4 is
# 0.03 of a grey level. Where torchvision's way is another (its antialiased resize), 2/255 is allowed.
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


def test_philox_equals_the_published_test_vectors():
    """Random123's known answers for philox4x32-10."""

    def run(counter, key):
        words = randomness.philox(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
        return [int(w) for w in words]

    ones = 0xFFFFFFFF
    assert run([0] * 4, [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run([ones] * 4, [ones, ones]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert run([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def test_noise_is_standard_normal_and_free_of_the_batch():
    index = torch.arange(64)
    noise = randomness.normals(3, 7, index, 0, draws=4, dim=500)
    assert noise.shape == (4, 64, 500) and noise.dtype == torch.float32
    flat = noise.flatten().double().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01  # 128,000 numbers: 3.6 standard errors
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.02
    assert torch.equal(noise[:2, 10:20], randomness.normals(3, 7, index[10:20], 0, draws=2, dim=500))
    assert not torch.equal(noise, randomness.normals(3, 7, index, 1, 4, 500))
    assert not torch.equal(noise, randomness.normals(3, 8, index, 0, 4, 500))
    assert not torch.equal(noise, randomness.normals(4, 7, index, 0, 4, 500))


def test_permutation_is_a_permutation_of_its_own_for_each_epoch():
    first, second = randomness.permutation(0, 0, 1000), randomness.permutation(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, randomness.permutation(0, 0, 1000))


def test_crop_box_has_torchvision_distribution():
    """Area share, aspect ratio and place of the boxes against RandomResizedCrop.get_params (KS)."""
    from torchvision.transforms import RandomResizedCrop

    n, height, width = 4000, 375, 500
    u = draw_uniforms(0, 0, torch.arange(n // 2))
    ours = draw_boxes(u, ViewsConfig(), torch.full((n,), height), torch.full((n,), width)).numpy()
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(n)])
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (height - b[:, 2] + 1),
        lambda b: b[:, 1] / (width - b[:, 3] + 1),
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1), (3, 2000)])
def test_crop_box_of_extreme_images_stays_inside(height, width):
    u = draw_uniforms(0, 0, torch.arange(100))
    box = draw_boxes(u, ViewsConfig(), torch.full((200,), height), torch.full((200,), width))
    top, left, h, w = box.unbind(1)
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_crop_box_fallback_equals_torchvision():
    """No proposal fits an image 100 times as wide as high: the central box of the largest allowed ratio."""
    u = torch.full((1, geometry.NUMBERS), 0.999, dtype=torch.float64)
    box = geometry.crop_box(u, torch.tensor([10]), torch.tensor([1000]), (0.9, 1), (3 / 4, 4 / 3))
    assert box.tolist() == [[0, (1000 - 13) // 2, 10, 13]]


@pytest.mark.parametrize("box", [(0, 0, 40, 52), (3, 5, 30, 40), (7, 1, 9, 50), (10, 20, 5, 6)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_flip_equals_torchvision(images, box, flip):
    top, left, h, w = box
    every, flips = torch.arange(6), torch.full((6,), flip)
    ours = geometry.crop_resize(images.permute(0, 2, 3, 1), every, torch.tensor(box).expand(6, 4), flips, 32)
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


def test_jitter_in_random_order_equals_torchvision_sample_by_sample(images):
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


def test_a_view_does_not_depend_on_the_rest_of_its_batch(images):
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


def test_the_whole_chain_equals_torchvision_sample_by_sample(images):
    """torchvision's functions, called with the parameters that were drawn, in the order of the chain."""
    index, height, width = torch.arange(6), 40, 52
    u = draw_uniforms(3, 1, index)
    p = draw_parameters(u, EVERYTHING)
    boxes = draw_boxes(u, EVERYTHING, torch.full((12,), height), torch.full((12,), width))
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
        # Solarize jumps at its threshold: pixels within rounding of it may fall on either side.
        unsure = (abs(x - operations.SOLARIZE_THRESHOLD) < 2 / 255) & p.solarize_N[n]
        assert (ours[n] - want)[~unsure].abs().max() < 2 / 255 / min(EVERYTHING.std)
        assert (ours[n] - want)[~unsure].abs().mean() < 2e-3
    assert all(column.any() and not column.all() for column in (p.flip_N, p.jitter_N, p.gray_N, p.blur_N))


@pytest.mark.parametrize("shape", [(40, 52), (32, 32), (90, 20), (5, 200)])
def test_the_cpu_kernel_equals_the_portable_chain(shape):
    """Enlarging, shrinking and both; rounding apart. A hue may turn where the channels are almost equal."""
    image = torch.randint(0, 256, (16, *shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views, index = PairedViews(EVERYTHING, seed=3), torch.arange(16)
    for epoch in range(4):
        u = draw_uniforms(3, epoch, index)
        drawn = draw_parameters(u, EVERYTHING)
        boxes = views._boxes(u, image, torch.full((16,), 61), torch.full((16,), 83))
        ours, want = (chain(image, boxes, drawn, EVERYTHING) for chain in (cpu.make_views, portable_views))
        assert (abs(ours - want) > 1e-4).float().mean() < 1e-3
        pair = image[:, None, :5, :5].repeat(1, 2, 7, 7, 1)[:, :, :32, :32]
        ours, want = (chain(pair, None, drawn, EVERYTHING) for chain in (cpu.make_views, portable_views))
        assert (abs(ours - want) > 1e-4).float().mean() < 1e-3


def test_views_on_the_cpu_do_not_depend_on_the_threads(images):
    views, before = PairedViews(EVERYTHING, seed=1), torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(views(uint8(images), torch.arange(6), 0))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


@pytest.mark.parametrize("make", [cpu.make_views, portable_views], ids=["kernel", "portable"])
def test_one_view_is_the_first_of_two_in_every_bit(images, monkeypatch, make):
    """Cropped here and cropped by the loader; of the second view no number is drawn and no pixel made."""
    monkeypatch.setattr(cpu, "make_views", make)
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


def test_crop_is_drawn_in_source_pixels_whatever_the_canvas(images):
    """The same picture stored at its own size and squashed to a square shows the same region."""
    big = torch.nn.functional.interpolate(images, (200, 260), mode="bilinear")
    canvas = tvf.resize(big, [160, 160], antialias=True)
    views = PairedViews(PLAIN.model_copy(update={"scale": (0.3, 1.0)}), seed=0)
    index, size = torch.arange(6), (torch.full((6,), 200), torch.full((6,), 260))
    from_source = views(uint8(big), index, 0)[0]
    from_canvas = views(uint8(canvas), index, 0, *size)[0]
    assert (from_source - from_canvas).abs().mean() < 0.01


def test_views_cropped_by_the_loader_get_flip_and_colour_here(images):
    size = 32
    pair = torch.stack([uint8(images)[:, :size, :size], uint8(images)[:, -size:, -size:]], dim=1)
    plain = PairedViews(PLAIN.model_copy(update={"flip": 0.5}), seed=0)
    index = torch.arange(6)
    flips = draw_parameters(draw_uniforms(0, 0, index), plain.views).flip_N.chunk(2)
    for view, out in enumerate(plain(pair, index, 0)):
        flipped = flips[view]
        assert flipped.any() and not flipped.all()
        want = pair[:, view].permute(0, 3, 1, 2) / 255
        want = torch.where(flipped[:, None, None, None], want.flip(3), want)
        torch.testing.assert_close(out, want, **CLOSE)


def test_zero_probability_switches_everything_off(images):
    views = PairedViews(PLAIN.model_copy(update={"scale": (1, 1), "ratio": (1, 1)}), seed=0)
    square = uint8(images[:, :, :32, :32])
    first, second = views(square, torch.arange(6), 0)
    torch.testing.assert_close(first, square.permute(0, 3, 1, 2) / 255, **CLOSE)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_clean_view_is_a_plain_antialiased_resize(images):
    views = ViewsConfig(size=24)
    clean = eval_transform(views)(uint8(images))
    want = tvf.resize(uint8(images).permute(0, 3, 1, 2) / 255, [24, 24], antialias=True)
    want = tvf.normalize(want, views.mean, views.std)
    torch.testing.assert_close(clean, want, rtol=0, atol=2 / 255 / min(views.std))
    assert eval_transform(views)(uint8(images[:, :, :24, :24])).shape == (6, 3, 24, 24)


def test_the_centre_is_torchvision_s_resize_and_centre_crop():
    """Of a smooth picture, as torchvision crops at whole pixels behind the resize, and this cuts between them."""
    y, x = torch.meshgrid(torch.arange(375.0), torch.arange(500.0), indexing="ij")
    picture = torch.stack([x / 2, y / 2, (x + y) / 4]).clamp(0, 255).to(torch.uint8)
    views = ViewsConfig(size=224, clean="center", mean=(0, 0, 0), std=(1, 1, 1))
    want = tvf.center_crop(tvf.resize(picture[None] / 255, 256, antialias=True), 224)
    clean = eval_transform(views)
    torch.testing.assert_close(clean(picture.permute(1, 2, 0)[None]), want, rtol=0, atol=1.5 / 255)
    # From a canvas: squashed before, so the centre of the source is no square there.
    canvas = tvf.resize(picture[None], [256, 256], antialias=True).permute(0, 2, 3, 1)
    source = torch.tensor([375]), torch.tensor([500])
    torch.testing.assert_close(clean(canvas, *source), want, rtol=0, atol=2.5 / 255)
    # The same on the device's path.
    box = eval_box(*source, "center") * torch.tensor([256 / 375, 256 / 500] * 2)
    none = torch.zeros(1, dtype=torch.int64)
    portable = crop_resize(canvas, none, box, none.bool(), 224) / 255
    torch.testing.assert_close(clean(canvas, *source), portable, **CLOSE)


@pytest.mark.slow
def test_views_compile_in_one_graph_with_the_same_parameters(images):
    views = PairedViews(ViewsConfig(size=32), seed=1)
    args = uint8(images), torch.arange(6), torch.tensor(3)
    for ours, compiled in zip(views(*args), torch.compile(views, fullgraph=True, dynamic=False)(*args)):
        assert (abs(ours - compiled) > 1e-4).float().mean() < 1e-3


@pytest.mark.slow
def test_compiled_noise_has_the_same_bits():
    args = 3, torch.tensor(7), torch.arange(5), 1, 3, 20
    compiled = torch.compile(randomness.normals, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(*args), randomness.normals(*args))
