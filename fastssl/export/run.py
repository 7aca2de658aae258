"""`fastssl export`: one file, with its model card."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from fastssl.common.errors import UserError
from fastssl.common.files import (
    UnsafeFile,
    make_folder,
    read_bytes,
    remove_abandoned_files,
    write_atomically,
    write_error,
)
from fastssl.export.card import CARD, loading_code, model_card
from fastssl.export.onnx_file import require_onnx, write_onnx
from fastssl.export.source import read_run
from fastssl.models.exported import write_exported

Format = Literal["timm", "safetensors", "onnx"]
SUFFIX = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """The files of an export."""

    path: Path
    card: Path
    load_with: str  # a Python expression
    difference: float | None  # largest difference of ONNX outputs from torch's on random images; None: not measured


def export_run(run: str | Path, format: Format, out: Path | None = None, sigma: bool = False) -> Exported:
    """Write a trained run's model as one file that others can load, and model_card.md next to it.

    Args:
        run: run directory or checkpoint file.
        out: the file; None: RUN/export/FORMAT/NAME, with sigma RUN/export/FORMAT-sigma/NAME.
        sigma: whether the file also gives mean and standard deviation of the stochastic embedding.

    Raises UserError for every mistake of the user, also where a file exists: nothing is overwritten.
    """
    if format == "onnx":
        require_onnx()
    source = read_run(run)
    if format == "timm" and source.recipe.model.stem == "small":
        raise UserError(
            f"{run} has model.stem=small, a ResNet that timm has no name for",
            hint="use --format safetensors, which fastssl.load_encoder reads",
        )
    if sigma and not source.spaces:
        raise UserError(
            f"{run} is deterministic (embedding.stochastic=none) and has no sigma", hint="leave out --sigma"
        )
    if sigma and format == "timm":
        raise UserError("A timm model cannot hold sigma", hint="use --format safetensors or onnx, or leave out --sigma")
    name = re.sub(r"[^\w.-]+", "-", source.recipe.name).strip(".-") or "model"
    # A folder for each format, as each has its own card.
    folder = (source.run_dir or source.checkpoint.parent) / "export" / (f"{format}-sigma" if sigma else format)
    path = out or folder / f"{name}{SUFFIX[format]}"
    if path.suffix != SUFFIX[format]:  # timm and load_encoder look at it
        raise UserError(
            f"--out {path} has another ending than a {format} file", hint=f"name a file that ends in {SUFFIX[format]}"
        )
    card = path.with_name(CARD)
    eval_folder = None
    if source.run_dir and path.resolve().is_relative_to(source.run_dir.resolve()):
        eval_folder = os.path.relpath(source.run_dir.resolve() / "eval", path.resolve().parent)
    text = str(model_card(source, path.name, format, sigma, eval_folder)).encode("utf-8", "replace")
    for file in (path, card):
        # An export that was killed before it wrote the file has left a card, which is the same.
        if file.exists() and not (file == card and _has_content(card, text)):
            raise UserError(
                f"{file} exists already and is not overwritten", hint="move it, or name another file with --out"
            )
    difference = None

    def write(part: Path) -> None:
        nonlocal difference
        header = {"format": "pt", **source.header}
        if format == "onnx":
            difference = write_onnx(part, source, sigma)
        elif format == "timm":
            weights = source.model.encoder.state_dict()
            save_file({name: weight.contiguous() for name, weight in weights.items()}, part, metadata=header)
        else:
            write_exported(part, source.model, source.recipe, header, whole=sigma)

    try:
        if out is None:
            make_folder(folder.parent)
            make_folder(folder)
        for file in (path, card):
            remove_abandoned_files(file.parent, file.name)
        write_atomically(card, text)
        write_atomically(path, write)
    except UnsafeFile as error:
        raise write_error(path, error) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error})", hint="name another file with --out") from None
    finally:
        # A card without its file would block the next attempt.
        if card.exists() and not path.exists():
            card.unlink()
    return Exported(path, card, loading_code(source, str(path), format, sigma), difference)


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, len(content)) == content
    except OSError:
        return False
