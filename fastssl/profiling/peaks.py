"""Peak rates: of NVIDIA's GPUs and of storage from data sheets, of this machine by measuring.

All rates from data sheets are dense: most data sheets print twice as much, "with sparsity", which training does not
use. 16-bit rates are those that accumulate in fp32, as torch does: GeForce cards reach half of the fp16 rate.
"""

import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastssl.profiling.timing import synchronize
from fastssl.training.setup import DTYPES

# The share of a link's rate that copies from the host and transfers between GPUs reach. nccl-tests' bus bandwidth: 230
# of 300 GB/s on 8 A100, 35 to 45 of 63 over PCIe 5
# (https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests)
LINK_SHARE = 0.7
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63e9}  # B/s in each direction, 16 lanes, by generation: PCI-SIG
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}  # of the product that measures the peak
COPY_BYTES = 1 << 28
TRIALS = 3  # the best one counts


class Device(NamedTuple):
    """One kind of GPU. An addition and a multiplication are two floating-point operations."""

    name: str
    bf16: float | None  # FLOP/s of the tensor cores; None: they do not have this format
    fp16: float  # FLOP/s of the tensor cores
    tf32: float | None  # FLOP/s of the tensor cores
    fp32: float  # FLOP/s without tensor cores
    bandwidth: float  # B/s of its memory
    pcie: float  # B/s in each direction
    interconnect: float  # B/s in each direction between all GPUs of a machine: NVLink, or PCIe if NVLink joins only two
    memory: int  # bytes
    source: str

    def peak(self, precision: str) -> float | None:
        """FLOP/s in fp32, tf32, bf16 or fp16; None where the tensor cores do not have the format."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "fp16": self.fp16}[precision]


SOURCES = {
    "A10": "A10 data sheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
    "A100": "A100 data sheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    "A30": "A30 product page, https://www.nvidia.com/en-us/data-center/products/a30-gpu/",
    "A40": "A40 product page, https://www.nvidia.com/en-us/data-center/a40/",
    "Ada": "Ada white paper 2.1, https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/"
    "nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf",
    "GA102": "GA102 white paper 2.0, https://www.nvidia.com/content/PDF/"
    "nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    "H100": "H100 data sheet, https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    "H200": "H200 product page, https://www.nvidia.com/en-us/data-center/h200/",
    "HGX": "HGX product page, https://www.nvidia.com/en-us/data-center/hgx/",
    "L4": "L4 product page, https://www.nvidia.com/en-us/data-center/l4/",
    "L40S": "L40S product page, https://www.nvidia.com/en-us/data-center/l40s/",
    "RTX 50": "RTX Blackwell white paper, https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
    "nvidia-rtx-blackwell-gpu-architecture.pdf",
    "T4": "T4 data sheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/"
    "t4-tensor-core-datasheet-951643.pdf",
    "V100": "V100 data sheet, https://images.nvidia.com/content/technologies/volta/pdf/"
    "volta-v100-datasheet-update-us-1165301-r5.pdf",
}
# name: words that identify it, 16-bit, TF32 and FP32 in TFLOP/s, memory bandwidth in GB/s, PCIe generation, NVLink in
# GB/s in each direction (0: none, or a bridge between two cards), memory in GiB, source. "A100" means the most common.
_TABLE = {
    "B200": ("b200", 2250, 1125, 75, 7700, 5, 900, 180, "HGX"),
    "H200": ("h200", 989, 494.5, 67, 4800, 5, 450, 141, "H200"),
    "H100 SXM": ("h100", 989, 494.5, 67, 3350, 5, 450, 80, "H100"),
    "H100 PCIe": ("h100 pcie", 756, 378, 51, 2000, 5, 0, 80, "H100"),
    "A100 SXM 80GB": ("a100", 312, 156, 19.5, 2039, 4, 300, 80, "A100"),
    "A100 SXM 40GB": ("a100 40gb", 312, 156, 19.5, 1555, 4, 300, 40, "A100"),
    "A100 PCIe 80GB": ("a100 pcie", 312, 156, 19.5, 1935, 4, 0, 80, "A100"),
    "A100 PCIe 40GB": ("a100 pcie 40gb", 312, 156, 19.5, 1555, 4, 0, 40, "A100"),
    "A10": ("a10", 125, 62.5, 31.2, 600, 4, 0, 24, "A10"),
    "A30": ("a30", 165, 82, 10.3, 933, 4, 0, 24, "A30"),
    "A40": ("a40", 149.7, 74.8, 37.4, 696, 4, 0, 48, "A40"),
    "L4": ("l4", 121, 60, 30.3, 300, 4, 0, 24, "L4"),
    "L40S": ("l40s", 362, 183, 91.6, 864, 4, 0, 48, "L40S"),
    "RTX A6000": ("a6000", 154.8, 77.4, 38.7, 768, 4, 0, 48, "GA102"),
    "RTX 6000 Ada": ("6000 ada", 364.2, 182.1, 91.1, 960, 4, 0, 48, "Ada"),
    "V100 SXM2": ("v100", 125, None, 15.7, 900, 3, 150, 16, "V100"),
    "V100 PCIe": ("v100 pcie", 112, None, 14, 900, 3, 0, 16, "V100"),
    "T4": ("t4", 65, None, 8.1, 320, 3, 0, 16, "T4"),
    "RTX 3090": ("3090", 71.2, 35.6, 35.6, 936, 4, 0, 24, "GA102"),
    "RTX 4090": ("4090", 165.2, 82.6, 82.6, 1008, 4, 0, 24, "Ada"),
    "RTX 5090": ("5090", 209.5, 104.8, 104.8, 1792, 5, 0, 32, "RTX 50"),
}
DEVICES = {
    words: Device(
        name, tf32 and half * 1e12, half * 1e12, tf32 and tf32 * 1e12, fp32 * 1e12,  # bf16 came with tf32: Ampere
        bandwidth * 1e9, PCIE[pcie], nvlink * 1e9 or PCIE[pcie], memory * 2**30, SOURCES[source],
    )
    for name, (words, half, tf32, fp32, bandwidth, pcie, nvlink, memory, source) in _TABLE.items()
}  # fmt: skip
OTHER_CHIPS = {"ti", "d", "laptop", "mobile", "max", "nvl", "mig"}  # with one of these words it is another device


def find_device(name: str) -> Device | None:
    """Find a device by the name that torch.cuda.get_device_name() or a person gives it.

    For example "NVIDIA A100-SXM4-80GB", "A100", "rtx4090". The longest known name in it wins.
    """
    text = re.sub(r"(\d+)\s*gi?b\b", r"\1gb", name.lower()).replace("rtx", " ")
    words = set(re.findall(r"[a-z0-9]+", text))
    known = [key for key in DEVICES if words >= set(key.split())]
    return DEVICES[max(known, key=len)] if known and not words & OTHER_CHIPS else None


def slower_variants(device: Device) -> list[str]:
    """Return the names of the devices that are known by the same words and more, all slower: of an A100 SXM with 80 GB
    those with 40 GB and those for PCIe."""
    words = next(set(words.split()) for words, known in DEVICES.items() if known == device)
    return [known.name for name, known in DEVICES.items() if set(name.split()) > words]


class StorageKind(NamedTuple):
    """The total rates of several threads that read in parallel."""

    bytes_per_second: float  # in large pieces
    reads_per_second: float  # at random positions
    source: str

    def seconds(self, size: float, piece: float = 100e3) -> float:
        """Return the seconds to read `size` bytes in pieces of `piece` bytes at random positions."""
        return max(size / self.bytes_per_second, size / piece / self.reads_per_second)


STORAGE = {
    "nvme": StorageKind(3e9, 1e5, "assumed: Samsung 970 and 980 Pro (PCIe 3 and 4) read 3.5 and 7 GB/s in sequence"),
    "ssd": StorageKind(0.5e9, 5e4, "SATA; Samsung 870 EVO: 0.56 GB/s in sequence, 98,000 reads/s (tomshardware.com)"),
    "hdd": StorageKind(200e6, 120, "assumed: at 7,200 rpm half a turn takes 4.2 ms, a seek among queued ones as long"),
    "nfs": StorageKind(0.5e9, 5e3, "assumed: 10 Gbit/s carry 1.25 GB/s at most"),
}
STORAGE_NAMES = {name: name for name in STORAGE} | {"sata": "ssd", "sata ssd": "ssd", "disk": "hdd", "network": "nfs"}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the FLOP/s that a device can reach at a precision, from the data sheet or measured, and the source."""
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known and (peak := known.peak(precision)):
        return peak, f"{known.source}, dense {precision}"
    # A convolution may be faster than a product of matrices, as on a CPU (two cores of an EPYC: 238 and 188 GFLOP/s).
    side, dtype = MATRIX_SIDE[device.type], DTYPES.get(precision, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    x = torch.randn(32, 256, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    product = 2 * side**3 / _best_seconds(lambda: a @ a, device)
    convolution = 2 * x.numel() * 256 * 9 / _best_seconds(lambda: torch.conv2d(x, kernel, padding=1), device)
    return max(product, convolution), "measured: a large matrix product or convolution"


def copy_peak(device: torch.device) -> float | None:
    """Return the bytes per second of a large copy from pinned memory to the GPU; None without a GPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return COPY_BYTES / _best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TRIALS + 1):  # the first one may allocate memory and choose kernels
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
