"""`fastssl doctor`: what this machine has and lacks, and the command that fixes each fault.

It must run where packages are missing or broken, so this file imports only the standard library at its top, nothing of
fastssl, and every check imports the package that it tests. `python -P fastssl/doctor.py` works before anything is
installed.
"""

import importlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

GB = 2**30
CHECKOUT = Path(__file__).resolve().parents[1]
COLORS = {"ok": 32, "MISSING": 31, "note": 33}  # ANSI: green, red, yellow


class Answer(NamedTuple):
    """The result of a check."""

    ok: bool
    found: str
    fix: str = ""  # the command or advice that fixes it; shown if not ok


class Check(NamedTuple):
    """A requirement and its answer."""

    name: str
    required: bool  # False: fastssl runs without it, with less
    answer: Answer

    @property
    def status(self) -> str:
        if self.answer.ok:
            return "ok"
        return "MISSING" if self.required else "note"


def run_checks() -> Iterator[Check]:
    for name, check in CHECKS.items():
        try:
            answer = check()
        except Exception as error:  # a broken package may raise anything when it is imported
            first_line = (str(error).strip().splitlines() or [""])[0]
            answer = Answer(False, f"{type(error).__name__}: {first_line}", reinstall_command(name))
        yield Check(name, name not in OPTIONAL, answer)


def main() -> int:
    """Print every check as it ends. Returns the exit code: 0 if all requirements are met, else 2."""
    lacking = []
    for check in run_checks():
        status = f"{check.status:<8}"
        if sys.stdout.isatty():
            status = f"\033[{COLORS[check.status]}m{status}\033[0m"
        print(f"{status} {check.name:<16} {check.answer.found}", flush=True)
        if not check.answer.ok:
            print(f"{'':<25} fix: {check.answer.fix}")
        if check.status == "MISSING":
            lacking.append(check.name)
    print(f"Not ready: {', '.join(lacking)}." if lacking else "Ready.")
    return 2 if lacking else 0


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def reinstall_command(package: str) -> str:
    """The command that installs a package that is missing or broken."""
    if not (CHECKOUT / "Makefile").exists():
        if package == "ffcv":
            return "in a checkout of fastssl: make wheel; then pip install the wheel that it names"
        return f"{sys.executable} -m pip install --force-reinstall {package}"
    environment = CHECKOUT / ".venv"
    if Path(sys.prefix) != environment:
        return "make setup"
    # The environment was complete once, so `make setup` would see nothing to do: make it again, with the same torch.
    choice = environment / "fastssl-torch"
    over_system = choice.exists() and choice.read_text().strip() == "system"
    return "make clean setup" + (" TORCH=system" if over_system else "")


def check_platform() -> Answer:
    found = f"{platform.system()} {platform.machine()}"
    fix = "fastssl runs on Linux x86-64 only: use such a machine, or WSL 2 on Windows"
    return Answer(found == "Linux x86_64", found, fix)


def check_python() -> Answer:
    found = f"{platform.python_version()} at {sys.executable}"
    return Answer(sys.version_info >= (3, 11), found, "make setup PYTHON=/path/to/python3.12")


def imports(package: str, module: str) -> Callable[[], Answer]:
    """Return a check that only imports the module."""

    def check() -> Answer:
        importlib.import_module(module)
        return Answer(True, metadata.version(package))

    return check


def check_torch() -> Answer:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return Answer(True, f"{torch.__version__}, built for {built_for}")


def check_gpu() -> Answer:
    import torch

    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        return Answer(True, f"{torch.cuda.device_count()} x {first.name}, {first.total_memory / GB:.0f} GB")
    if shutil.which("nvidia-smi") is None:
        return Answer(True, "none: runs on the CPU")
    if torch.version.cuda is None:
        return Answer(False, "an NVIDIA driver, but this torch has no CUDA", "make setup TORCH=pip")
    found = f"an NVIDIA driver, but torch reaches no GPU through CUDA {torch.version.cuda}"
    fix = "if `nvidia-smi` names an older CUDA: a newer driver, or make setup TORCH=system with a torch for that CUDA"
    return Answer(False, found, fix)


