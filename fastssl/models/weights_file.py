"""Read all tensors of a file of weights, from fastssl or from elsewhere. Untrusted files run no code."""

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastssl.common.errors import UserError, in_short, is_out_of_memory
from fastssl.common.files import expand_user, open_regular
from fastssl.models.checkpoint import Checkpoint, DamagedArchive, check_archive, newest_checkpoint
from fastssl.models.exported import check_dense
from fastssl.recipe import Recipe

MAX_DEPTH = 10  # of the dictionaries in a file
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpointing


@dataclass(frozen=True)
class WeightsFile:
    """All tensors of a file. Names in nested dictionaries are joined by dots."""

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)  # on the CPU, floats in fp32
    ordered: bool  # in the order of the modules, as torch.save keeps it; safetensors sorts
    recipe: Recipe | None = None  # of a run or export of fastssl
    warning: str | None = None


def read_weights(source: str, key: str) -> WeightsFile:
    """Read all tensors of a run directory, a checkpoint, or a file of torch.save or safetensors.

    Args:
        key: the setting that names `source`, with which the sentences for users begin, such as "model.init: ".

    Raises:
        UserError: there is no such file, it is damaged, holds no tensors, or holds Python objects, which only code
            could build.
    """
    path = expand_user(source)
    if not path.is_file():
        return _of_checkpoint(newest_checkpoint(path))
    recipe: Recipe | None = None
    values: object
    if path.suffix == ".safetensors":
        values, recipe = _read_safetensors(path, key)
    else:
        values = _read_torch_file(path, key)
        if isinstance(values, dict) and {"recipe", "model", "step"} <= values.keys():
            return _of_checkpoint(newest_checkpoint(path))
    tensors = dict(_flatten(values))
    if not tensors:
        raise UserError(f"{key}{source} holds no weights", hint="name a file with a model's state dict")
    return WeightsFile(path, tensors, path.suffix != ".safetensors", recipe)


def _of_checkpoint(checkpoint: Checkpoint) -> WeightsFile:
    try:
        recipe = checkpoint.recipe
    except UserError:  # of another version of fastssl: the weights may fit all the same
        recipe = None
    return WeightsFile(checkpoint.path, dict(_flatten(checkpoint.weights)), True, recipe, checkpoint.warning)


def _read_safetensors(path: Path, key: str) -> tuple[dict[str, Tensor], Recipe | None]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{key}{path} is not a readable safetensors file ({in_short(error)})",
            hint="copy it again, or name another file",
        ) from None
    try:
        recipe = Recipe.model_validate_json(header["recipe"]) if "recipe" in header else None
    except ValueError:  # as above
        recipe = None
    return values, recipe


def _read_torch_file(path: Path, key: str) -> object:
    try:
        if zipfile.is_zipfile(path):  # else the format of torch before 1.6
            with open_regular(path) as file:
                check_archive(file)
        # DINO and MAE save their command line with the weights, as a Namespace: a class without code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many types
        forbidden = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if forbidden:
            raise UserError(
                f"{key}{path} holds Python objects ({forbidden[1]}), which are not loaded as they could run code",
                hint="where you trust the file, write its weights alone with torch.save(model.state_dict(), ...)",
            ) from None
        # torch's own words about other kinds of damage advise to load without weights_only.
        reason = "it is damaged, or was not written by torch.save"
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            reason = "there is not enough memory for it, or it is damaged"
        elif isinstance(error, OSError | DamagedArchive):
            reason = str(error)
        raise UserError(
            f"{key}{path} is not a readable file of weights ({reason})", hint="copy it again, or name another file"
        ) from None


def _flatten(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries with their keys joined by dots, without the names of wrappers."""
    if isinstance(value, Tensor):
        if name and _is_dense(value):
            value = value.float() if value.is_floating_point() else value
            yield ".".join(part for part in name.split(".") if part not in WRAPPERS), value.detach()
    elif isinstance(value, Mapping) and depth < MAX_DEPTH:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _is_dense(value: object) -> bool:
    try:
        return isinstance(value, Tensor) and check_dense(value) is value
    except ValueError:
        return False
