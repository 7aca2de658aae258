"""Training runs for tests: small, real, and in processes of their own where they have to be killed.

As a program, `python -m training_runs JOBS`, it trains several runs one after the other; torchrun can start it too.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SMALL = [
    "model.backbone=test_resnet", "views.size=32", "model.projector={layers: 2, hidden: 32, out: 32}",
    "embedding.samples=3", "train.batch_size=16", "train.epochs=2", "train.device=cpu", "log.every=1", "probe.every=0",
    "optim.warmup_epochs=1",
]  # fmt: skip
Jobs = list[tuple[str, list[str]]]  # recipe and overrides of each run
FORKS = multiprocessing.get_context("forkserver")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE = 300  # seconds; everything here takes some ten on an idle machine


def small(canvas: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of a recipe that trains three steps an epoch."""
    return [*SMALL, f"data.train={canvas}/train.beton", f"data.val={canvas}/val.beton", f"run.dir={run_dir}", *more]


def command(recipe: str, overrides: list[str], processes: int = 1, torchrun: tuple[str, ...] = ()) -> list[str]:
    """`fastssl train`, through torchrun where there are several processes."""
    train = ["-m", "fastssl", "train", f"recipes/{recipe}.yaml", *overrides]
    if processes == 1 and not torchrun:
        return [sys.executable, *train]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *torchrun]
    return [*launcher, *train]


def train_jobs(jobs: Jobs) -> None:
    """Train each run, or continue it, with its kNN probe."""
    from fastssl.evaluation.probe import knn_probe
    from fastssl.recipe import load_recipe
    from fastssl.training import train

    torch.set_num_threads(1)
    for name, overrides in jobs:
        recipe = load_recipe(f"recipes/{name}.yaml", overrides)
        train(recipe, resume="auto", probe=knn_probe(recipe) if recipe.probe.every else None)


def train_jobs_in_processes(jobs: Jobs, processes: int, patience: int = PATIENCE) -> None:
    """The same in several processes, which torchrun starts once for all runs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [*torchrun, "-m", "training_runs", json.dumps(jobs)],
        env=environment, capture_output=True, text=True, timeout=patience,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments, **options), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments, **options), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_line(process: subprocess.Popen | multiprocessing.Process, run_dir: Path, lines: int) -> None:
    """Wait until the run has logged this many lines, and fail if its process ends before."""
    path, deadline = run_dir / "metrics.jsonl", time.time() + PATIENCE
    while not (path.exists() and path.read_text().count("\n") >= lines):
        has_ended = (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is not None
        assert not has_ended and time.time() < deadline, f"{run_dir} never logged {lines} lines"
        time.sleep(0.01)


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics_of(run_dir) if "loss" in line]


def checkpoint_in(run_dir: Path, name: str = "last.pt") -> dict:
    return torch.load(run_dir / "checkpoints" / name, weights_only=True)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint_in(run_dir)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer state, and the loss of every step, each step once."""
    first, second = checkpoint_in(a), checkpoint_in(b)
    for key in ("model", "optimizer", "ema", "skipped", "step", "best", "epochs_probed", "loader"):
        assert equal(first[key], second[key]), key
    assert losses_of(a) == losses_of(b)


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    train_jobs(json.loads(sys.argv[1]))
