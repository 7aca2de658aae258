"""All that a resume needs, and the files of a run directory, none of them ever half-written."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastssl.beton.atomic import write_atomically
from fastssl.loading import BetonLoader
from fastssl.models import SSLModel
from fastssl.models.checkpoint import checkpoint_of, read_checkpoint, recipe_in
from fastssl.recipe import Recipe, UserError

# A resumed run may change these; any other key would make it another run.
FREE_KEYS = (
    "run", "data.resident", "data.on_bad_sample", "data.workers", "embedding.chunk", "train.device", "train.compile",
    "train.max_skipped_steps", "probe", "log", "checkpoint",
)  # fmt: skip


@dataclass
class TrainState:
    """What changes during training. `step` counts optimiser steps, skipped ones included."""

    recipe: Recipe
    model: SSLModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: BetonLoader
    skipped: Tensor  # int64 () on the device: steps left out because they were not finite
    step: int = 0
    seconds: float = 0.0  # of training, over all resumes
    started: float = field(default_factory=time.monotonic)

    def save(self, run_dir: Path) -> None:
        now = time.monotonic()
        self.seconds, self.started = self.seconds + now - self.started, now
        saved = {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "step": self.step,
            "seconds": self.seconds,
            "torch_threads": torch.get_num_threads(),
            "rng": torch.get_rng_state(),  # for backbones with dropout
        }
        write_atomically(run_dir / "checkpoints" / "last.pt", lambda path: torch.save(saved, path))

    def resume(self, run_dir: Path) -> list[str]:
        """Continue the run in this directory. Returns warnings. Raises UserError for another run's recipe."""
        path = checkpoint_of(run_dir)
        saved = read_checkpoint(path)
        changed = changed_keys(recipe_in(path, saved).model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        if changed:
            raise UserError(
                f"{run_dir} was trained with other values of {', '.join(changed)}: resume with its own "
                f"{run_dir / 'recipe.yaml'}, or start a new run."
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.loader.load_state_dict(saved["loader"])
        self.skipped.copy_(saved["skipped"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["rng"])
        if saved["torch_threads"] != torch.get_num_threads():
            return [
                f"torch ran with {saved['torch_threads']} threads before and has {torch.get_num_threads()} "
                f"now, so results agree to rounding only (OMP_NUM_THREADS={saved['torch_threads']} restores them)."
            ]
        return []


def changed_keys(before: dict, after: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, the free ones left out."""
    changed = []
    for key in {**before, **after}:
        dotted, old, new = prefix + key, before.get(key), after.get(key)
        if old == new or dotted in FREE_KEYS:
            continue
        both = isinstance(old, dict) and isinstance(new, dict)
        changed += changed_keys(old, new, dotted + ".") if both else [dotted]
    return changed


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each step once even after a resume."""

    def __init__(self, path: Path, resumed_at: int):
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _belongs_before(line, resumed_at)]
        write_atomically(path, lambda beside: beside.write_text("".join(line + "\n" for line in kept)))
        self._file = open(path, "a")

    def write(self, metrics: dict) -> None:
        # JSON has no word for what is not finite.
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _belongs_before(line: str, resumed_at: int) -> bool:
    """Whether a line was written before the checkpoint of step `resumed_at`; a torn last line was not."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return False
    # The probe runs behind the checkpoint of its step, so that line comes again.
    return metrics["step"] < resumed_at or (metrics["step"] == resumed_at and "loss" in metrics)
