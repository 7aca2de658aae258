"""The run that is exported: its weights, and what its checkpoint says of them."""

import importlib.metadata
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from fastssl.common.errors import UserError
from fastssl.models import Model
from fastssl.models.checkpoint import model_from_checkpoint, newest_checkpoint, recipe_in, run_dir_of
from fastssl.models.encoder import has_fixed_size
from fastssl.recipe import Recipe
from fastssl.views import describe_eval_transform


@dataclass(frozen=True)
class Source:
    """A trained model and where it comes from."""

    model: Model  # eval mode, on the CPU
    recipe: Recipe
    checkpoint: Path
    checkpoint_sha256: str
    step: int | None  # None, also below: the checkpoint does not say
    epochs_done: int | None
    run_dir: Path | None  # None: the checkpoint lies in no run directory

    @property
    def spaces(self) -> str:
        """Where embeddings are stochastic: "h", "z", "hz", or "" for a deterministic run."""
        return self.recipe.embedding.stochastic.replace("none", "")

    @property
    def timm_options(self) -> dict[str, int]:
        """What timm.create_model needs beside the name and num_classes=0: positions must fit the input's size."""
        return {"img_size": self.recipe.views.size} if has_fixed_size(self.recipe.model.backbone) else {}

    @property
    def header(self) -> dict[str, str]:
        """What an exported file says about itself; a file's metadata are words, so lists and objects are JSON."""
        return {
            "fastssl_version": importlib.metadata.version("fastssl-trainer"),
            "name": self.recipe.name,
            "backbone": self.recipe.model.backbone,
            "stem": self.recipe.model.stem,
            "stochastic": self.recipe.embedding.stochastic,
            "eval_transform": json.dumps(describe_eval_transform(self.recipe.views)),
            "checkpoint_sha256": self.checkpoint_sha256,
        }


def open_run(run: str | Path) -> Source:
    """A run directory, or a checkpoint file. Raises UserError where there is no sound model in it."""
    checkpoint = newest_checkpoint(run)
    path, saved = checkpoint.path, checkpoint.saved
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    # Where gradients are wanted, torch.export keeps views in some attention (relpos, maxvit) that ONNX refuses.
    model = model_from_checkpoint(checkpoint).requires_grad_(False)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite: export an earlier checkpoint, or train again.")
    loader = saved.get("loader")
    return Source(
        model,
        recipe_in(path, saved),
        path,
        checkpoint.sha256,
        _count(saved["step"]),
        _count(loader.get("epoch")) if isinstance(loader, dict) else None,
        run_dir_of(path),
    )


def _count(value: object) -> int | None:
    """A checkpoint from a stranger may hold anything under any key."""
    return value if type(value) is int and value >= 0 else None
