"""Speed and page faults of a training step on a CPU with and without `keep_freed_memory`.

    python benchmarks/kept_memory.py recipes/cifar10/barlow.yaml data.train=cifar10/train.beton data.val=null \\
        model.stem=imagenet train.batch_size=128 [--rounds 3]

Each line of the result runs STEPS steps on one batch of views, after two warm-up steps. The two settings run
alternately, each in a process of its own, because the setting cannot be undone.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

STEPS = 10


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe")
    arguments.add_argument("overrides", nargs="*")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", choices=["kept", "given back"], help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.only:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, float]]] = {"kept": [], "given back": []}
    for _ in range(options.rounds):
        for name, rounds in results.items():
            command = [sys.executable, __file__, options.recipe, *options.overrides, "--only", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print("| freed memory is | images/s, median (range) | page faults per step | system time per step | peak memory |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        rates = [result["images_per_second"] for result in rounds]
        rest = [statistics.median(result[key] for result in rounds) for key in ("faults", "system_ms", "memory_mb")]
        print(
            f"| {name} | {statistics.median(rates):.4g} ({min(rates):.4g} to {max(rates):.4g}) | {rest[0]:,.0f} | "
            f"{rest[1]:.0f} ms | {rest[2]:,.0f} MB |"
        )
    ratios = [a["images_per_second"] / b["images_per_second"] for a, b in zip(*results.values())]
    print(f"\nkept / given back: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).")


def measure(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from fastssl import load_recipe
    from fastssl.profiling.device_stages import take_step, with_fixed_views
    from fastssl.training import setup

    if options.only == "given back":
        setup.keep_freed_memory = lambda: None
    run, _ = setup.prepare(load_recipe(options.recipe, options.overrides), torch.device("cpu"), None)
    batch = next(iter(run.state.loader))
    fixed = with_fixed_views(run, run.views(batch, 0))
    for _ in range(2):
        take_step(fixed, [batch], 0)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    images = sum(take_step(fixed, [batch], 0) for _ in range(STEPS))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images_per_second": images / seconds,
        "faults": (after.ru_minflt - before.ru_minflt) / STEPS,
        "system_ms": 1000 * (after.ru_stime - before.ru_stime) / STEPS,
        "memory_mb": after.ru_maxrss / 1000,
    }


if __name__ == "__main__":
    main()
