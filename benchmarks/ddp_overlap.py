"""What of the exchange of gradients overlaps with a compiled backward pass, as the generated graphs show it.

    python benchmarks/ddp_overlap.py recipes/zprob_barlow.yaml [key=value ...] [--processes 8] [--bucket-mb 25 10]

Under DistributedDataParallel torch.compile splits model and loss into several graphs, so that one bucket of gradients
can be sent while the next graph runs. A gradient is complete when the last graph that adds to it has run: every weight
is used once in each view. For each size of a bucket the table lists the backward graphs in the order of their calls,
with their kernels, the time that their bytes take (see gpu_budget.py), and the gradients that are complete after each.
What is complete after the last graph has nothing left to overlap with.

No GPU and no other process is needed: the graphs are generated for one process of a fake group, without DDP itself,
which would choose the same graphs (tests/training/test_distributed.py runs it).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_cuda
import torch
import torch.distributed as dist
from fake_cuda import Graph
from gpu_budget import call_step, fake_mode, fake_network
from torch import Tensor
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastssl.recipe import Recipe, load_recipe

BANDWIDTH = 4.0  # TB/s of a GPU's memory


@dataclass
class Call:
    """One call of a graph in a step."""

    graph: Graph
    complete: list[int] = field(default_factory=list)  # bytes of each gradient that no later graph adds to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--bucket-mb", type=float, nargs="+", default=[25.0], help="MiB; 0: one graph, as without DDP")
    parser.add_argument("--json", type=Path, help="write graphs, bytes of gradients and late ones here, by bucket size")
    arguments = parser.parse_intermixed_args()
    batch = load_recipe(arguments.recipe, arguments.overrides).train.batch_size // arguments.processes
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, f"train.batch_size={batch}"])
    fake_cuda.install()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.processes)
    results = {}
    for bucket_mb in arguments.bucket_mb:
        calls = step_calls(recipe, bucket_mb)
        print(
            f"\n{arguments.recipe}, {arguments.processes} x {recipe.train.batch_size} images, {bucket_mb:g} MiB: ",
            end="",
        )
        print(summary(calls), table(calls), sep="\n", flush=True)
        results[f"{bucket_mb:g}"] = {
            "graphs": len(calls),
            "gradients": sum(sum(call.complete) for call in calls),
            "late": sum(calls[-1].complete),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def step_calls(recipe: Recipe, bucket_mb: float) -> list[Call]:
    """The calls of the second step, in order."""
    torch._dynamo.reset()
    mode = fake_mode()
    network = fake_network(recipe, mode)
    calls: list[Call] = []

    def note(gradient_of: Tensor) -> None:
        calls[-1].complete.append(gradient_of.nbytes)

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)

    def call(backend: Callable[..., Any]) -> None:
        if bucket_mb:
            backend = DDPOptimizer(int(bucket_mb * 2**20), backend).compile_fn
        compiled = torch.compile(network, dynamic=False, backend=backend)
        for step in range(2):
            calls.clear()
            call_step(compiled, recipe, step, mode)

    fake_cuda.generate(call, on_call=lambda graph: calls.append(Call(graph)))
    return calls


def summary(calls: list[Call]) -> str:
    kernels = [kernel for call in calls for kernel in call.graph.kernels]
    moved = sum(kernel.bytes for kernel in kernels)
    gradients, late = sum(sum(call.complete) for call in calls), sum(calls[-1].complete)
    forward = sum(call.graph.phase == "forward" for call in calls)
    return (
        f"{forward} forward and {len(calls) - forward} backward graphs, {len(kernels)} kernels, {moved / 1e9:.3f} GB, "
        f"{late / 1e6:.1f} of {gradients / 1e6:.1f} MB of gradients complete after the last graph"
    )


def table(calls: list[Call]) -> str:
    lines = ["| backward graph | kernels | collectives | ms | gradients complete, MB |", "|---|---|---|---|---|"]
    for number, call in enumerate([call for call in calls if call.graph.phase == "backward"], 1):
        kernels = call.graph.kernels
        collectives = sum("c10d_functional.all_" in kernel.name for kernel in kernels)
        ms = sum(kernel.bytes for kernel in kernels) / BANDWIDTH / 1e9
        lines.append(f"| {number} | {len(kernels)} | {collectives} | {ms:.2f} | {sum(call.complete) / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
