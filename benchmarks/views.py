"""Measure views per second, compared with kornia, AlbumentationsX and torchvision, on a CPU or a GPU.

    PYTHONPATH=. OMP_NUM_THREADS=2 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 \
        .cache/peers/bin/python benchmarks/views.py --rounds 3            # the Python of loading_peers.py
    python benchmarks/views.py --device cuda [--batch 256] [--json FILE]  # compares with what is installed

From canvases of 256 px to two views of 224 px, with the chain and the strengths of the shipped recipes: crop, flip,
color jitter (p 0.8), grayscale (0.2), blur of radius 6 (1.0 and 0.1), solarize (0 and 0.2), normalize. kornia runs
eagerly, as its users run it, and with torch.compile, which breaks its graph at the crop. It draws the order of the
jitter once per batch, fastssl once per sample. AlbumentationsX (not antialiased) and torchvision get one image at a
time, in threads, on a CPU only: for a batch, torchvision would draw once. The settings of malloc keep freed memory:
kornia takes 6 to 40 times as many page faults without. "from blocks": of the same canvases in BC4. The chains take
turns; the first calls of each, which may compile, are not timed. On a GPU the views are bf16 and channels_last, torch's
profiler counts the kernels that one batch launches, and GB/s are those of the canvases and the views alone, each moved
once.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from loading_handmade import albumentations_chains, torchvision_chains
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
        table["kornia, compiled"] = torch.compile(kornia_pair, dynamic=False)
        if device.type == "cpu":
            # Its classes share methods, which are compiled once for each class. On a GPU that takes minutes.
            torch._dynamo.config.recompile_limit = 64
    if device.type == "cpu":
        table["torchvision, threads"] = torchvision_threads(image)
        if importlib.util.find_spec("albumentations"):
            table["AlbumentationsX, threads"] = albumentations_threads(image)
    return table


def torchvision_threads(image: Tensor) -> Callable:
    image_BCHW, chains = image.permute(0, 3, 1, 2).contiguous(), torchvision_chains()

    def make(index: int, out: list[np.ndarray]) -> None:
        for view, chain in zip(out, chains):
            torch.from_numpy(view[index]).copy_(chain(image_BCHW[index]))

    return in_threads(len(image), make)


def albumentations_threads(image: Tensor) -> Callable:
    image_BHWC, chains = image.numpy(), albumentations_chains(colors=True)

    def make(index: int, out: list[np.ndarray]) -> None:
        for view, chain in zip(out, chains):
            view[index] = chain(image=image_BHWC[index])["image"].transpose(2, 0, 1)

    return in_threads(len(image), make)


def in_threads(count: int, make: Callable[[int, list[np.ndarray]], None]) -> Callable:
    """`make` writes the views of one image into those of the batch."""
    threads = torch.get_num_threads()
    # One thread within each of these; the setting is the thread's own.
    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    out = [np.empty((count, 3, SIZE, SIZE), np.float32) for _ in range(2)]

    def make_piece(indices: np.ndarray) -> None:
        for index in indices:
            make(index, out)

    def chain() -> list[np.ndarray]:
        for _ in pool.map(make_piece, np.array_split(np.arange(count), 4 * threads)):
            pass
        return out

    return chain


class Rate(NamedTuple):
    per_second: float
    per_core_second: float  # of CPU time of the process


def views_per_second(chain: Callable, image: Tensor, seconds: float) -> Rate:
    made, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        chain()
        made += 2 * len(image)
        synchronize(image.device)
    return Rate(made / (time.perf_counter() - start), made / (time.process_time() - cpu))


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
            for _ in range(3 if name.startswith("kornia, compiled") and device.type == "cpu" else 1):
                made = chain()  # what kornia draws decides which of its graphs is compiled
            bytes_of_batch[name] = source.nbytes + sum(view.nbytes for view in made)
            synchronize(device)
        except Exception as error:  # of a compiler, of many types
            if not name.endswith("compiled"):
                raise
            print(f"{name:<34} does not compile here: {str(error).splitlines()[0]}")
            del table[name]
    rates: dict[str, list[Rate]] = {}
    for _ in range(arguments.rounds):
        for name, chain in table.items():
            rates.setdefault(name, []).append(views_per_second(chain, image, arguments.seconds))
    rows = []
    per_second = {name: [rate.per_second for rate in found] for name, found in rates.items()}
    for name, found in per_second.items():
        row = {"chain": name, "views_per_second": statistics.median(found), "low": min(found), "high": max(found)}
        row["per_core_second"] = statistics.median(rate.per_core_second for rate in rates[name])
        text = f"{name:<34} {row['views_per_second']:8.0f} views/s ({row['low']:.0f} to {row['high']:.0f})"
        text += f", {row['per_core_second']:.0f} per core-second"
        if "kornia" in rates:
            row["per_kornia"] = statistics.median(rate / peer for rate, peer in zip(found, per_second["kornia"]))
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
