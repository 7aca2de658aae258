"""data.resident=auto: whether a set of images stays on the GPU next to what training takes there."""

import os
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.beton.format import bc4_bytes
from fastssl.beton.read import BetonInfo
from fastssl.models.build import outline_model
from fastssl.recipe import Recipe, SIGRegConfig, VISRegConfig
from fastssl.training.memory import FP32, draws_at_once, free_on_gpu, step_needs

RUNS_PER_GPU = "FASTSSL_RUNS_PER_GPU"  # environment variable: the runs that a sweep trains on each GPU in parallel

# What the forward pass saves for the backward pass is counted; the rest of a step is not: gradients of activations, two
# or three at a time; layer norms, which autocast computes in fp32 on a GPU; gaps of the allocator. For ResNet-50 at 224
# px, 512 views and bf16, 22.4 GB are counted, and 33.6 GB kept free.
MARGIN = 1.5
CORRELATIONS = 6  # matrices (out, out) in fp32: correlation or covariance of the views, its square, and gradients
ANGLES = 6  # values for each projection and knot of SIGReg, where the step is not compiled
SORTED = 8  # values for each projection of VISReg: before and after sorting, their places, and gradients
WORKSPACES = 3_000_000_000  # bytes of cuDNN, cuBLAS and NCCL, of CUDA graphs, and of the first comparison of kernels
SMALL = 1 / 16  # of the free memory: whether a set up to this stays there makes no difference to training


def image_bytes(info: BetonInfo) -> int:
    """Bytes of an image of a canvas file in a batch."""
    height, width = info.max_resolution
    return bc4_bytes(height) if info.storage == "bc4" else height * width * info.channels


def fits_beside_training(
    recipe: Recipe, dtype: torch.dtype | None, set_bytes: int, memory: int, processes: int
) -> bool:
    """Whether a GPU with `memory` free bytes holds a set of images and trains the recipe.

    Args:
        dtype: of autocast; None: without it.
        processes: that share a batch.
    """
    if set_bytes <= SMALL * memory or set_bytes > memory:
        return set_bytes <= memory
    step = estimate_training(recipe, dtype, processes)
    return step is not None and set_bytes <= memory - step


def free_memory_of_gpu(device: torch.device) -> int:
    """Bytes of a GPU that this run may take: what is free, at most its share where a sweep trains several runs."""
    total = torch.cuda.mem_get_info(device)[1]
    share = total // max(1, int(os.environ.get(RUNS_PER_GPU, 1)))
    return min(free_on_gpu(device), share)


def estimate_training(recipe: Recipe, dtype: torch.dtype | None, processes: int) -> int | None:
    """Estimate the bytes that training takes on a GPU, without the images: rather too many than too few.

    None for a model that cannot be traced: its forward pass depends on values, or it shares modules.
    """
    model = outline_model(recipe)
    counted = sum(step_needs(recipe, model, "cuda", processes).values())
    views = recipe.objective.num_views * recipe.train.batch_size // (processes * recipe.train.accumulate)
    projected = views * (recipe.embedding.samples if "h" in recipe.embedding.stochastic else 1)
    image = (recipe.model.in_chans, recipe.views.size, recipe.views.size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            activations = views * saved_bytes(model.encoder, image, dtype)
            if isinstance(projector := getattr(model, "projector", None), nn.Module):
                width = cast(int, model.encoder.num_features)
                activations += projected * saved_bytes(projector, (width,), dtype)
        except RuntimeError:
            return None
    # The objective keeps the values of every draw that it takes at once.
    values_of_a_draw = CORRELATIONS * recipe.model.projector.out**2
    if isinstance(recipe.objective, SIGRegConfig):
        values_of_a_draw = ANGLES * views * recipe.objective.slices * recipe.objective.knots
    elif isinstance(recipe.objective, VISRegConfig):
        values_of_a_draw = SORTED * views * recipe.objective.slices
    of_objective = FP32 * draws_at_once(recipe) * values_of_a_draw
    return counted + int(MARGIN * activations) + of_objective + WORKSPACES


def saved_bytes(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    """Bytes of what a forward pass saves for the backward pass, for each input of this shape. Called with fake tensors.

    Autocast is the CPU's, as torch traces for a GPU only where there is one.
    """
    module = module.to_empty(device="cpu").train()
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no number of a storage comes again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    def measure(inputs: int) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                module(torch.empty(inputs, *shape))
        return sum(saved.values())

    # The weights, which are saved too, cancel.
    return (measure(4) - measure(2)) // 2
