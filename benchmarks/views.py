"""Measure views per second, compared with kornia, on a CPU or a GPU.

    pip install kornia==0.9.0
    python benchmarks/views.py [--device cuda] [--batch 64] [--rounds 5]

From canvases of 256 px to two views of 224 px, with the chain and the strengths of the shipped recipes: crop, flip,
color jitter (p 0.8), grayscale (0.2), blur of radius 6 (1.0 and 0.1), solarize (0 and 0.2), normalize. kornia runs
eagerly, as its users run it: its crop does not compile. It draws the order of the jitter once per batch, fastssl once
per sample. The chains take turns; the first call of each, which compiles, is not timed. On a GPU, torch's profiler
counts the kernels that one batch launches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import kornia
import kornia.augmentation as K
import torch
from torch import Tensor

from fastssl.recipe import PerViewConfig, ViewsConfig
from fastssl.views import PairedViews
from fastssl.views.paired import torch_views
from fastssl.views.parameters import draw_parameters, draw_uniforms

CANVAS, SIZE = 256, 224
RECIPE = ViewsConfig(size=SIZE, first=PerViewConfig(blur=1.0), second=PerViewConfig(blur=0.1, solarize=0.2))
SECONDS = 3.0  # per round


def kornia_chain(own: PerViewConfig, device: torch.device) -> Callable:
    jitter = RECIPE.jitter
    return K.AugmentationSequential(
        K.RandomResizedCrop((SIZE, SIZE), scale=RECIPE.scale, ratio=RECIPE.ratio),
        K.RandomHorizontalFlip(RECIPE.flip),
        K.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, p=jitter.p),
        K.RandomGrayscale(torch.tensor([0.299, 0.587, 0.114]), p=RECIPE.gray),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=own.blur),
        K.RandomSolarize(0.0, 0.0, p=own.solarize),
        K.Normalize(RECIPE.mean, RECIPE.std),
    ).to(device)


def chains(image: Tensor) -> dict[str, Callable]:
    device, index = image.device, torch.arange(len(image), device=image.device)
    height, width = torch.full_like(index, 375), torch.full_like(index, 500)
    epoch, views = torch.zeros((), dtype=torch.int64, device=device), PairedViews(RECIPE)
    compiled = torch.compile(views, fullgraph=True, dynamic=False)
    first, second = (kornia_chain(own, device) for own in (RECIPE.first, RECIPE.second))

    def kornia_pair() -> tuple[Tensor, Tensor]:
        x = image.permute(0, 3, 1, 2).float() / 255
        return first(x), second(x)

    def eager() -> Tensor:
        u_NU = draw_uniforms(0, epoch, index)
        return torch_views(image, views.crop_boxes(u_NU, image, height, width), draw_parameters(u_NU, RECIPE), RECIPE)

    table = {
        "fastssl, torch chain, eager": eager,
        "fastssl, torch chain, compiled": lambda: compiled(image, index, epoch, height, width),
        "kornia": kornia_pair,
    }
    if device.type == "cpu":
        table = {"fastssl, CPU kernel": lambda: views(image, index, epoch, height, width), **table}
    return table


def views_per_second(chain: Callable, image: Tensor) -> float:
    made, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
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
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(arguments.batch, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (CANVAS, CANVAS), mode="bicubic").clamp(0, 1)
    image = (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().to(device)

    print(f"torch {torch.__version__}, kornia {kornia.__version__}, {device}, {torch.get_num_threads()} threads")
    rates: dict[str, list[float]] = {}
    table = chains(image)
    for chain in table.values():
        chain()
        synchronize(device)
    for _ in range(arguments.rounds):
        for name, chain in table.items():
            rates.setdefault(name, []).append(views_per_second(chain, image))
    for name, found in rates.items():
        ratio = statistics.median(rate / peer for rate, peer in zip(found, rates["kornia"]))
        launched = f", {kernels(table[name])} kernels per batch" if device.type == "cuda" else ""
        print(
            f"{name:<34} {statistics.median(found):8.0f} views/s ({min(found):.0f} to {max(found):.0f}), "
            f"{ratio:.1f}x kornia{launched}"
        )


if __name__ == "__main__":
    main()
