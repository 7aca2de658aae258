"""Fault drill: a CIFAR-10 run that is killed repeatedly at random moments must end as an undisturbed one.

python benchmarks/faults.py --data data/cifar10 --out records/faults.md

Trains ResNet-18 (ImageNet stem, 32 px, batch 128) on 5,000 images for five epochs with a kNN probe after each: once
undisturbed, and once with SIGKILL sent to the whole process group --kills times, each at a random time after the start.
A kill may hit while Python starts, in a step, in a save or in a probe.

The exit code is 1 unless weights, optimizer state and the loss of every step are equal bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RECIPE = "recipes/zprob_barlow.yaml"
EPOCHS = 5
STEPS = 39  # per epoch
LATEST = 35  # seconds after the start
EARLY = 5  # kills within the first 10 seconds, while the process starts


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's train.beton and val.beton")
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="write the result here as Markdown")
    options = arguments.parse_args()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    keys = [
        f"data.train={options.data}/train.beton", f"data.val={options.data}/val.beton", "data.limit=5000",
        "views.size=32", "train.batch_size=128", f"train.epochs={EPOCHS}", "train.device=cpu", "optim.warmup_epochs=1",
        "probe.every=1", "log.every=1", "checkpoint.every=2",
    ]  # fmt: skip

    began = time.monotonic()
    print("undisturbed run ...", flush=True)
    if start(keys, work / "straight").wait() != 0:
        return 1
    undisturbed = time.monotonic() - began
    rows = []
    for kill, delay in enumerate(moments(options.kills, options.seed), 1):
        rows.append(kill_once(keys, work / "killed", delay))
        print(f"kill {kill}: {rows[-1]}", flush=True)
    print("last start, not killed ...", flush=True)
    if start(keys, work / "killed").wait() != 0:
        return 1
    differences = compare(work / "straight", work / "killed")
    text = report(options, rows, differences, undisturbed, time.monotonic() - began)
    print(text)
    if options.out:
        options.out.write_text(text)
    shutil.rmtree(work)
    return 1 if differences else 0


def start(keys: list[str], run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastssl", "train", RECIPE, *keys, f"run.dir={run_dir}", "--resume", "auto"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def moments(kills: int, seed: int) -> list[float]:
    """Return the seconds after the start at which to kill, in random order."""
    generator = random.Random(seed)
    delays = [generator.uniform(0, 10) for _ in range(EARLY)]
    delays += [generator.uniform(0, LATEST) for _ in range(kills - EARLY)]
    generator.shuffle(delays)
    return delays


def kill_once(keys: list[str], run_dir: Path, delay: float) -> dict:
    """Start the run, kill it, and return how far it was."""
    for part in run_dir.glob("checkpoints/.*.part*"):  # of the previous kill
        part.unlink()
    process = start(keys, run_dir)
    time.sleep(delay)
    if process.poll() is not None:
        raise SystemExit(f"The run ended by itself ({process.returncode}) before it was killed: give it more epochs.")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = checkpoint(run_dir)
    logged = max((line["step"] for line in lines(run_dir)), default=0)
    return {
        "after": round(delay, 1),
        "step logged": logged,
        "step saved": saved["step"] if saved else None,
        "in a save": bool(list(run_dir.glob("checkpoints/.*.part*"))),
        "in a probe": logged > 0 and logged % STEPS == 0 and saved["epochs_probed"] < logged // STEPS,
    }


def checkpoint(run_dir: Path) -> dict | None:
    for name in ("last.pt", "previous.pt"):
        if (run_dir / "checkpoints" / name).exists():
            return torch.load(run_dir / "checkpoints" / name, weights_only=True)
    return None


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in text]


def compare(straight: Path, killed: Path) -> list[str]:
    """Return the names of everything that differs between the two runs."""
    a, b = checkpoint(straight), checkpoint(killed)
    found = [f"weight {name}" for name, tensor in a["model"].items() if not torch.equal(tensor, b["model"][name])]
    for index, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][index]
        found += [f"optimizer {index}.{key}" for key in state if not torch.equal(state[key], other[key])]
    metrics = [[(line["step"], line.get("loss"), line.get("knn")) for line in lines(run)] for run in (straight, killed)]
    if metrics[0] != metrics[1]:
        found.append("metrics.jsonl")
    return found


def report(
    options: argparse.Namespace, rows: list[dict], differences: list[str], undisturbed: float, seconds: float
) -> str:
    head = "| kill | " + " | ".join(rows[0]) + " |\n|" + "---|" * (len(rows[0]) + 1)
    cells = [" | ".join(map(str, (n, *row.values()))) for n, row in enumerate(rows, 1)]
    body = "\n".join(f"| {line} |" for line in cells)
    verdict = "Everything is equal, bit for bit." if not differences else f"DIFFERENT: {', '.join(differences[:9])}"
    command = f"python benchmarks/faults.py --data CIFAR10 --kills {options.kills} --seed {options.seed}"
    return (
        f"# Fault drill\n\n`{command}`, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{os.cpu_count()} cores. The undisturbed run took {undisturbed:.0f} s, everything {seconds / 60:.0f} "
        f"minutes.\n\nSIGKILL was sent to the process group {len(rows)} times at a random moment, and the same command "
        "started again each time. Weights, optimizer state and the loss and kNN of every logged line were compared "
        f"with the undisturbed run. **{verdict}**\n\n"
        f"{head}\n{body}\n\n"
        "after: seconds from the start of the process. step logged, step saved: the last step in metrics.jsonl and in "
        "the checkpoint when it was killed. in a save: a partly written checkpoint was found next to the complete one. "
        "in a probe: the last step of an epoch was done, and the kNN probe after it was not.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
