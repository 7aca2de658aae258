"""Compare the estimators of mutual information with the known value for Gaussians, and measure their time.

OMP_NUM_THREADS=2 python benchmarks/mutual_information.py [--seeds 3] [--counts 5000 10000] [--out FILE.md]
"""

import argparse
import math
import platform
import statistics
import time
from pathlib import Path

import torch

from fastssl.evaluation.mutual_information import ESTIMATORS, estimate

# (dimensions, nats); 0.144 and 0.830 nats are one dimension with rho = 0.5 and 0.9.
CASES = [(1, -0.5 * math.log(1 - rho**2)) for rho in (0.0, 0.5, 0.9)]
CASES += [(20, 0.0), (20, 1.0), (20, 2.0), (20, 4.0), (20, 10.0)]


def gaussians(count: int, dims: int, nats: float, seed: int) -> list[torch.Tensor]:
    """Return `count` pairs of correlated variables, mixed linearly, which keeps their mutual information."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, dims, generator=generator, dtype=torch.float64)
    rho = math.sqrt(1 - math.exp(-2 * nats / dims))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    return [data @ torch.randn(dims, dims, generator=generator, dtype=torch.float64) for data in (x, y)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 10_000])
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; nats for each of "
        f"{arguments.seeds} seeds (s: saturated), seconds each",
        "",
        "| samples | dimensions | nats | " + " | ".join(arguments.estimators) + " | seconds |",
        "|" + "---|" * (4 + len(arguments.estimators)),
    ]
    print(*lines, sep="\n", flush=True)
    for count in arguments.counts:
        for dims, nats in CASES:
            cells, seconds = [], []
            for name in arguments.estimators:
                found = []
                for seed in range(arguments.seeds):
                    start = time.perf_counter()
                    found.append(estimate(*gaussians(count, dims, nats, seed), name, seed))
                    seconds.append(time.perf_counter() - start)
                cells.append(" ".join(f"{each.nats:.3f}{'s' * each.saturated}" for each in found))
            lines.append(f"| {count:,} | {dims} | {nats:.3f} | {' | '.join(cells)} | {statistics.fmean(seconds):.1f} |")
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
