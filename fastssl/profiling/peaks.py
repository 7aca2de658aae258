"""Peaks of NVIDIA's GPUs and of storage, from their makers' data sheets: what `--plan` and "share of the peak" need.

All rates are dense: most data sheets print twice as much, "with sparsity", which training does not use. 16-bit rates
are those with sums in fp32, as torch computes: GeForce cards do half of what is printed for sums in fp16.
"""

import re
from typing import NamedTuple

# Of a link's rate, what copies from the host and transfers between GPUs reach. nccl-tests' bus bandwidth: 230 of 300
# GB/s on 8 A100, 35 to 45 of 63 over PCIe 5 (https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests)
LINK_SHARE = 0.7
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63e9}  # B/s in each direction, 16 lanes, by generation: PCI-SIG


class Device(NamedTuple):
    """One kind of GPU. FLOP/s: an addition and a multiplication are two."""

    name: str
    bf16: float | None  # FLOP/s of the tensor cores; None: they have no such format
    fp16: float  # FLOP/s of the tensor cores
    tf32: float | None  # FLOP/s of the tensor cores
    fp32: float  # FLOP/s without tensor cores
    bandwidth: float  # B/s of its memory
    pcie: float  # B/s in each direction
    interconnect: float  # B/s between all GPUs of a machine, in each direction: NVLink, or PCIe where it joins but two
    memory: int  # bytes
    source: str

    def peak(self, precision: str) -> float | None:
        """FLOP/s in fp32, tf32, bf16 or fp16; None where the tensor cores have no such format."""
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
# name: words that tell it, 16-bit, TF32 and FP32 in TFLOP/s, memory in GB/s, PCIe's generation, NVLink in GB/s in each
# direction (0: none, or a bridge between two cards), memory in GiB, source. A100 alone means the commonest.
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
OTHER_CHIPS = {"ti", "d", "laptop", "mobile", "max", "nvl", "mig"}  # each makes another device of any name


def find_device(name: str) -> Device | None:
    """The device that torch.cuda.get_device_name() or a person means: "NVIDIA A100-SXM4-80GB", "A100", "rtx4090"."""
    text = re.sub(r"(\d+)\s*gi?b\b", r"\1gb", name.lower()).replace("rtx", " ")
    words = set(re.findall(r"[a-z0-9]+", text))
    known = [key for key in DEVICES if words >= set(key.split())]
    return DEVICES[max(known, key=len)] if known and not words & OTHER_CHIPS else None


class StorageKind(NamedTuple):
    """What several threads that read at once get, together."""

    bytes_per_second: float  # in large pieces
    reads_per_second: float  # of single places
    source: str

    def seconds(self, size: float, piece: float = 100e3) -> float:
        """To read `size` bytes in pieces of so many bytes at random places."""
        return max(size / self.bytes_per_second, size / piece / self.reads_per_second)


STORAGE = {
    "nvme": StorageKind(3e9, 1e5, "assumed: Samsung 970 and 980 Pro (PCIe 3 and 4) read 3.5 and 7 GB/s in sequence"),
    "ssd": StorageKind(0.5e9, 5e4, "SATA; Samsung 870 EVO: 0.56 GB/s in sequence, 98,000 reads/s (tomshardware.com)"),
    "hdd": StorageKind(200e6, 120, "assumed: at 7,200 rpm half a turn takes 4.2 ms, a seek among queued ones as long"),
    "nfs": StorageKind(0.5e9, 5e3, "assumed: 10 Gbit/s carry 1.25 GB/s at most"),
}
STORAGE_NAMES = {name: name for name in STORAGE} | {"sata": "ssd", "sata ssd": "ssd", "disk": "hdd", "network": "nfs"}
