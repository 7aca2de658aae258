"""The Triton kernels of the views in Triton's interpreter, compared with the torch chain; no GPU is needed.

The tests run in one new process, because the interpreter has to be chosen before Triton is imported.
"""

import ctypes
import math
import mmap
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from fastssl.beton.format import bc4_bytes
from fastssl.loading import ImageRows
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import PerViewConfig, ViewsConfig
from fastssl.views import PairedViews, eval_transform, kernel_choice
from fastssl.views.operations import SOLARIZE_THRESHOLD, unnormalize
from fastssl.views.paired import torch_views
from fastssl.views.parameters import HUE, ORDERS, Parameters, draw_parameters, draw_uniforms, no_augmentation

# In normalized units, compared with the torch chain. fp32: other orders of the same sums.
FP32, BF16, FP16 = 1e-5, 0.02, 2e-3
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux on x86-64, which the module mmap lacks in older versions
CANARY = 77  # in bytes that nothing may write


@pytest.fixture(scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as process:
        patch.setenv("TRITON_INTERPRET", "1")
        process.submit(torch.set_num_threads, 1).result()
        yield process


def smooth_images(batch, height, width):
    """(B, H, W, 3) uint8, with edges and gradients, black and white parts."""
    coarse = torch.rand(batch, 3, height // 5 + 1, width // 5 + 1, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (images * 1.2 - 0.1).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous()


def random_blocks(batch, side):
    """Any bytes, so blocks of both modes."""
    generator = torch.Generator().manual_seed(0)
    return BlockImages(torch.randint(0, 256, (batch, bc4_bytes(side)), dtype=torch.uint8, generator=generator), side)


def parameters(count, **given):
    """Parameters of N views under which no operation applies, but for those given."""
    return no_augmentation(count, torch.device("cpu"))._replace(**given)


def make(image, box_N4, drawn, views, **options):
    from fastssl.views.gpu import parameter_table, triton_views

    return triton_views(image, parameter_table(image, box_N4, drawn), views, **options)


def largest_difference(made, image, box_N4, drawn, views):
    """To the torch chain; pixels that are at the threshold of solarize, up to rounding, are left out."""
    want = torch_views(image, box_N4, drawn, views)
    assert made.shape == want.shape and made.isfinite().all()
    before = torch_views(image, box_N4, drawn._replace(solarize_N=torch.zeros_like(drawn.solarize_N)), views)
    rounding = 1e-5 if made.dtype == torch.float32 else 1e-3
    unsure = (unnormalize(before, views) - SOLARIZE_THRESHOLD).abs() < rounding
    return (made.float() - want).abs()[~(unsure & drawn.solarize_N[:, None, None, None])].max().item()


BLURRED = ViewsConfig(
    size=16, first=PerViewConfig(blur=0.5, solarize=0.5), second=PerViewConfig(blur=0.5, solarize=0.5)
)

SHARP = ViewsConfig(size=16, first=PerViewConfig(solarize=0.5), second=PerViewConfig())


def check_operations():
    def check(name, count, **given):
        image, drawn = smooth_images(count, 20, 24), parameters(count, **given)
        box = torch.tensor([2.0, 3.0, 15.0, 18.0]).expand(count, 4)
        views = BLURRED if "blur_N" in given else SHARP
        made = make(image, box, drawn, views)
        assert largest_difference(made, image, box, drawn, views) < FP32, name
        assert (name == "nothing") == torch.equal(made, make(image, box, parameters(count), views)), name

    yes, sigma = torch.ones(4, dtype=torch.bool), torch.tensor([0.1, 0.5, 1.0, 2.0])
    cases = {"flip": {"flip_N": yes}, "gray": {"gray_N": yes}, "solarize": {"solarize_N": yes}}
    cases["blur"] = {"blur_N": yes, "sigma_N": sigma}
    for operation in range(4):
        factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(4, 1)
        factors[:, operation] = torch.linspace(-0.5, 0.5, 4) if operation == HUE else torch.linspace(0, 2, 4)
        order = torch.tensor([operation] + [other for other in range(4) if other != operation]).expand(4, 4)
        cases[f"jitter {operation}"] = {"jitter_N": yes, "order_N4": order, "factor_N4": factors}
    for name, given in {"nothing": {}, **cases}.items():
        check(name, 4, **given)
    check("everything", 4, **{key: value for case in cases.values() for key, value in case.items()})
    factors = torch.tensor([0.6, 1.4, 0.7, 0.1]) + torch.linspace(-0.3, 0.3, 24)[:, None]
    check("every order", 24, jitter_N=yes.repeat(6), order_N4=torch.tensor(ORDERS), factor_N4=factors)


def test_every_operation_and_every_order_equals_the_torch_chain(interpreter):
    interpreter.submit(check_operations).result()


def check_size(image, size, tile):
    from fastssl.views import gpu

    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "TILE", tile)
    views = ViewsConfig(size=size, first=PerViewConfig(blur=1.0, solarize=0.5), second=PerViewConfig(blur=0.3))
    batch, height, width, _ = image.shape
    count = 2 if batch > 1 else 1
    drawn = draw_parameters(draw_uniforms(3, 0, torch.arange(batch), count), views, count)
    # The whole image, its corners, one pixel, less than a pixel, and boxes with fractions.
    edge_cases = [
        (0, 0, height, width), (0, 0, height / 2, width / 3), (height / 2, width / 2, height / 2, width / 2),
        (height - 1, width - 1, 1, 1), (0.25, 0.25, 0.5, 0.5), (1.3, 2.7, height - 2.9, width - 3.1),
    ]  # fmt: skip
    box = torch.tensor(edge_cases).repeat(math.ceil(len(drawn.flip_N) / 6), 1)[: len(drawn.flip_N)]
    for dtype, limit in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        made = make(image, box, drawn, views, dtype=dtype)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert largest_difference(made, image, box, drawn, views) < limit
    patch.undo()


@pytest.mark.parametrize(
    "size, batch, height, width, tile",
    [(8, 3, 64, 48, 32), (8, 3, 8, 8, 8), (31, 3, 20, 90, 32), (57, 2, 64, 64, 32), (224, 1, 256, 256, 128)],
)
def test_every_size_equals_the_torch_chain(interpreter, size, batch, height, width, tile):
    """Enlarged and reduced, with tiles inside and across the border."""
    interpreter.submit(check_size, smooth_images(batch, height, width), size, tile).result()


LONG = (pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 64, 32), (31, 24, 8), (57, 64, 32)))


