"""The memory that training takes: a lower limit before a run starts, and a sentence if it ends for lack of memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastssl.common.commands import training_command
from fastssl.common.distributed import broadcast_from_main, world_size
from fastssl.common.errors import UserError, in_short, is_out_of_memory
from fastssl.common.system import free_memory
from fastssl.loading.loader import pinned_bytes
from fastssl.models.build import Model, outline_model
from fastssl.models.checkpoint import find_checkpoints
from fastssl.models.memory import count_bytes, suggest_smaller
from fastssl.recipe import Recipe, SlicedConfig

FP32 = 4  # bytes of a value in the losses
DRAW = 2  # bytes of a value: a draw that is kept may be bf16
VIEW = {"cpu": 4, "cuda": 2}  # views are fp32 on a CPU, and may be bf16 on a GPU
# Averages of the gradient that an optimizer keeps. Of others it is not known: this is a lower limit.
AVERAGES = {"adamw": 2, "adam": 2, "lamb": 2, "lars": 1}


def check_memory(recipe: Recipe, device: torch.device, resident_bytes: int = 0) -> None:
    """Refuse a run that needs more memory than is free, before any of it is taken.

    The need of a step is a lower limit: the activations of the encoder, most of what training takes, are not in it. So
    no run is refused that would fit. The main process also needs the host's memory for the copy of a checkpoint.

    Args:
        resident_bytes: of the images that stay on the device.

    Raises:
        UserError: with the keys that make it smaller.
    """
    model = outline_model(recipe)
    needs = step_needs(recipe, model, device.type, world_size())
    needs["set data.resident=false"] = resident_bytes
    if device.type == "cuda":
        free = free_on_gpu(device)
    else:
        free = free_memory()
    _require(sum(needs.values()), free, _name(device), max(needs, key=lambda fix: needs[fix]))
    copies = _copies(recipe)
    if device.type == "cuda":
        weights = _pinned({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        need = weights * copies.of_weights + _pinned(_trained(model)) * copies.averages
    else:
        need = 2 * _state_bytes(recipe, model)  # the state and its copy
    # Refused on all ranks, or they would wait for the main process.
    broadcast_from_main(lambda: _require(need, free_memory(), "machine", suggest_smaller(model)))


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that torch holds without a tensor in them."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def step_needs(recipe: Recipe, model: Model, device_type: str, processes: int) -> dict[str, int]:
    """Bytes that a step of one process takes at least, by the keys that make each part smaller.

    model: an outline of the recipe's. device_type: "cpu" or "cuda". processes: that share a batch.
    """
    gradients = sum(parameter.nbytes for parameter in _trained(model))
    views = recipe.objective.num_views * (recipe.train.batch_size // (processes * recipe.train.accumulate))
    widths = {"h": cast(int, model.encoder.num_features), "z": recipe.model.projector.out}
    spaces = [] if recipe.embedding.stochastic == "none" else list(recipe.embedding.stochastic)
    draws = recipe.embedding.samples * sum(widths[space] for space in spaces)
    image = recipe.model.in_chans * recipe.views.size**2
    slices = recipe.objective.slices if isinstance(recipe.objective, SlicedConfig) else 0
    return {
        suggest_smaller(model): _state_bytes(recipe, model) + gradients,
        "lower train.batch_size or views.size": views * image * VIEW[device_type],
        "lower embedding.samples or train.batch_size": views * draws * DRAW,
        "lower objective.slices": slices * (recipe.model.projector.out + views * draws_at_once(recipe)) * FP32,
    }


def draws_at_once(recipe: Recipe) -> int:
    """The draws that the objective takes at once; 1 for a deterministic model."""
    if recipe.embedding.stochastic == "none":
        return 1
    return recipe.embedding.chunk or recipe.embedding.samples


def _state_bytes(recipe: Recipe, model: Model) -> int:
    """Bytes of the weights, of their average, and of the optimizer's averages of the gradient."""
    copies = _copies(recipe)
    gradients = sum(parameter.nbytes for parameter in _trained(model))
    return count_bytes(model) * copies.of_weights + gradients * copies.averages


class _Copies(NamedTuple):
    of_weights: int
    averages: int  # of the gradient


def _copies(recipe: Recipe) -> _Copies:
    return _Copies(2 if recipe.train.ema else 1, AVERAGES.get(recipe.optim.name.lower(), 0))


def _trained(model: Model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _require(need: int, free: int, where: str, fix: str) -> None:
    if need > free:
        raise UserError(
            f"This run needs at least {need / 1e9:,.1f} GB of memory on the {where}, and {free / 1e9:,.1f} GB are free",
            hint=fix,
        )


def _pinned(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of pinned memory for a copy of each tensor."""
    return sum(pinned_bytes(tensor.nbytes) for tensor in tensors if tensor.nbytes)


@contextmanager
def explain_out_of_memory(recipe: Recipe, device: torch.device, run_dir: Path | None = None) -> Iterator[None]:
    """Turn an error for lack of memory, of the machine or of the GPU, into a UserError that says what helps.

    run_dir: of a run that may have checkpoints to continue from.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        train = recipe.train
        fixes = f"lower train.batch_size={train.batch_size} or views.size={recipe.views.size}"
        if recipe.embedding.stochastic != "none" and recipe.objective.is_mean_over_draws:
            fixes += ", set embedding.chunk=1, which takes one draw at a time"
        if device.type == "cuda" and recipe.data.resident:
            fixes += ", set data.resident=false, which keeps the images out of the GPU's memory"
        fixes += f", or raise train.accumulate={train.accumulate}"
        resume = ""
        if run_dir and find_checkpoints(run_dir):
            command = training_command("--resume", run_dir)
            resume = f"; where more memory is free, continue from the last checkpoint with {command}"
        raise UserError(
            f"There was not enough memory ({in_short(error)}) on the {_name(device)}", hint=f"{fixes}{resume}"
        ) from error


def _name(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "machine"
