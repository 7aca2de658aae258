"""The Triton kernels of the views, compiled for three generations of GPUs: they fit into registers, and stay small."""

from importlib.metadata import version

import pytest
import triton
from sass import compile_kernel

from fastssl.views import gpu, gpu_kernels

TRITON = "3.9.0"  # of the limits below; another version compiles to other numbers
FINISH = {f"{name}_{channel}": "fp32" for name in ("mean", "scale") for channel in "rgb"}
# Instructions of one thread, all branches counted, that makes 8 pixels of 224 px views in bf16: found + 5 %.
LIMITS = {
    "crop_kernel": {80: 1354, 90: 1372, 100: 1288},
    "crop_kernel, blocks": {80: 2417, 90: 2469, 100: 2266},
    "contrast_kernel": {80: 1058, 90: 1001, 100: 982},
    "blur_columns_kernel": {80: 418, 90: 432, 100: 432},
    "blur_rows_kernel": {80: 1075, 90: 1057, 100: 974},
}


def compiled(name, capability, out="bf16", size=224, step_C=1, step_P=3, **given):
    between = "*fp32" if out == "fp32" else "*fp16"
    tiles = triton.cdiv(size, gpu.TILE) ** 2
    types = {
        "image": (image := "*i64" if "IN_BLOCKS" in given else "*u8"), "row_B": "*i64" if "BY_ROW" in given else image,
        "table": "*fp32", "planes": between, "halfway": between, "gray_sums": "*fp32",
        "out": f"*{out}", "batch": "i32", "in_height": "i32", "in_width": "i32", **FINISH,
    }  # fmt: skip
    constants = {
        "SIZE": size, "TILE": gpu.TILE, "TILES": tiles, "TILES_2": triton.next_power_of_2(tiles), "CROPS": 1,
        "IN_BLOCKS": False, "BY_ROW": False, "STEP_C": step_C, "STEP_P": step_P, **given,
    }  # fmt: skip
    kernel = getattr(gpu_kernels, name)
    return compile_kernel(kernel, types, {k: v for k, v in constants.items() if k in kernel.arg_names}, capability)


def kernel_of(name):
    """A kernel of LIMITS: its name, and the constants that are given to it."""
    name, _, source = name.partition(", ")
    return name, {"IN_BLOCKS": True} if source else {}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", LIMITS)
def test_a_kernel_does_not_spill_registers_and_keeps_to_its_number_of_instructions(name, capability):
    kernel, given = kernel_of(name)
    code = compiled(kernel, capability, **given)
    assert not code.spills and code.registers <= 128, code  # 128: four blocks of 128 threads on a multiprocessor
    if version("triton") != TRITON:
        pytest.skip(f"the limits are those of Triton {TRITON}")
    found, limit = code.instructions.total(), LIMITS[name][capability]
    assert found <= limit, f"{name} on sm_{capability}: {found} instructions, {limit} allowed"


@pytest.mark.parametrize(
    "given",
    [{"CROPS": 2}, {"BY_ROW": True}, {"batch": 1}, {"in_height": 1}, {"IN_BLOCKS": True, "BY_ROW": True}],
)
def test_crops_of_the_loader_rows_of_a_resident_set_and_batches_of_one_compile(given):
    """Triton compiles an argument of 1 as a constant."""
    assert not compiled("crop_kernel", 90, **given).spills


@pytest.mark.parametrize("name", LIMITS)
def test_small_fp32_views_do_not_spill_either(name):
    kernel, given = kernel_of(name)
    assert not compiled(kernel, 90, "fp32", 32, 32 * 32, 1, **given).spills


def test_the_blur_reads_eight_neighboring_pixels_at_once():
    """A load for each of 13 taps and each channel that a program makes; further ones read the table."""
    for name, loads in (("blur_columns_kernel", 13), ("blur_rows_kernel", 39)):
        found = compiled(name, 90).instructions["LDG"]
        assert loads < found < loads + 20, (name, found)


def test_a_pixel_in_blocks_is_one_load():
    """Of luma, Cb and Cr for each of the 8 pixels that a thread makes; further ones read the table."""
    assert 24 < compiled("crop_kernel", 90, IN_BLOCKS=True).instructions["LDG"] < 24 + 20
