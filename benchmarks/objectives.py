"""The cost of Monte Carlo draws: time and memory of a training step, compared with the naive loop over draws.

    python benchmarks/objectives.py                                  # on a CPU: 32 px, batch 128
    python benchmarks/objectives.py --device cuda                    # 224 px, batch 256, bf16, ours compiled too
    python benchmarks/objectives.py --spaces none z h --ways "ours"  # a part of it; --json FILE writes the rows too

A step is forward pass, objective, KL and backward pass of two views, without the optimizer, for a ResNet-18 with the
ImageNet stem and the projector of the ImageNet recipes, 512-1024-1024-1024. "After the encoder" leaves the encoder out:
h is given. The naive loop follows the published code: torch.randn for the noise; for each draw the projector once, and
the objective once with its matrix of D x D. Both use the closed KL. The implementations alternate in rounds, and the
median counts; the first calls, which warm up or compile, are not timed. Memory is the peak minus the memory before the
step: of the process on a CPU, of torch's allocator on a GPU.
"""

import argparse
import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.models import ModelInput, SSLModel
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe

SPACES = {"none": "deterministic", "z": "Z-prob", "h": "H-prob", "hz": "HZ-prob"}
WAYS = ["ours", "ours, compiled", "ours, in chunks of 4", "ours, in chunks of 4, compiled", "naive loop"]
PARTS = {"projector": "after the encoder", "step": "the whole step"}
STEP = 3


def off_diagonal(matrix_DD: Tensor) -> Tensor:
    return matrix_DD[~torch.eye(len(matrix_DD), dtype=torch.bool, device=matrix_DD.device)]


def naive_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    zn1, zn2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    C = zn1.T @ zn2 / len(z1)
    return (C.diagonal() - 1).square().sum() + 5e-3 * off_diagonal(C).square().sum()


def naive_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    loss = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        hinge = (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
        loss = loss + 25 * hinge / 2 + off_diagonal(torch.cov(z.T)).square().sum() / z.shape[1]
    return loss


def naive_sigreg(z1: Tensor, z2: Tensor) -> Tensor:
    directions_KD = torch.nn.functional.normalize(torch.randn(1024, z1.shape[1], device=z1.device))
    t_T = torch.linspace(0, 3, 17, device=z1.device)
    normal_T = (-t_T.square() / 2).exp()
    loss = 0.95 * (z1 - z2).square().mean() / 4
    for z in (z1, z2):
        angle = (z @ directions_KD.T)[:, :, None] * t_T
        distance = (angle.cos().mean(0) - normal_T).square() + angle.sin().mean(0).square()
        loss = loss + 0.05 / 2 * 2 * len(z) * torch.trapezoid(distance * normal_T, t_T).mean()
    return loss


def naive_visreg(z1: Tensor, z2: Tensor) -> Tensor:
    directions_KD = torch.nn.functional.normalize(torch.randn(4096, z1.shape[1], device=z1.device))
    rank = torch.arange(1, len(z1) + 1, device=z1.device)
    quantile = torch.special.ndtri(rank / (len(z1) + 1))
    loss = 0.1 * (z1 - z2).square().mean() / 4
    for z in (z1, z2):
        mean, std = z.mean(0), z.std(0, correction=0)
        ordered = ((z - mean) / std.detach() @ directions_KD.T).sort(0).values
        shape = (ordered - quantile[:, None]).square().mean()
        loss = loss + 0.9 / 2 * ((std - 1).square().mean() + shape + mean.square().mean())
    return loss


NAIVE = {"barlow_twins": naive_barlow_twins, "vicreg": naive_vicreg, "sigreg": naive_sigreg, "visreg": naive_visreg}


def recipe_of(objective: str, space: str, samples: int, chunk: int | None, size: int) -> Recipe:
    return Recipe.model_validate({
        "name": "benchmark", "data": {"train": "none.beton"}, "views": {"size": size}, "objective": {"name": objective},
        "embedding": {"stochastic": space, "samples": samples, "chunk": chunk},
    })  # fmt: skip


def ours(model: SSLModel, recipe: Recipe) -> Callable[..., Tensor]:
    total_loss = TotalLoss(recipe)
    return lambda inputs: total_loss(model(inputs), model.priors, inputs.step)["loss"]


def naive_loop(model: SSLModel, recipe: Recipe) -> Callable[..., Tensor]:
    loss, S, heads = NAIVE[recipe.objective.name], recipe.embedding.samples, model.heads

    def draws_and_kl(v: Tensor) -> tuple[list[Tensor], Tensor | float]:
        h, kl = model.encoder(v), 0.0
        draws = [h]
        if "h" in heads:
            q = heads["h"](h)
            draws, kl = list(q.rsample(S)), kl + q.kl_to(model.priors["h"]).mean()
        draws = [model.projector(h) for h in draws]
        if "z" in heads:
            qs = [heads["z"](z) for z in draws]
            draws = list(qs[0].rsample(S)) if len(qs) == 1 else [q.rsample(1)[0] for q in qs]
            kl = kl + sum(q.kl_to(model.priors["z"]).mean() for q in qs) / len(qs)
        return draws, kl

    def total(inputs: ModelInput) -> Tensor:
        (first, kl1), (second, kl2) = (draws_and_kl(v) for v in inputs.views)
        losses = [loss(a.float(), b.float()) for a, b in zip(first, second, strict=True)]
        return sum(losses) / len(losses) + recipe.embedding.beta * (kl1 + kl2) / 2

    return total


class Step:
    """One implementation of a step, with its time and memory."""

    def __init__(self, loss: Callable[..., Tensor], model: SSLModel, views: tuple[Tensor, Tensor], precision: str):
        self.loss, self.model, self.precision = loss, model, precision
        index = torch.arange(len(views[0]), device=views[0].device)
        self.inputs = ModelInput(views, torch.full_like(index, -1), index, torch.tensor(STEP, device=index.device))
        self.milliseconds: list[float] = []

    def __call__(self) -> None:
        device = self.inputs.index.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(self.inputs)
        loss.backward()
        self.model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    def time(self) -> None:
        start = time.perf_counter()
        self()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))

    def peak_megabytes(self) -> float:
        if self.inputs.index.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the process's peak
        before = own_memory("VmRSS")
        self()
        return own_memory("VmHWM") - before


