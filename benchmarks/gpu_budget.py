"""What a training step of a recipe costs a GPU, counted from the code that torch.compile generates for it.

    python benchmarks/gpu_budget.py recipes/zprob_barlow.yaml [key=value ...] [--only views] [--json F]
    python benchmarks/gpu_budget.py recipes/zprob_barlow.yaml --kornia      also kornia's chain, where it is installed

No GPU is needed and none is used (`fake_cuda.py`). For the views of a batch, and for the forward and backward pass with
the loss, the table has the kernels that are started, the bytes that they move, and the time that these bytes take at a
bandwidth: a lower bound, because convolutions and matrix products may take longer to compute. The bytes of a kernel are
those of the buffers that it reads or writes, each counted once. Optimizer, guard and logging are not in it.

Three steps and three epochs are called, so graphs that depend on their number show up as recompilations.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fake_cuda
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.common import randomness
from fastssl.models import ModelInput
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe, load_recipe
from fastssl.training.meters import compile_counts
from fastssl.training.setup import Network, choose_precision, make_model, memory_format
from fastssl.views import PairedViews

CPU = torch.device("cpu")
CALLS = 3  # steps, or epochs
LARGEST = 5  # kernels that are listed


class Traffic(NamedTuple):
    """The kernels of one name: of Triton's, those with the same operations."""

    name: str
    calls: float  # per batch
    bytes: int  # of all calls


@dataclass
class Budget:
    """What one part of a step costs per batch."""

    part: str
    triton_kernels: int
    extern_kernels: int  # of cuDNN, cuBLAS and ATen
    bytes: int
    milliseconds: float  # that the bytes take
    graphs: int
    graph_breaks: int
    recompilations: int
    largest: list[Traffic]  # the kernels with most bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--only", choices=("views", "step"), help="leave out the other part")
    parser.add_argument(
        "--stored", type=int, help="side of the stored images in pixels; default: as builders choose it"
    )
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s; an H200 reaches about 4.0 of its 4.8")
    parser.add_argument("--kornia", action="store_true", help="also the same augmentations by kornia, compiled")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    size = recipe.views.size
    stored = arguments.stored or next((canvas for canvas in (32, 64, 96) if size <= canvas), 256)

    fake_cuda.install()
    budgets: list[Budget] = []
    if arguments.only != "step":
        budgets += views_budgets(recipe, stored, arguments.bandwidth)
    if arguments.kornia:
        budgets += kornia_budgets(recipe, stored, arguments.bandwidth)
    if arguments.only != "views":
        budgets += step_budgets(recipe, arguments.bandwidth)

    print(f"{arguments.recipe} {' '.join(arguments.overrides)}".strip(), end=", ")
    print(
        f"batch {recipe.train.batch_size}, {stored} to {size} px, torch {torch.__version__}, {arguments.bandwidth} TB/s"
    )
    print(table(budgets))
    if arguments.json:
        result = {"torch": torch.__version__, "terabytes_per_second": arguments.bandwidth, "stored": stored}
        arguments.json.write_text(
            json.dumps({**result, "parts": [asdict(budget) for budget in budgets]}, indent=1) + "\n"
        )


def views_budgets(recipe: Recipe, stored: int, bandwidth: float) -> list[Budget]:
    """The chain of torch operations under torch.compile."""
    batch, mode = recipe.train.batch_size, fake_mode()

    def call(backend: Callable[..., Any]) -> None:
        views = PairedViews(recipe.views, recipe.seed, recipe.objective.num_views)
        compiled = torch.compile(views, dynamic=False, backend=backend)
        with mode:
            image = torch.empty(batch, stored, stored, recipe.model.in_chans, dtype=torch.uint8)
            index, height, width = torch.empty(3, batch, dtype=torch.int64)
            for epoch in range(CALLS):
                compiled(image, index, torch.full((), epoch), height, width)

    return budgets_of({"inference": "views, torch.compile"}, call, bandwidth)