def check_opencv() -> Answer:
    import cv2

    # Both packages hold the module cv2 and overwrite each other; only the second one needs libGL.
    packages = [name for name in ("opencv-python-headless", "opencv-python") if installed_version(name)]
    found = f"{cv2.__version__} from {' and '.join(packages) or cv2.__file__}"
    return Answer(len(packages) < 2, found, reinstall_command("opencv-python-headless"))


def check_ffcv() -> Answer:
    """Decode and shrink a small JPEG with FFCV's library, which calls turbojpeg and OpenCV."""
    import cv2
    import numpy as np
    from ffcv.libffcv import imdecode, resize_crop

    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(64)), axis=-1)
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].ravel()
    decoded = np.zeros_like(image)
    imdecode(jpeg, decoded, 32, 32, 32, 32)
    half = np.zeros((16, 16, 3), np.uint8)
    resize_crop(decoded, 0, 32, 0, 32, half)
    error = np.abs(half.astype(int) - image[::2, ::2]).mean()  # 3 with a correct library
    if error > 8:
        return Answer(False, f"decodes a JPEG wrongly, off by {error:.0f} of 255", reinstall_command("ffcv"))
    return Answer(True, f"{metadata.version('ffcv')}, decodes and resizes a JPEG")


def check_numba() -> Answer:
    import numba

    @numba.njit
    def total(count: int) -> int:
        result = 0
        for number in range(count):
            result += number
        return result

    if total(10) != 45:
        return Answer(False, f"{numba.__version__} compiles wrongly", reinstall_command("numba"))
    return Answer(True, f"{numba.__version__}, compiles")


def check_compiler() -> Answer:
    """Check the requirements of torch.compile: g++ on a CPU; triton, a C compiler and Python.h on a GPU."""
    available = {
        "g++": shutil.which("g++"),
        "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "triton": installed_version("triton"),
    }
    lacking = [name for name in available if not available[name]]
    found = f"lacks {', '.join(lacking)}" if lacking else ", ".join(available)
    major, minor = sys.version_info[:2]
    command = f"apt-get install g++ python{major}.{minor}-dev"
    if lacking == ["triton"]:
        command = reinstall_command("triton")
    return Answer(not lacking, found, f"{command}; or train with train.compile=false")


def check_cpu() -> Answer:
    """Report the cores, and the precision of training on this CPU (as common/system.py finds it out)."""
    flags = Path("/proc/cpuinfo").read_text().split()
    precision = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32 (no bf16)"
    return Answer(True, f"{len(os.sched_getaffinity(0))}, which train in {precision}")


def check_memory() -> Answer:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return Answer(total > 4, f"{total:.0f} GB", "a smaller train.batch_size, or more memory")


def check_shared_memory() -> Answer:
    size = shutil.disk_usage("/dev/shm").total / GB
    return Answer(size > 0.5, f"{size:.1f} GB", "in Docker: docker run --shm-size=2g")


def check_disk() -> Answer:
    free = shutil.disk_usage(".").free / GB
    return Answer(free > 5, f"{free:.0f} GB free in {os.getcwd()}", "free some space: runs and .beton files grow")


CHECKS: dict[str, Callable[[], Answer]] = {
    "Linux x86-64": check_platform,
    "Python >= 3.11": check_python,
    "torch": check_torch,
    "torchvision": imports("torchvision", "torchvision"),
    "timm": imports("timm", "timm"),
    "numba": check_numba,
    "opencv": check_opencv,
    "ffcv": check_ffcv,
    "torch-optimizer": imports("torch-optimizer", "torch_optimizer"),
    **{name: imports(name, name) for name in ("rich", "typer", "pydantic")},
    "PyYAML": imports("PyYAML", "yaml"),
    "scipy": imports("scipy", "scipy"),
    "scikit-learn": imports("scikit-learn", "sklearn"),
    **{name: imports(name, name) for name in ("matplotlib", "safetensors", "huggingface_hub")},
    "GPU": check_gpu,
    "torch.compile": check_compiler,
    "CPU cores": check_cpu,
    "memory": check_memory,
    "/dev/shm": check_shared_memory,
    "disk": check_disk,
}
OPTIONAL = ("GPU", "torch.compile", "CPU cores", "memory", "/dev/shm", "disk")

if __name__ == "__main__":
    sys.exit(main())
