"""Twenty steps on one file and on shards of it: the same batches, the same weights, whatever is killed and resumed.

    python benchmarks/sharded_runs.py IMAGES WORK --canvas 32 --batch-size 32 --size 32

Builds IMAGES as one file and as 1, 3 and 8 shards in WORK, and trains twenty steps of a ResNet-18 on the CPU from each,
in one process and in two, some of them killed after step 7 and continued on other files or with other processes. Prints
a Markdown table of how each run ends, compared with one that nothing disturbed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastssl.beton import build_beton

STEPS, KILLED_AFTER = 20, 7


class Part(NamedTuple):
    """One start of a run."""

    data: str  # "file", or a number of shards
    processes: int
    is_killed: bool = False


# What a run goes through, and the run that it is compared with.
RUNS = {
    "1 shard": ([Part("1", 1)], "file, one process"),
    "3 shards": ([Part("3", 1)], "file, one process"),
    "8 shards": ([Part("8", 1)], "file, one process"),
    "file, killed, 3 shards": ([Part("file", 1, True), Part("3", 1)], "file, one process"),
    "3 shards, killed, 8 shards": ([Part("3", 1, True), Part("8", 1)], "file, one process"),
    "8 shards, two processes": ([Part("8", 2)], "file, two processes"),
    "3 shards, two processes, killed, 8 shards": ([Part("3", 2, True), Part("8", 2)], "file, two processes"),
    "file, two processes": ([Part("file", 2)], "file, one process"),
    "3 shards, two processes, killed, file, one process": ([Part("3", 2, True), Part("file", 1)], "file, one process"),
    "file, killed, 8 shards, two processes": ([Part("file", 1, True), Part("8", 2)], "file, one process"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--canvas", type=int, required=True, help="px")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="of the views, in px")
    arguments = parser.parse_args()
    for name, shards in (("file", None), ("1", 1), ("3", 3), ("8", 8)):
        build_beton("imagefolder", arguments.images, arguments.work / name, canvas=arguments.canvas, shards=shards)
    settings = [
        f"train.batch_size={arguments.batch_size}", f"data.limit={STEPS * arguments.batch_size}",
        f"views.size={arguments.size}", "model.stem=imagenet", "embedding.samples=3", "train.epochs=1",
        "data.val=null", "probe.every=0", "log.every=1", "checkpoint.every=5", "train.device=cpu",
        "train.precision=fp32",
    ]  # fmt: skip
    print("| run | compared with | weights, losses and position |\n|---|---|---|")
    ends: dict[str, tuple[dict[str, Any], list[float]]] = {}

    def end_of(name: str, parts: list[Part]) -> tuple[dict[str, Any], list[float]]:
        if name not in ends:
            run = arguments.work / "runs" / name.replace(" ", "_").replace(",", "")
            for part in parts:
                train([*settings, f"data.train={arguments.work / part.data}", f"run.dir={run}"], run, part)
            ends[name] = read_end(run)
        return ends[name]

    for processes, name in ((1, "file, one process"), (2, "file, two processes")):
        end_of(name, [Part("file", processes)])
    for name, (parts, other) in RUNS.items():
        print(f"| {name} | {other} | {compare(ends[other], end_of(name, parts))} |", flush=True)


def train(overrides: list[str], run: Path, part: Part) -> None:
    """Begin a run or continue it, to its end or until it is killed."""
    launcher = [] if part.processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(part.processes)]
    command = [sys.executable, *launcher, "-m", "fastssl", "train", "recipes/zprob_barlow.yaml", *overrides]
    process = subprocess.Popen(
        [*command, "--resume", "auto"], env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    if part.is_killed:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= KILLED_AFTER):
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    if process.returncode != (-signal.SIGKILL if part.is_killed else 0):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output}")


def read_end(run: Path) -> tuple[dict[str, Any], list[float]]:
    """Return the last checkpoint, and the loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS, losses
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True), losses


def compare(a: tuple[dict[str, Any], list[float]], b: tuple[dict[str, Any], list[float]]) -> str:
    (first, losses), (second, others) = a, b
    same = all(torch.equal(weight, second["model"][name]) for name, weight in first["model"].items())
    if same and first["loader"] == second["loader"] and losses == others:
        return "bit for bit"
    assert first["loader"] == second["loader"] and first["step"] == second["step"] == STEPS
    return f"the same position; losses within {max(abs(x - y) / abs(x) for x, y in zip(losses, others)):.1e}"


if __name__ == "__main__":
    main()
