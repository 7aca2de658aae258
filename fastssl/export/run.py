"""`fastssl export`: one file, and the model card beside it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.export.card import CARD, loading_line, model_card
from fastssl.export.onnx_file import require_onnx, write_onnx
from fastssl.export.run_summary import look_into
from fastssl.export.source import Source, open_run
from fastssl.models.exported import write_exported

Format = Literal["timm", "safetensors", "onnx"]
SUFFIX = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    path: Path
    card: Path
    load_with: str  # one line of Python
    difference: float | None  # of ONNX from torch, the largest on random images; None: not measured


def export_run(run: str | Path, format: Format, out: Path | None = None, sigma: bool = False) -> Exported:
    """Write a trained run's model as one file that others can load, with model_card.md beside it.

    out: the file; None means RUN/export/FORMAT/NAME, with sigma RUN/export/FORMAT-sigma/NAME. sigma: also what leads to
    the mean and standard deviation of the stochastic embedding. Nothing is ever overwritten. Raises UserError for
    everything that the user can mend.
    """
    if format == "onnx":
        require_onnx()
    source = open_run(run)
    refuse_what_a_format_lacks(run, source, format, sigma)
    path = out or default_path(source, format, sigma)
    card = path.with_name(CARD)
    refuse_taken_names(path, card, format)
    text = model_card(source, look_into(source), path.name, format, sigma).encode("utf-8", "replace")
    difference = None

    def write(beside: Path) -> None:
        nonlocal difference
        if format == "onnx":
            difference = write_onnx(beside, source, sigma)
        elif format == "timm":
            save_file(contiguous_weights(source), beside, metadata={"format": "pt", **source.header})
        else:
            write_exported(beside, source.model, source.recipe, {"format": "pt", **source.header}, whole=sigma)

    try:
        write_atomically(card, lambda beside: beside.write_bytes(text))
        write_atomically(path, write)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}): name another file with --out.") from None
    finally:
        if card.exists() and not path.exists():  # a card alone would be in the way of the next try
            card.unlink()
    return Exported(path, card, loading_line(source, str(path), format, sigma), difference)


def refuse_what_a_format_lacks(run: str | Path, source: Source, format: Format, sigma: bool) -> None:
    if format == "timm" and source.recipe.model.stem == "small":
        raise UserError(
            f"{run} has model.stem=small, a ResNet that no timm name stands for: use --format safetensors, which "
            "fastssl.load_encoder reads."
        )
    if sigma and not source.spaces:
        raise UserError(f"{run} is deterministic (embedding.stochastic=none) and has no sigma: leave out --sigma.")
    if sigma and format == "timm":
        raise UserError("A timm model has no place for sigma: use --format safetensors or onnx, or leave out --sigma.")


def default_path(source: Source, format: Format, sigma: bool) -> Path:
    """A folder for each kind of file, as each has a card of its own."""
    name = re.sub(r"[^\w.-]+", "-", source.recipe.name).strip(".-") or "model"
    folder = f"{format}-sigma" if sigma else format
    return (source.run_dir or source.checkpoint.parent) / "export" / folder / f"{name}{SUFFIX[format]}"


def refuse_taken_names(path: Path, card: Path, format: Format) -> None:
    if path.suffix != SUFFIX[format]:  # timm and load_encoder go by it
        raise UserError(f"--out {path}: the name of a {format} file ends in {SUFFIX[format]}.")
    for taken in (path, card):
        if taken.exists():
            raise UserError(f"{taken} exists already and is not overwritten: move it, or name another file with --out.")


def contiguous_weights(source: Source) -> dict:
    """The backbone's state dictionary, as a file can hold it."""
    return {name: weight.contiguous() for name, weight in source.model.encoder.state_dict().items()}
