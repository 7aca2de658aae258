"""The run directory's first files: recipe, environment, and the picture of the views."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastssl.beton.atomic import write_atomically
from fastssl.recipe import Recipe, UserError
from fastssl.views.paired import unnormalize

PAIRS_SHOWN = 16


def new_run_dir(recipe: Recipe) -> Path:
    """The directory that the recipe names, refused if a run is in it; else runs/NAME, or NAME-2 and so on."""
    if recipe.run.dir is not None:
        path = Path(recipe.run.dir)
        if (path / "recipe.yaml").exists():
            raise UserError(f"{path} already holds a run: continue it with --resume {path}, or set another run.dir.")
    else:
        path, number = Path("runs") / recipe.name, 1
        while path.exists():
            number += 1
            path = Path("runs") / f"{recipe.name}-{number}"
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The run directory {path} cannot be made ({error.strerror}): set another run.dir.") from None
    return path


def describe_run(run_dir: Path, recipe: Recipe, device: torch.device) -> None:
    """Write recipe.yaml (resolved) and environment.json."""
    write_atomically(run_dir / "recipe.yaml", lambda path: path.write_text(recipe.to_yaml()))
    packages = ("fastssl-trainer", "torch", "torchvision", "timm", "ffcv", "numba", "numpy", "torch-optimizer")
    environment = {
        "command": sys.argv,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }
    text = json.dumps(environment, indent=2) + "\n"
    write_atomically(run_dir / "environment.json", lambda path: path.write_text(text))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """The commit of the checkout that fastssl runs from, with -dirty where files changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_view_sheet(run_dir: Path, v1: torch.Tensor, v2: torch.Tensor, recipe: Recipe) -> None:
    """views.png: pairs of augmented views side by side, as the encoder sees them."""
    pairs = min(PAIRS_SHOWN, len(v1))
    columns = 4
    rows = -(-pairs // columns)
    size, gap = recipe.views.size, max(2, recipe.views.size // 16)
    sheet = np.full((rows * (size + gap) + gap, columns * (2 * size + 2 * gap) + gap, 3), 255, np.uint8)
    for i in range(pairs):
        for view, v in enumerate((v1, v2)):
            pixels = unnormalize(v[i : i + 1], recipe.views)[0].permute(1, 2, 0)
            y = gap + (i // columns) * (size + gap)
            x = gap + (i % columns) * (2 * size + 2 * gap) + view * size
            sheet[y : y + size, x : x + size] = (pixels * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(sheet)
    if size < 100:  # small views are enlarged, so that a person sees something
        factor = 128 // size
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    write_atomically(run_dir / "views.png", lambda path: picture.save(path))