@pytest.mark.parametrize("size, side, tile", [(16, 24, 32), (40, 8, 64), *LONG])
def test_views_of_random_blocks_equal_the_torch_chain_at_every_size(interpreter, size, side, tile):
    """Also where an image has one block of chroma only."""
    interpreter.submit(check_size, random_blocks(3, side), size, tile).result()


def check_every_block():
    """Each block has another pair of endpoints, and twice each index. The crop keeps the pixels as they are."""
    from fastssl.views import gpu

    side = 4 * 256
    images = random_blocks(1, side)
    pairs = torch.arange(256 * 256)
    indices = torch.tensor([0b10001000, 0b11000110, 0b11111010]).repeat(2)  # 0, 1, 2 ... 7 and again
    blocks = torch.stack([pairs // 256, pairs % 256, *indices[:, None].expand(6, len(pairs))], dim=1).byte()
    images.blocks[:, : blocks.numel()] = blocks.flatten()
    box, views = torch.tensor([[0.0, 0, side, side]]), ViewsConfig(size=side, mean=(0.0,), std=(1.0,))
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "TILE", 256)
    made = make(images, box, parameters(1), views)
    patch.undo()
    assert (made - torch_views(images, box, parameters(1), views)).abs().max() < FP32
    gray = images.planes()[0][0, ..., 0]
    assert gray[:4, :4].unique().tolist() == [0, 255], "where both endpoints are 0, two levels are the extremes"


def test_every_pair_of_endpoints_and_every_index_equal_the_torch_chain(interpreter):
    interpreter.submit(check_every_block).result()


def check_large_set():
    """With memory that is there only where it is written: an address that is wrong by 2**32 would end the process."""
    side, rows = 64, 2**34 // bc4_bytes(64) + 2  # more than 2**31 words of 64 bits
    memory = mmap.mmap(-1, rows * bc4_bytes(side), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    images = random_blocks(2, side)
    whole = BlockImages(torch.frombuffer(memory, dtype=torch.uint8).view(rows, bc4_bytes(side)), side)
    whole.blocks[-2:] = images.blocks
    views, box = ViewsConfig(size=16), torch.tensor([[2.0, 3, 14, 15], [50, 48, 14, 16]])
    made = make(images, box, parameters(2), views)
    by_row = make(whole, box, parameters(2), views, row_B=torch.tensor([rows - 2, rows - 1]))
    assert torch.equal(made, by_row)


def test_a_resident_set_of_blocks_may_be_larger_than_a_32_bit_offset(interpreter):
    interpreter.submit(check_large_set).result()


def check_layouts_and_types():
    image, views = smooth_images(4, 24, 20), BLURRED
    box = torch.tensor([1.0, 2.0, 18.0, 15.0]).expand(8, 4)
    drawn = draw_parameters(draw_uniforms(1, 0, torch.arange(4)), views)
    plain = make(image, box, drawn, views)
    assert torch.equal(plain, make(image, box, drawn, views, memory_format=torch.contiguous_format))
    assert torch.equal(plain, make(image, box, drawn, views)), "it is not the same in a second run"
    half = make(image, box, drawn, views, dtype=torch.float16, memory_format=torch.contiguous_format)
    assert half.is_contiguous() and largest_difference(half, image, box, drawn, views) < FP16
    rows = torch.tensor([2, 0, 3, 1])
    assert torch.equal(plain, make(image[rows.argsort()], box, drawn, views, row_B=rows))
    some = Parameters(*(parameter[2:3] for parameter in drawn))
    assert torch.equal(plain[2:3], make(image[2:3], box[2:3], some, views)), "it depends on its batch"
    crops = smooth_images(8, 16, 16).unflatten(0, (4, 2))
    made = make(crops, None, drawn, views)
    assert drawn.flip_N.any() and largest_difference(made, crops, None, drawn, views) < FP32
    first = Parameters(*(parameter[:4] for parameter in drawn))
    assert torch.equal(made[:4], make(crops[:, :1], None, first, views))


def test_formats_types_rows_of_a_resident_set_and_crops_of_the_loader(interpreter):
    interpreter.submit(check_layouts_and_types).result()


def guarded(shape, dtype, memory_format, at_end):
    """A tensor between pages of memory that end the process when they are touched, and the bytes left over.

    at_end: it ends at the end of a page. Otherwise it starts at the start of one, and bytes are left over after it.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = math.ceil(size / mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole.fill_(CANARY)
    for page in (0, pages + 1):
        address = ctypes.c_void_p(whole.data_ptr() + page * mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(address, mmap.PAGESIZE, 0) == 0
    usable = whole[mmap.PAGESIZE : -mmap.PAGESIZE]
    inner, rest = (usable[-size:], usable[:-size]) if at_end else (usable[:size], usable[size:])
    inner = inner.view(dtype)
    if memory_format == torch.channels_last:
        return inner.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2), rest
    return inner.view(shape), rest


def check_bounds(at_end, in_blocks):
    from fastssl.views import gpu

    left_over = []

    class GuardedTorch:
        """The module torch, with another `empty`."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, dtype=torch.float32, device=None, memory_format=torch.contiguous_format):
            shape = tuple(shape[0]) if isinstance(shape[0], tuple) else shape
            tensor, rest = guarded(shape, dtype, memory_format, at_end)
            left_over.append(rest)
            return tensor

    def copy(tensor):
        return GuardedTorch().empty(tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor)

    views = BLURRED.model_copy(update={"size": 19})
    height, width = (24, 24) if in_blocks else (33, 21)
    # Boxes of all images that end at their borders, and one that rounding has put outside.
    box = torch.tensor(
        [
            [0, 0, height, width], [height - 5, width - 4, 5, 4], [height - 2.5, 0, 2.5, width],
            [0, width - 1, height, 1], [0, 0, 1, 1], [0, 0, height + 0.001, width + 0.001],
        ]
    )  # fmt: skip
    drawn = draw_parameters(draw_uniforms(2, 0, torch.arange(3)), views)
    drawn = drawn._replace(blur_N=torch.ones(6, dtype=torch.bool))
    image = random_blocks(3, height) if in_blocks else smooth_images(3, height, width)
    image = BlockImages(copy(image.blocks), height) if in_blocks else copy(image)
    table = copy(gpu.parameter_table(image, box, drawn))
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "torch", GuardedTorch())
    dtypes = (torch.float32,) if in_blocks else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        assert gpu.triton_views(image, table, views, dtype).isfinite().all()
    patch.undo()
    assert len(left_over) == 2 + len(dtypes) * 4 and all((rest == CANARY).all() for rest in left_over)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("at_end", [True, False])
def test_no_kernel_reads_or_writes_outside_of_its_buffers(interpreter, at_end, in_blocks):
    """It would end the interpreter's process."""
    interpreter.submit(check_bounds, at_end, in_blocks).result()


def check_wiring_of_blocks():
    kernel_choice.on_gpu = lambda stored: True
    images, index, epoch = random_blocks(2, 24), torch.tensor([3, 9]), 5
    sizes = torch.full((2,), 375), torch.full((2,), 500)
    views = ViewsConfig(size=16)
    resident = ImageRows(images[torch.tensor([1, 1, 0])], torch.tensor([2, 1]))
    paired_views, transform = PairedViews(views, seed=3), eval_transform(views)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made, by_row = (paired_views(source, index, epoch, *sizes) for source in (images, resident))
        transformed = transform(images, *sizes)
    assert paired_views.triton.works and all(torch.equal(a, b) for a, b in zip(made, by_row))
    box, drawn = paired_views.draw(images, index, epoch, *sizes)
    assert largest_difference(torch.cat(made), images, box, drawn, views) < FP32
    in_torch = eval_transform(views.model_copy(update={"kernel": "torch"}))
    torch.testing.assert_close(transformed, in_torch(images, *sizes), rtol=0, atol=FP32)
    assert torch.equal(transformed, transform(resident, *sizes))


def test_blocks_are_compared_too_and_made_where_they_are(interpreter):
    interpreter.submit(check_wiring_of_blocks).result()


def check_wiring():
    """What runs on a GPU, with `on_gpu` saying yes."""
    from fastssl.views import gpu
    from fastssl.views.gpu_kernels import SOLARIZE

    kernel_choice.on_gpu = lambda stored: True
    image, index = smooth_images(6, 40, 36), torch.tensor([3, 9, 1, 0, 7, 2])
    sizes = torch.full((6,), 375), torch.full((6,), 500)
    views = ViewsConfig(size=24)
    for count in (1, 2):
        paired_views = PairedViews(views, seed=3, count=count)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            made = paired_views(image, index, 5, *sizes)
        want = PairedViews(views, seed=3, count=count).make(image, index, 5, *sizes).chunk(count)
        assert paired_views.triton.works and len(made) == count
        for a, b in zip(made, want):
            assert ((a - b).abs() > 1e-4).float().mean() < 1e-3
        resident = ImageRows(image.flip(0), torch.arange(5, -1, -1))
        assert all(torch.equal(a, b) for a, b in zip(made, paired_views(resident, index, 5, *sizes)))

    dark = views.model_copy(update={"mean": (0.05,), "std": (0.08,)})  # so bf16 rounds values up to 12
    half = PairedViews(dark, seed=3, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert half(image, index, 5)[0].max() > 8 and half.triton.works

    launched = []
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "triton_views", lambda *a, right=gpu.triton_views, **k: launched.append(1) or right(*a, **k))
    for crop in ("squash", "center"):
        config = views.model_copy(update={"eval": crop})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            on_gpu = [eval_transform(config)(image, *sizes) for _ in range(2)]
        config = config.model_copy(update={"kernel": "torch"})
        for made in on_gpu:
            torch.testing.assert_close(made, eval_transform(config)(image, *sizes), rtol=0, atol=1e-4)
    assert len(launched) == 2 * 3, "it is compared once, and used in each batch"
    patch.undo()

    right, in_torch = gpu.triton_views, PairedViews(views, seed=3).make(image, index, 3, *sizes).chunk(2)

    def solarize_wrong(image, table, *more):
        return right(image, table, *more) + 0.1 * table[:, SOLARIZE.value, None, None, None]

    gpu.triton_views = solarize_wrong
    for kernel, warns in (("auto", True), ("triton", False), ("torch", False)):
        paired_views = PairedViews(views.model_copy(update={"kernel": kernel}), seed=3)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            first, again = (paired_views(image, index, 3, *sizes) for _ in range(2))
        given = [warning for warning in given if warning.category is UserWarning]  # numpy's are the interpreter's
        assert len(given) == warns and all(torch.equal(a, b) for a, b in zip(first, again))
        assert all(torch.equal(a, b) for a, b in zip(first, in_torch)) == (kernel != "triton")
        if warns:
            assert "differ from the torch chain's by up to 0.1 (all of these drew: " in str(given[0].message)
            assert "solarize)" in str(given[0].message)

    def fails(*arguments):
        raise RuntimeError("no ptxas")

    gpu.triton_views = fails
    with pytest.warns(UserWarning, match=r"do not run here \(no ptxas\). Torch operations make the same views"):
        PairedViews(views, seed=3)(image, index, 3, *sizes)
    with pytest.raises(RuntimeError, match="no ptxas"):
        PairedViews(views.model_copy(update={"kernel": "triton"}), seed=3)(image, index, 3, *sizes)


def test_the_first_batch_is_compared_and_a_difference_falls_back_with_a_warning(interpreter):
    interpreter.submit(check_wiring).result()