def own_memory(which: str) -> float:
    with open("/proc/self/status") as file:
        return int(re.search(rf"{which}:\s+(\d+) kB", file.read())[1]) * 1024 / 1e6


def measure(options, objective: str, space: str, samples: int, whole: bool) -> dict[str, tuple[float, float]]:
    """Milliseconds and megabytes of each implementation."""
    cuda = options.device == "cuda"
    ways = {}
    for name, chunk in {"ours": None, "ours, in chunks of 4": 4, "naive loop": None}.items():
        if (chunk and samples <= chunk) or (name != "ours" and space == "none"):
            continue
        if not {name, name + ", compiled"} & set(options.ways):
            continue
        torch.manual_seed(0)
        recipe = recipe_of(objective, space, samples, chunk, options.size)
        model = SSLModel(recipe).to(options.device, memory_format=torch.channels_last)
        if whole:
            views = torch.randn(2, options.batch, 3, options.size, options.size, device=options.device)
            views = tuple(v.contiguous(memory_format=torch.channels_last) for v in views)
        else:
            h = torch.randn(2, options.batch, model.encoder.num_features, device=options.device, requires_grad=True)
            views = tuple(h)
            model.encoder = nn.Identity()
        make = naive_loop if name == "naive loop" else ours
        if name in options.ways:
            ways[name] = Step(make(model, recipe), model, views, options.precision)
        if cuda and name + ", compiled" in options.ways:
            compiled = torch.compile(make(model, recipe), dynamic=False)
            ways[name + ", compiled"] = Step(compiled, model, views, options.precision)
    for step in ways.values():
        step()
        step()
    megabytes = {name: step.peak_megabytes() for name, step in ways.items()}
    for _ in range(options.rounds):
        for step in ways.values():
            step.time()
    return {name: (statistics.median(step.milliseconds), megabytes[name]) for name, step in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--objectives", nargs="+", default=list(NAIVE), choices=NAIVE)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES)
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 12, 36])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="compiled: on a GPU only")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.batch, options.size = options.batch or (256 if cuda else 128), options.size or (224 if cuda else 32)
    options.precision = "bf16" if cuda else "fp32"
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, torch {torch.__version__}, {options.precision}, batch {options.batch}, {options.size} px")
    rows = []
    for part in options.parts:
        print(f"\n{PARTS[part]}")
        print("| objective | embedding | S | implementation | ms | / deterministic | / naive loop | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        for objective in options.objectives:
            deterministic: dict[str, float] = {}
            for space in options.spaces:
                label = SPACES[space]
                for samples in options.samples if space != "none" else [1]:
                    measured = measure(options, objective, space, samples, part == "step")
                    for way, (milliseconds, megabytes) in measured.items():
                        if space == "none":
                            deterministic[way] = milliseconds
                        base = deterministic.get("ours, compiled" if way.endswith("compiled") else "ours", float("nan"))
                        loop = measured.get("naive loop", (float("nan"),))[0]
                        print(f"| {objective} | {label} | {samples if space != 'none' else ''} | {way} | "
                              f"{milliseconds:.1f} | {milliseconds / base:.2f} | {milliseconds / loop:.2f} | "
                              f"{megabytes:.0f} |", flush=True)  # fmt: skip
                        rows.append({
                            "part": part, "objective": objective, "space": space, "samples": samples, "way": way,
                            "milliseconds": milliseconds, "megabytes": megabytes, "batch": options.batch,
                        })  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
