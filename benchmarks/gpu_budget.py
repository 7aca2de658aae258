"""What a training step of a recipe costs a GPU, counted from the code that torch.compile generates for it.

    python benchmarks/gpu_budget.py recipes/zprob_barlow.yaml [key=value ...] [--only views] [--json F]
    python benchmarks/gpu_budget.py recipes/zprob_barlow.yaml --only views --in-blocks      of canvases in BC4
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
from unittest import mock

import fake_cuda
import torch
from fake_cuda import Kernel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.beton.format import RGB, bc4_bytes
from fastssl.common import randomness
from fastssl.loading.blocks import BlockImages
from fastssl.models import ModelInput
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe, load_recipe
from fastssl.training.meters import compile_counts
from fastssl.training.setup import DTYPES, Network, choose_precision, make_model, memory_format
from fastssl.views import PairedViews, gpu, gpu_kernels
from fastssl.views.gpu_kernels import COLUMNS

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
    largest: list[Traffic]  # the kernels with most bytes
    graphs: int = 0  # of torch.compile
    graph_breaks: int = 0
    recompilations: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--only", choices=("views", "step"), help="leave out the other part")
    parser.add_argument(
        "--stored", type=int, help="side of the stored images in pixels; default: as builders choose it"
    )
    parser.add_argument("--in-blocks", action="store_true", help="the stored images are in blocks, not pixels")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s; an H200 reaches about 4.0 of its 4.8")
    parser.add_argument("--kornia", action="store_true", help="also the same augmentations by kornia, compiled")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    size = recipe.views.size
    stored = arguments.stored or next((canvas for canvas in (32, 64, 96) if size <= canvas), 256)

    fake_cuda.install()
    budgets: list[Budget] = []
    if arguments.only != "step":
        budgets += views_budgets(recipe, stored, arguments.in_blocks, arguments.bandwidth)
    if arguments.kornia:
        budgets += kornia_budgets(recipe, stored, arguments.bandwidth)
    if arguments.only != "views":
        budgets += step_budgets(recipe, arguments.bandwidth)

    print(f"{arguments.recipe} {' '.join(arguments.overrides)}".strip(), end=", ")
    print(
        f"batch {recipe.train.batch_size}, {stored}{' in blocks' if arguments.in_blocks else ''} to {size} px", end=", "
    )
    print(f"torch {torch.__version__}, {arguments.bandwidth} TB/s")
    print(table(budgets))
    if arguments.json:
        result = {
            "torch": torch.__version__,
            "terabytes_per_second": arguments.bandwidth,
            "stored": stored,
            "in_blocks": arguments.in_blocks,
        }
        arguments.json.write_text(
            json.dumps({**result, "parts": [asdict(budget) for budget in budgets]}, indent=1) + "\n"
        )


def views_budgets(recipe: Recipe, stored: int, in_blocks: bool, bandwidth: float) -> list[Budget]:
    """The views by Triton's kernels, the drawing of their parameters, and the compiled chain of torch operations."""
    batch, channels = recipe.train.batch_size, recipe.model.in_chans
    paired_views = PairedViews(
        recipe.views, recipe.seed, recipe.objective.num_views,
        dtype=views_dtype(recipe), memory_format=memory_format(recipe),
    )  # fmt: skip
    mode = fake_mode()

    def call_in_each_epoch(make: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
        def call(backend: Callable[..., Any]) -> None:
            compiled = torch.compile(make, dynamic=False, backend=backend)
            with mode, torch.no_grad():
                index, height, width = torch.empty(3, batch, dtype=torch.int64)
                for epoch in range(CALLS):
                    image = stored_images(batch, stored, channels, in_blocks)
                    compiled(image, index, torch.full((), epoch), height, width)

        return call

    budgets = []
    if channels == RGB:
        budgets.append(budget_of("views, Triton: pixels", pixel_kernels(recipe, stored, in_blocks) * CALLS, bandwidth))
        draw = call_in_each_epoch(paired_views.draw_table)
        budgets += budgets_of({"inference": "views, Triton: parameters"}, draw, bandwidth)
    make = call_in_each_epoch(paired_views.make)
    return budgets + budgets_of({"inference": "views, torch.compile"}, make, bandwidth)


def stored_images(batch: int, side: int, channels: int, in_blocks: bool) -> Tensor | BlockImages:
    """Square images of a batch, of which only shapes matter."""
    if in_blocks:
        return BlockImages(torch.empty(batch, bc4_bytes(side), dtype=torch.uint8), side)
    return torch.empty(batch, side, side, channels, dtype=torch.uint8)


def pixel_kernels(recipe: Recipe, stored: int, in_blocks: bool = False) -> list[Kernel]:
    """The kernels of `fastssl/views/gpu.py` that a batch launches, with the bytes that they read and write of tensors.

    A tensor that a kernel reads and writes counts twice here.
    """
    views, count = recipe.views, recipe.objective.num_views
    blurred = sum(view.blur for view in (views.first, views.second)[:count]) / count
    # How much of each tensor a kernel reads and writes. Views with blur pass the last two kernels, the others do not.
    shares = {
        "crop_kernel": {"image": 1.0, "row_B": 0.0, "table": 1.0, "planes": 1.0, "gray_sums": 1.0},
        "contrast_kernel": {"planes": 1 + blurred, "table": 1.0, "gray_sums": 1.0, "out": 1 - blurred},
        "blur_columns_kernel": {"planes": blurred, "table": 1.0, "halfway": blurred},
        "blur_rows_kernel": {"halfway": blurred, "table": 1.0, "out": blurred},
    }
    kernels: list[Kernel] = []

    class Recorded:
        """Takes the place of a kernel: kernel[grid](*arguments) launches it."""

        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.launch

        def launch(self, *arguments: Any, **options: Any) -> None:
            named = zip(getattr(gpu_kernels, self.name).arg_names, arguments)
            tensors = {argument: value for argument, value in named if isinstance(value, Tensor)}
            moved = sum(shares[self.name][argument] * tensor.nbytes for argument, tensor in tensors.items())
            kernels.append(Kernel(self.name, "triton", round(moved)))

    with torch.device("meta"):
        image = stored_images(recipe.train.batch_size, stored, RGB, in_blocks)
        table = torch.empty(count * recipe.train.batch_size, COLUMNS.value)
    with mock.patch.multiple(gpu, **{name: Recorded(name) for name in shares}):
        gpu.triton_views(image, table, views, views_dtype(recipe), memory_format(recipe))
    return kernels


def views_dtype(recipe: Recipe) -> torch.dtype:
    """The type in which `TrainingViews` makes the views on a GPU."""
    return DTYPES.get(choose_precision(recipe.train.precision, fake_cuda.CUDA), torch.float32)


def step_budgets(recipe: Recipe, bandwidth: float) -> list[Budget]:
    """Model and loss, forward and backward, as training compiles them."""
    mode = fake_mode()
    network = fake_network(recipe, mode)

    def call(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(network, dynamic=False, backend=backend)
        for step in range(CALLS):
            call_step(compiled, recipe, step, mode)

    return budgets_of({"forward": "step, forward", "backward": "step, backward"}, call, bandwidth)


def fake_network(recipe: Recipe, mode: FakeTensorMode) -> Network:
    """Model and loss, with fake weights."""
    model, _ = make_model(recipe, CPU, pretrained=None)
    make_fake(model, mode)
    total_loss = TotalLoss(recipe, beta_warmup_steps=int(recipe.embedding.beta_warmup_epochs > 0))
    return Network(model, total_loss, CPU, choose_precision(recipe.train.precision, fake_cuda.CUDA))


def call_step(compiled: Callable[..., Any], recipe: Recipe, step: int, mode: FakeTensorMode) -> None:
    """A forward and a backward pass on a fake batch."""
    shape = (recipe.train.batch_size, recipe.model.in_chans, recipe.views.size, recipe.views.size)
    with mode:
        views = tuple(
            torch.empty(shape, dtype=views_dtype(recipe)).contiguous(memory_format=memory_format(recipe))
            for _ in range(recipe.objective.num_views)
        )
        label, index = torch.empty(2, recipe.train.batch_size, dtype=torch.int64)
        compiled(ModelInput(views, label, index, torch.full((), step))).terms["loss"].backward()


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
        budget = budget_of(part, called, bandwidth)
        budget.graphs, budget.graph_breaks, budget.recompilations = (
            len(of_phase), counts["graph_breaks"], counts["recompiled"],
        )  # fmt: skip
        budgets.append(budget)
    return budgets


def budget_of(part: str, called: list[Kernel], bandwidth: float) -> Budget:
    """called: the kernels of CALLS batches."""
    number, moved = Counter(kernel.name for kernel in called), Counter[str]()
    for kernel in called:
        moved[kernel.name] += kernel.bytes
    return Budget(
        part,
        triton_kernels=round(sum(kernel.kind == "triton" for kernel in called) / CALLS),
        extern_kernels=round(sum(kernel.kind == "extern" for kernel in called) / CALLS),
        bytes=round(moved.total() / CALLS),
        milliseconds=moved.total() / CALLS / bandwidth / 1e9,
        largest=[
            Traffic(name, number[name] / CALLS, round(of_name / CALLS)) for name, of_name in moved.most_common(LARGEST)
        ],
    )


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
