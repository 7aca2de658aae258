"""Let torch.compile generate code for an H200 on a machine without a GPU.

`generate` calls a function that compiles something, and returns the graphs that Inductor has generated code for. Its
Triton kernels are neither compiled nor started.

Autograd refuses fake CUDA tensors where torch finds no driver. So everything is traced on CPU tensors, and each graph
moves to CUDA between AOTAutograd, which splits it into forward and backward, and Inductor, which chooses layouts, fuses
operations and writes kernels. What torch decides earlier is decided for a CPU: above all, autocast follows the CPU's
list of operations.

`install` replaces functions of torch in the whole process: use a process of its own for it.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config, ir, scheduler
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import get_fused_kernel_name
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
# What Inductor and Triton ask a device for.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10, L2_cache_size=50 * 2**20,
)  # fmt: skip


class Kernel(NamedTuple):
    """One kernel that a generated graph starts."""

    name: str  # the operations of a Triton kernel, or the library's operation
    kind: Literal["triton", "extern"]  # extern: a call of cuDNN, cuBLAS or another operation of ATen
    bytes: int  # of the buffers that it reads and writes, each counted once


@dataclass
class Graph:
    """A graph that Inductor has generated code for."""

    phase: Literal["forward", "backward", "inference"]
    kernels: list[Kernel]  # in the order of their calls
    source: str  # the generated Python code, with the Triton kernels in it
    calls: int = 0  # how often the graph has been called


def install() -> None:
    """Answer as an H200 what torch and Triton ask the CUDA driver."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H200,
        "get_compute_capability": lambda device=None: 90,
        "get_multi_processor_count": lambda device=None: H200.multi_processor_count,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: None,
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: H200)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    torch.cuda.get_device_properties = lambda device=None: H200
    torch.cuda.get_device_capability = lambda device=None: (H200.major, H200.minor)
    torch.cuda.current_device = lambda: 0
    has_triton = functools.cache(lambda *_, **__: True)
    for module in (_triton, scheduler, compile_fx):
        module.has_triton = has_triton
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, H200.warp_size),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
    ))  # fmt: skip
    # These two would compute on the device.
    GraphLowering.constant_name = lambda self, name, device_override: name
    config.joint_graph_constant_folding = False
    config.compile_threads = 1  # no processes that compile kernels
    # A graph out of a cache generates no code.
    config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    # As cuDNN chooses: channels_last if one of the two tensors is.
    torch._C._conv_determine_backend_memory_format = lambda x, weight, backend: (
        torch.channels_last
        if any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        else torch.contiguous_format
    )


def generate(
    call: Callable[[Callable[..., Any]], None],
    computes: bool = False,
    on_call: Callable[[Graph], None] = lambda graph: None,
) -> list[Graph]:
    """Return the graphs that are compiled within `call(backend)`, which gives the backend to torch.compile.

    computes: compute each graph on the CPU when it is called, for a function that looks at values. Otherwise the graphs
    return fake tensors, and `call` has to make its tensors in a FakeTensorMode. on_call: takes each graph when it is
    called.
    """
    graphs: list[Graph] = []

    def lower(gm: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
        phase = "backward" if options.get("is_backward") else "inference" if options.get("is_inference") else "forward"
        on_cpu = copied(gm) if computes else None
        outputs = fx.map_arg(gm.graph.output_node().args[0], lambda node: node.meta["val"])
        mode = detect_fake_mode(example_inputs)
        move_to_cuda(gm, mode)

        def write_code(lowering: GraphLowering) -> Any:
            graphs.append(Graph(phase, [], lowering.codegen()[0].value))
            graphs[-1].kernels = kernels_of(lowering)
            return SimpleNamespace(call=lambda arguments: None)  # in the place of the module with the compiled kernels

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(GraphLowering, "compile_to_module", write_code))
            if mode:
                patches.enter_context(mock.patch.object(mode, "allow_non_fake_inputs", True))  # small constants
            compile_fx.compile_fx_inner(gm, tree_map(on_cuda, example_inputs), **options)
        graph = graphs[-1]

        def run(arguments: list[Any]) -> Any:
            graph.calls += 1
            on_call(graph)
            inputs = [*arguments]
            arguments.clear()
            if on_cpu:
                return on_cpu(*inputs)
            return tree_map(lambda x: torch.empty_like(x) if isinstance(x, Tensor) else x, outputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    call(lambda gm, inputs: compile_fx.compile_fx(gm, inputs, inner_compile=lower))
    return graphs


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with nodes of its own, and the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def on_cuda(value: Any) -> Any:
    """A fake CUDA tensor for a fake CPU tensor; the CUDA device for the CPU's; any other value as it is."""
    if isinstance(value, torch.device) and value.type == "cpu":
        return CUDA
    if isinstance(value, Tensor) and value.device.type == "cpu":
        with detect_fake_mode(value):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
    return value


def move_to_cuda(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Replace devices, example values and constants of the graph."""
    for node in list(gm.graph.nodes):
        node.args, node.kwargs = tree_map(on_cuda, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = tree_map(on_cuda, node.meta["val"])
        if node.op != "get_attr" or not isinstance(constant := getattr(gm, node.target), Tensor):
            continue
        fake = on_cuda(mode.from_tensor(constant))
        if constant.numel() > 8:
            setattr(gm, node.target, fake)
        else:  # stays real: Inductor writes the values of a small constant into the kernels
            with gm.graph.inserting_after(node):
                moved = gm.graph.call_function(torch.ops.prims.device_put.default, (node, CUDA))
            moved.meta["val"] = fake
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
    gm.recompile()


def kernels_of(lowering: GraphLowering) -> list[Kernel]:
    """The kernels of a graph for which code has been generated."""
    kernels = []
    for node in lowering.scheduler.nodes:
        traffic = node.get_read_write_buffers_sizes()
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            # MultiOutput: one of several results of another node. The other waits for the stream of a collective.
            if not isinstance(node.node, ir.MultiOutput | ir._WaitKernel):
                kernels.append(Kernel(node.node.get_kernel_name(), "extern", traffic))
        elif not isinstance(node, scheduler.NopKernelSchedulerNode):
            name = get_fused_kernel_name(node.get_nodes(), config.triton.descriptive_names)
            kernels.append(Kernel(name.removeprefix("fused_"), "triton", traffic))
    return kernels
