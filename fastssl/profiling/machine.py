"""What the machine could give: measured peaks, and what is known of it."""

import os
import time
from pathlib import Path

import torch

from fastssl.profiling.timing import wait_for
from fastssl.training.setup import DTYPES

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the measured peak
COPIED = 1 << 28  # bytes of the copy that is the measured peak
LOOK = 0.5  # seconds of looking at what else runs
TRIALS = 3  # of each, the best counts


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a product of large square matrices at the run's precision, or of a convolution where that is faster, as
    on a CPU (two cores of an EPYC: 188 and 238 GFLOP/s)."""
    side, dtype = SIDE[device.type], DTYPES.get(precision, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    x = torch.randn(32, 256, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    product = 2 * side**3 / _best_seconds(lambda: a @ a, device)
    convolution = 2 * x.numel() * 256 * 9 / _best_seconds(lambda: torch.conv2d(x, kernel, padding=1), device)
    return max(product, convolution)


def copy_peak(device: torch.device) -> float | None:
    """Bytes/s of a large copy from pinned memory to the GPU; None without one, where nothing is copied."""
    if device.type != "cuda":
        return None
    source = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return COPIED / _best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def cores_busy_now() -> float:
    """How many cores anything on this machine keeps busy while this process sleeps."""
    before = _busy_seconds()
    time.sleep(LOOK)
    return (_busy_seconds() - before) / LOOK


def _busy_seconds() -> float:
    """CPU-seconds of the machine since it started, idle ones and waits for disks left out."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _best_seconds(work, device: torch.device) -> float:
    best = float("inf")
    for _ in range(TRIALS + 1):  # the first may allocate and choose kernels, and is seldom the best
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best