def step_budgets(recipe: Recipe, bandwidth: float) -> list[Budget]:
    """Model and loss, forward and backward, as training compiles them."""
    batch, size, mode = recipe.train.batch_size, recipe.views.size, fake_mode()
    model, _ = make_model(recipe, CPU, pretrained=None)
    make_fake(model, mode)
    precision = choose_precision(recipe.train.precision, fake_cuda.CUDA)
    network = Network(model, TotalLoss(recipe, int(recipe.embedding.beta_warmup_epochs > 0)), CPU, precision)

    def call(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(network, dynamic=False, backend=backend)
        with mode:
            for step in range(CALLS):
                shape = (batch, recipe.model.in_chans, size, size)
                views = tuple(
                    torch.empty(shape).contiguous(memory_format=memory_format(recipe))
                    for _ in range(recipe.objective.num_views)
                )
                label, index = torch.empty(2, batch, dtype=torch.int64)
                compiled(ModelInput(views, label, index, torch.full((), step))).terms["loss"].backward()
                model.zero_grad()

    return budgets_of({"forward": "step, forward", "backward": "step, backward"}, call, bandwidth)


def fake_mode() -> FakeTensorMode:
    randomness.quantiles(CPU)  # a real table: made in a fake mode, it would be fake for everybody
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake tensors of the same layout."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer))


def kornia_budgets(recipe: Recipe, stored: int, bandwidth: float) -> list[Budget]:
    """kornia's chain under torch.compile, which looks at the values that it has drawn: computed on the CPU meanwhile.

    What kornia does between its graphs is not counted.
    """
    from views import kornia_chain  # kornia is not a dependency

    torch._dynamo.config.recompile_limit = 64  # its classes share methods, which are compiled once for each class
    views = recipe.views
    chains = [kornia_chain(views, own, CPU) for own in (views.first, views.second)[: recipe.objective.num_views]]

    def call(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(
            lambda image: [chain(image.permute(0, 3, 1, 2).float() / 255) for chain in chains], backend=backend
        )
        generator = torch.Generator().manual_seed(0)
        shape = (recipe.train.batch_size, stored, stored, 3)
        for _ in range(CALLS):
            compiled(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    return budgets_of({"inference": "views, kornia, torch.compile"}, call, bandwidth, computes=True)


def budgets_of(
    parts: dict[str, str], call: Callable[[Callable[..., Any]], None], bandwidth: float, computes: bool = False
) -> list[Budget]:
    """One budget for each phase of the graphs that `call` compiles and calls CALLS times. parts: names by phase."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    graphs = fake_cuda.generate(call, computes)
    counts = compile_counts()
    budgets = []
    for phase, part in parts.items():
        of_phase = [graph for graph in graphs if graph.phase == phase]
        called = [kernel for graph in of_phase for kernel in graph.kernels * graph.calls]
        moved = Counter[str]()
        for kernel in called:
            moved[kernel.name] += kernel.bytes
        budgets.append(Budget(
            part,
            round(sum(kernel.kind == "triton" for kernel in called) / CALLS),
            round(sum(kernel.kind == "extern" for kernel in called) / CALLS),
            round(moved.total() / CALLS),
            moved.total() / CALLS / bandwidth / 1e9,
            len(of_phase),
            counts["graph_breaks"],
            counts["recompiled"],
            [
                Traffic(name, sum(kernel.name == name for kernel in called) / CALLS, round(traffic / CALLS))
                for name, traffic in moved.most_common(LARGEST)
            ],
        ))  # fmt: skip
    return budgets


def table(budgets: list[Budget]) -> str:
    """The budgets in Markdown, and below them the largest kernels of each."""
    lines = [
        "| part | Triton kernels | library calls | GB | ms | graphs | graph breaks | recompilations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {b.part} | {b.triton_kernels} | {b.extern_kernels} | {b.bytes / 1e9:.3f} | {b.milliseconds:.2f} "
        f"| {b.graphs} | {b.graph_breaks} | {b.recompilations} |"
        for b in budgets
    ]
    for b in budgets:
        lines += ["", f"{b.part}: most bytes"]
        lines += [f"{kernel.bytes / 1e6:9.1f} MB in {kernel.calls:g} x {kernel.name[:90]}" for kernel in b.largest]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
