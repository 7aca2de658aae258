"""Crops that the loader cuts on the CPU from planes, compared with an exact resize in float64."""

import ctypes
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.beton import bc4, jpeg
from fastssl.beton.format import BC4, JPG, RAW, bc4_bytes
from fastssl.common.geometry import FLIP
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.loading import BetonLoader, kernels
from fastssl.loading.blocks import BlockImages
from fastssl.loading.crops import LARGEST_SHRINK, new_scratch, scratch_bytes
from fastssl.recipe import JitterConfig, PerViewConfig, ViewsConfig
from fastssl.views import PairedViews

ROUNDED = 0.6  # half a gray level, and what 16-bit numbers add to it
PLAIN = ViewsConfig(
    size=48, jitter=JitterConfig(p=0), gray=0, first=PerViewConfig(), second=PerViewConfig(),
    mean=(0, 0, 0), std=(1, 1, 1),
)  # fmt: skip
YCBCR_444, YCBCR_422, YCBCR_420, GRAY, YCBCR_440, YCBCR_411 = range(6)  # turbojpeg's numbers


def photo(height, width, seed=0):
    """Smooth, with noise and saturated colors."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.BICUBIC)).astype(float)
    return (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def turbojpeg_bytes(pixels, subsampling):
    lib = jpeg.turbojpeg()
    lib.tjInitCompress.restype = lib.tjAlloc.restype = ctypes.c_void_p
    handle, out, size = ctypes.c_void_p(lib.tjInitCompress()), ctypes.c_void_p(), ctypes.c_ulong()
    pixels = np.ascontiguousarray(pixels)
    failed = lib.tjCompress2(
        handle, ctypes.c_void_p(pixels.ctypes.data), pixels.shape[1], 0, pixels.shape[0], jpeg.TJPF_RGB,
        ctypes.byref(out), ctypes.byref(size), subsampling, 90, 0,
    )  # fmt: skip
    assert not failed
    content = ctypes.string_at(out, size.value)
    lib.tjFree(out)
    lib.tjDestroy(handle)
    return content


def pillow_bytes(pixels, mode, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def boxes_of(height, width, count=6):
    """The whole image, its corners, single pixels, and boxes between pixels."""
    generator = np.random.default_rng(1)
    boxes = [
        (0, 0, height, width),
        (0, 0, 1, 1),
        (height - 1, width - 1, 1, 1),
        (height // 2, 0, height - height // 2, 1),
    ]
    for _ in range(count - len(boxes)):
        h, w = generator.uniform(0.3, 1, 2) * (height, width)
        top, left = generator.random(2) * (height - h, width - w)
        boxes.append((top, left, h, w))
    return np.array(boxes, np.float64)


def weights(start, length, in_size, out_size):
    """(out, in) float64: an antialiased triangle filter, cut off at the pixels that the box touches."""
    scale = length / out_size
    reach = max(scale, 1)
    pixel = np.arange(in_size)
    center = start + (np.arange(out_size)[:, None] + 0.5) * scale
    triangle = (1 - abs(pixel + 0.5 - center) / reach).clip(min=0)
    triangle[:, (pixel < np.floor(start)) | (pixel >= np.ceil(start + length - 1e-9))] = 0
    return triangle / triangle.sum(1, keepdims=True)


def resized(plane, box, spans, size):
    top, left, height, width = box / np.tile(spans, 2)
    rows, columns = weights(top, height, plane.shape[0], size), weights(left, width, plane.shape[1], size)
    return rows @ plane.astype(np.float64) @ columns.T


def exact_crop(planes, spans, height, width, box, flip, size):
    """Float RGB: each plane resized at its own resolution, then converted as JFIF says."""
    chroma = -(-height // spans[0]), -(-width // spans[1])
    y = resized(planes[0][:height, :width], box, (1, 1), size)
    cb, cr = (resized(plane[: chroma[0], : chroma[1]], box, spans, size) - 128 for plane in planes[1:])
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2).clip(0, 255)
    return rgb[:, ::-1] if flip else rgb


def cut(contents, shapes, boxes, size, modes=JPG, flips=None, eval_boxes=False):
    """The crops (B, V, size, size, 3) and the statuses of images, given as their stored bytes."""
    file = np.frombuffer(b"".join(contents), np.uint8)  # read-only, as a mapped file
    sizes = np.array([len(content) for content in contents])
    shape_B2 = np.array(shapes, np.int64)
    flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
    memory = np.full((len(contents), *boxes.shape[1:2], size, size, 3), 7, np.uint8)
    arrays = kernels.DecodeArrays(
        file=file, start_B=np.cumsum(sizes) - sizes, size_B=sizes,
        mode_B=np.broadcast_to(np.uint8(modes), len(contents)).copy(), shape_B2=shape_B2, box_BV4=boxes, flip_BV=flips,
        out=memory, status_B=np.full(len(contents), kernels.FAILED, np.int8), counter=np.zeros(1, np.int64),
    )  # fmt: skip
    kernel = kernels.decode_eval_crops if eval_boxes else kernels.decode_crops
    kernel(arrays, new_scratch(shape_B2, size))
    return arrays.out, arrays.status_B


@pytest.mark.parametrize("subsampling", [YCBCR_444, YCBCR_422, YCBCR_420, YCBCR_440, YCBCR_411])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(61, 83, 32), (40, 16, 45), (1, 1, 8), (2, 3, 16), (3, 300, 17), (64, 7, 1)]
)
def test_crops_of_a_jpeg_are_those_of_its_planes(height, width, size, subsampling):
    content = turbojpeg_bytes(photo(height, width), subsampling)
    decoded = jpeg.decode_planes(content, 1, (height, width))
    boxes = boxes_of(height, width)
    flips = np.arange(len(boxes)) % 2 == 1
    crops, statuses = cut([content], [(height, width)], boxes[None], size, flips=flips[None])
    assert statuses.tolist() == [kernels.DECODED]
    for box, flip, crop in zip(boxes, flips, crops[0]):
        want = exact_crop(decoded.planes, jpeg.SUBSAMPLING[subsampling], height, width, box, flip, size)
        assert np.abs(crop - want).max() < ROUNDED


@pytest.mark.parametrize("side", [8, 48, 64])
@pytest.mark.parametrize("size", [5, 32, 50])
def test_crops_of_blocks_are_those_of_its_planes(side, size):
    """Of any bytes. Only the blocks of the boxes are decoded, so every box comes alone."""
    blocks = np.random.default_rng(side).integers(0, 256, side * side * 3 // 4, np.uint8)
    y, c = BlockImages(torch.from_numpy(blocks)[None], side).planes()
    planes = y[0, :, :, 0].numpy(), c[0, :, :, 0].numpy(), c[0, :, :, 1].numpy()
    for box in boxes_of(side, side, 8):
        crops, _ = cut([blocks.tobytes()], [(side, side)], box[None, None], size, BC4, flips=np.array([[True]]))
        assert np.abs(crops[0, 0] - exact_crop(planes, (2, 2), side, side, box, True, size)).max() < ROUNDED


def test_other_images_are_cropped_as_pixels_and_mirrored():
    """Gray, CMYK and RGB JPEGs, pixels, and images that are 64 times as large as the crop."""
    pixels = photo(40, 52)
    large = photo(8 * LARGEST_SHRINK + 1, 20)
    contents = [
        pillow_bytes(pixels, "L"), pillow_bytes(pixels, "CMYK"), pillow_bytes(pixels, "RGB", keep_rgb=True),
        pixels.tobytes(), turbojpeg_bytes(large, YCBCR_420),
    ]  # fmt: skip
    shapes = [(40, 52)] * 4 + [large.shape[:2]]
    modes = [JPG, JPG, JPG, RAW, JPG]
    boxes = np.stack([boxes_of(*shape) for shape in shapes])
    for size in (8, 9):  # with 9, the large one is cropped as planes
        mirrored, statuses = cut(contents, shapes, boxes, size, modes, flips=np.ones(boxes.shape[:2], bool))
        plain, plain_statuses = cut(contents, shapes, boxes, size, modes, eval_boxes=True)
        assert (statuses == plain_statuses).all()
        assert statuses.tolist() == [kernels.DECODED, kernels.FAILED, *[kernels.DECODED] * 3]
        equal = (mirrored == plain[..., ::-1, :]).all(axis=(1, 2, 3, 4))
        assert equal[[0, 2, 3]].all() and equal[4] == (size == 8)


def test_nothing_is_written_after_the_last_crop():
    """A vector may end beyond a row, but not beyond the crop."""
    content = turbojpeg_bytes(photo(40, 52), YCBCR_420)
    for size in (1, 5, 15, 16, 17, 33):
        memory = np.full(2 * size * size * 3 + 200, 7, np.uint8)
        boxes = boxes_of(40, 52, 5)[None, 4:]
        arrays = kernels.DecodeArrays(
            file=np.frombuffer(content, np.uint8), start_B=np.zeros(1, np.int64), size_B=np.array([len(content)]),
            mode_B=np.array([JPG], np.uint8), shape_B2=np.array([[40, 52]]), box_BV4=boxes,
            flip_BV=np.zeros((1, 1), bool), out=memory[: size * size * 3].reshape(1, 1, size, size, 3),
            status_B=np.zeros(1, np.int8), counter=np.zeros(1, np.int64),
        )  # fmt: skip
        kernels.decode_crops(arrays, new_scratch(arrays.shape_B2, size))
        assert (memory[size * size * 3 :] == 7).all()
        assert (arrays.out[0] == cut([content], [(40, 52)], boxes, size)[0][0]).all()


def test_flat_images_stay_flat():
    """The weights of a position add up to 1, for many of them too; white does not overflow."""
    for level in (0, 1, 128, 254, 255):
        contents = [turbojpeg_bytes(np.full((h, w, 3), level, np.uint8), YCBCR_420) for h, w in [(500, 17), (17, 500)]]
        shapes = [(500, 17), (17, 500)]
        boxes = np.stack([boxes_of(*shape) for shape in shapes])
        for size in (8, 24, 300):
            assert (cut(contents, shapes, boxes, size)[0] == level).all()


def damaged_versions(content):
    """Cut off, with other bytes, of another size, not a JPEG."""
    generator = np.random.default_rng(0)
    versions = [content[: len(content) * part // 8] for part in range(1, 8)]
    for _ in range(60):
        changed = bytearray(content)
        for at in generator.integers(2, len(content), 3):
            changed[at] = generator.integers(256)
        versions.append(bytes(changed))
    return [*versions, turbojpeg_bytes(photo(30, 52), YCBCR_420), b"", bytes(100)]


def test_damaged_jpegs_have_the_status_of_their_pixels_and_change_no_other():
    good = turbojpeg_bytes(photo(40, 52), YCBCR_420)
    contents = [content for bad in damaged_versions(good) for content in (bad, good)]
    shapes = [(40, 52)] * len(contents)
    boxes = np.stack([boxes_of(40, 52)] * len(contents))
    crops, statuses = cut(contents, shapes, boxes, 24)
    _, want = cut(contents, shapes, boxes, 24, eval_boxes=True)
    assert statuses.tolist() == want.tolist()
    assert {kernels.DECODED, kernels.WARNED, kernels.FAILED} == set(statuses.tolist())
    assert (statuses[1::2] == kernels.DECODED).all() and (crops[1::2] == crops[1]).all()
    assert (crops[statuses == kernels.FAILED] == 7).all(), "a failed image was cropped"


def test_blocks_of_another_size_fail():
    boxes = np.stack([boxes_of(48, 48)] * 2)
    contents = [bytes(bc4_bytes(48) - 8), bytes(bc4_bytes(48))]
    assert cut(contents, [(48, 48)] * 2, boxes, 24, BC4)[1].tolist() == [kernels.FAILED, kernels.DECODED]


@pytest.mark.parametrize("kind", ["full", "canvas_jpeg", "canvas_bc4"])
def test_the_loader_mirrors_what_the_views_would(kind, request):
    path = request.getfixturevalue(kind) / "train.beton"
    flipped, plain = (
        BetonLoader(path, 16, seed=3, crop="cpu", views=PLAIN.model_copy(update={"flip": flip})) for flip in (0.5, 0.0)
    )
    views = PairedViews(flipped.views, seed=3)
    for loader in (flipped, plain):
        loader.set_epoch(2)
    seen = []
    for batch, other in zip(flipped, plain, strict=True):
        for view, made in enumerate(views(batch.image, batch.index, 2)):
            u_BN = uniforms(3, 2, batch.index, view, FLIP + 1, AUGMENTATION)
            for b, is_flipped in enumerate((u_BN[:, FLIP] < 0.5).tolist()):
                want = other.image[b, view].flip(1) if is_flipped else other.image[b, view]
                assert torch.equal(batch.image[b, view], want)
                seen.append(is_flipped)
            # The views leave it as it is.
            assert (255 * made.permute(0, 2, 3, 1) - batch.image[:, view]).abs().max() < 0.01
    assert 0.3 < np.mean(seen) < 0.7


def test_crops_of_blocks_equal_the_views_of_the_same_blocks(canvas_bc4):
    """Boxes, flips and resampling are those of the views."""
    path = canvas_bc4 / "train.beton"
    cropped = BetonLoader(path, 16, seed=3, crop="cpu", views=PLAIN)
    views = PairedViews(PLAIN, seed=3)
    for crops, blocks in zip(cropped, BetonLoader(path, 16, seed=3), strict=True):
        made = views(blocks.image, blocks.index, 0, blocks.height, blocks.width)
        for view in (0, 1):
            difference = (255 * made[view].permute(0, 2, 3, 1) - crops.image[:, view]).abs()
            # The views round their boxes to float32, so that a border may touch another pixel.
            assert difference.mean() < 0.26 and (difference > ROUNDED).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["full", "canvas_jpeg", "canvas_bc4"])
def test_crops_do_not_depend_on_the_number_of_threads(kind, request):
    path = request.getfixturevalue(kind) / "train.beton"
    loaders = [BetonLoader(path, 16, crop="cpu", views=PLAIN, workers=workers) for workers in (1, 3)]
    for one, three in zip(*loaders, strict=True):
        assert torch.equal(one.image, three.image)


def test_the_memory_of_a_thread_is_estimated():
    shape_N2 = np.array([[30, 500], [400, 40]])
    scratch = new_scratch(shape_N2, 50)
    assert sum(array.nbytes for array in scratch) == scratch_bytes(shape_N2, 50)
    assert scratch.image.nbytes >= 3 * 403 * 43 and scratch.lines.shape[1] > 500


def error_after_a_warning(content):
    """A JPEG at whose start turbojpeg warns of the JFIF version, and then fails, as a quantization table is missing."""
    damaged = bytearray(content)
    damaged[11] = 9  # the JFIF version
    frame = damaged.index(b"\xff\xc0")
    damaged[frame + 12] = 3  # the table of the first component
    return bytes(damaged)


@pytest.mark.parametrize("eval_boxes", [False, True])
def test_an_error_after_a_warning_is_an_error(eval_boxes):
    """turbojpeg reports it as a warning, and writes nothing: the crop would be of the pixels of another image."""
    good = turbojpeg_bytes(photo(40, 52), YCBCR_420)
    warned = bytearray(good)
    warned[11] = 9
    contents = [good, error_after_a_warning(good), bytes(warned), good]
    boxes = np.stack([boxes_of(40, 52)] * len(contents))
    crops, statuses = cut(contents, [(40, 52)] * len(contents), boxes, 24, eval_boxes=eval_boxes)
    assert statuses.tolist() == [kernels.DECODED, kernels.FAILED, kernels.WARNED, kernels.DECODED]
    assert (crops[1] == 7).all(), "a failed image was cropped"
    assert (crops[3] == crops[0]).all()
    assert np.abs(crops[2].astype(int) - crops[0]).mean() < 1, "after a warning in the header, pixels are used"


def test_blocks_are_decoded_without_crops_too():
    """The profiler times decoding without them."""
    blocks = bc4.encode(photo(48, 48))
    scratch = new_scratch(np.array([[48, 48]]), 24)
    scratch.image[:] = 7
    arrays = kernels.DecodeArrays(
        file=np.frombuffer(blocks.tobytes(), np.uint8), start_B=np.zeros(1, np.int64),
        size_B=np.array([len(blocks)]), mode_B=np.array([BC4], np.uint8), shape_B2=np.array([[48, 48]]),
        box_BV4=np.empty((1, 0, 4)), flip_BV=np.zeros((1, 0), bool), out=np.empty((1, 0, 24, 24, 3), np.uint8),
        status_B=np.full(1, kernels.FAILED, np.int8), counter=np.zeros(1, np.int64),
    )  # fmt: skip
    kernels.decode_crops(arrays, scratch)
    assert arrays.status_B[0] == kernels.DECODED
    assert len(np.unique(scratch.image[: 48 * 48])) > 20, "luma was not decoded"
