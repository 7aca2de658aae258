"""Measure views per second, compared with kornia where it is installed, on a CPU or a GPU.

    pip install kornia==0.9.0
    python benchmarks/views.py [--device cuda] [--batch 64] [--rounds 5] [--json FILE]

From canvases of 256 px to two views of 224 px, with the chain and the strengths of the shipped recipes: crop, flip,
color jitter (p 0.8), grayscale (0.2), blur of radius 6 (1.0 and 0.1), solarize (0 and 0.2), normalize. kornia runs
eagerly, as its users run it; on a GPU also with torch.compile, which breaks its graph at the crop. It draws the order
of the jitter once per batch, fastssl once per sample. "from blocks": of the same canvases in BC4. The chains take
turns; the first call of each, which may compile, is not timed. On a GPU the views are bf16 and channels_last, torch's
profiler counts the kernels that one batch launches, and GB/s are those of the canvases and the views alone, each moved
once.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.beton import bc4
from fastssl.loading.blocks import BlockImages
from fastssl.recipe import PerViewConfig, ViewsConfig
from fastssl.views import PairedViews
from fastssl.views.paired import torch_views
from fastssl.views.parameters import draw_parameters, draw_uniforms

CANVAS, SIZE = 256, 224
FROM_BLOCKS = ", from blocks"
RECIPE = ViewsConfig(size=SIZE, first=PerViewConfig(blur=1.0), second=PerViewConfig(blur=0.1, solarize=0.2))


def kornia_chain(views: ViewsConfig, own: PerViewConfig, device: torch.device) -> Callable:
    import kornia.augmentation as K

    jitter = views.jitter
    return K.AugmentationSequential(
        K.RandomResizedCrop((views.size, views.size), scale=views.scale, ratio=views.ratio),
        K.RandomHorizontalFlip(views.flip),
        K.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, p=jitter.p),
        K.RandomGrayscale(torch.tensor([0.299, 0.587, 0.114]), p=views.gray),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=own.blur),
        K.RandomSolarize(0.0, 0.0, p=own.solarize),
        K.Normalize(views.mean, views.std),
    ).to(device)


def chains(image: Tensor, blocks: BlockImages) -> dict[str, Callable]:
    device, index = image.device, torch.arange(len(image), device=image.device)
    height, width = torch.full_like(index, 375), torch.full_like(index, 500)
    epoch = torch.zeros((), dtype=torch.int64, device=device)
    drawing = PairedViews(RECIPE)

    def ours(kernel: str, compiled: bool, source: Tensor | BlockImages = image) -> Callable:
        recipe, options = RECIPE.model_copy(update={"kernel": kernel}), {}
        if device.type == "cuda":
            options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        views = PairedViews(recipe, compiled=compiled, **options)
        return lambda: views(source, index, epoch, height, width)

    def eager() -> tuple[Tensor, ...]:
        u_NU = draw_uniforms(0, epoch, index)
        box_N4 = drawing.crop_boxes(u_NU, image, height, width)
        return torch_views(image, box_N4, draw_parameters(u_NU, RECIPE), RECIPE).chunk(2)

    fast, kernel = ("fastssl, CPU kernel", "auto") if device.type == "cpu" else ("fastssl, Triton", "triton")
    table = {
        fast: ours(kernel, device.type == "cuda"),
        fast + FROM_BLOCKS: ours(kernel, device.type == "cuda", blocks),
        "fastssl, torch chain, compiled": ours("torch", compiled=True),
        "fastssl, torch chain, eager": eager,
    }
    if importlib.util.find_spec("kornia"):
        first, second = (kornia_chain(RECIPE, own, device) for own in (RECIPE.first, RECIPE.second))

        def kornia_pair() -> tuple[Tensor, Tensor]:
            x = image.permute(0, 3, 1, 2).float() / 255
            return first(x), second(x)

        table["kornia"] = kornia_pair
        if device.type == "cuda":
            table["kornia, compiled"] = torch.compile(kornia_pair, dynamic=False)
    return table


def views_per_second(chain: Callable, image: Tensor, seconds: float) -> float:
    made, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        chain()
        made += 2 * len(image)
        synchronize(image.device)
    return made / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(chain: Callable) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        chain()
        torch.cuda.synchronize()
    return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per chain and round")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(arguments.batch, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (CANVAS, CANVAS), mode="bicubic").clamp(0, 1)
    image = (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().to(device)

    in_blocks = np.stack([bc4.encode(pixels_HWC) for pixels_HWC in image.cpu().numpy()])
    blocks = BlockImages(torch.from_numpy(in_blocks).to(device), CANVAS)

    table = chains(image, blocks)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    bytes_of_batch: dict[str, int] = {}
    for name, chain in list(table.items()):
        try:
            source = blocks.blocks if name.endswith(FROM_BLOCKS) else image
            bytes_of_batch[name] = source.nbytes + sum(view.nbytes for view in chain())
            synchronize(device)
        except Exception as error:  # of a compiler, of many types
            if not name.endswith("compiled"):
                raise
            print(f"{name:<34} does not compile here: {str(error).splitlines()[0]}")
            del table[name]
    rates: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, chain in table.items():
            rates.setdefault(name, []).append(views_per_second(chain, image, arguments.seconds))
    rows = []
    for name, found in rates.items():
        row = {"chain": name, "views_per_second": statistics.median(found), "low": min(found), "high": max(found)}
        text = f"{name:<34} {row['views_per_second']:8.0f} views/s ({row['low']:.0f} to {row['high']:.0f})"
        if "kornia" in rates:
            row["per_kornia"] = statistics.median(rate / peer for rate, peer in zip(found, rates["kornia"]))
            text += f", {row['per_kornia']:.1f}x kornia"
        if device.type == "cuda":
            row["kernels"] = kernels(table[name])
            row["gb_per_second"] = bytes_of_batch[name] * row["views_per_second"] / (2 * len(image)) / 1e9
            text += f", {row['kernels']} kernels per batch, {row['gb_per_second']:.0f} GB/s"
        print(text)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
