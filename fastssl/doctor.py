"""What this machine has and lacks, each lack with the line that mends it: `fastssl doctor`.

Runs where packages are missing or broken, so the top of this file imports the standard library
alone and each check imports what it looks at. Nothing of ours is imported either:
`python -P fastssl/doctor.py` works before anything is installed.
"""

import importlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GB = 2**30
CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    mend: str = ""  # the line that mends it; empty where ok
    required: bool = True  # without it fastssl does not run; otherwise it runs with less


def doctor() -> list[Check]:
    checks = []
    for name, look in LOOKS.items():
        try:
            ok, found, mend = look()
        except Exception as error:  # a broken package may raise anything at import
            first_line = (str(error).strip().splitlines() or [""])[0]
            ok, found, mend = False, f"{type(error).__name__}: {first_line}", install_line(name)
        checks.append(Check(name, ok, found, "" if ok else mend, name not in OPTIONAL))
    return checks


def main() -> int:
    """Prints the checks; 0 where every requirement is met, 2 where one is not."""
    if sys.stdout.isatty() and installed_version("rich"):
        checks = show_table()
    else:
        checks = doctor()
        for check in checks:
            print(f"{status(check):<8} {check.name:<16} {check.found}")
            if check.mend:
                print(f"{'':<25} mend: {check.mend}")
    lacking = [check.name for check in checks if check.required and not check.ok]
    if lacking:
        print(f"Not ready: {', '.join(lacking)}.")
        return 2
    print("Ready.")
    return 0


def show_table() -> list[Check]:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    with console.status("looking at this machine"):
        checks = doctor()
    table = Table("", "requirement", "found", box=None)
    for check in checks:
        style = {"ok": "green", "MISSING": "bold red", "note": "yellow"}[status(check)]
        found = escape(check.found)
        if check.mend:
            found += f"\n[{style}]mend:[/] {escape(check.mend)}"
        table.add_row(f"[{style}]{status(check)}[/]", check.name, found)
    console.print(table)
    return checks


def status(check: Check) -> str:
    if check.ok:
        return "ok"
    return "MISSING" if check.required else "note"


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install_line(package: str) -> str:
    """The line that brings a package that is missing or does not import."""
    if not (CHECKOUT / "Makefile").exists():
        if package == "ffcv":
            return "in a checkout of fastssl: make wheel; then pip install the wheel that it names"
        return f"{sys.executable} -m pip install --force-reinstall {package}"
    environment = CHECKOUT / ".venv"
    if Path(sys.prefix) != environment:
        return "make setup"
    # It was made and has since lost something: make it anew, in the way it was made.
    choice = environment / "fastssl-torch"
    over_system = choice.exists() and choice.read_text().strip() == "system"
    return "make clean setup" + (" TORCH=system" if over_system else "")


# Each check answers: is it as it should be, what was found, the line that mends it.
Answer = tuple[bool, str, str]


def linux() -> Answer:
    found = f"{platform.system()} {platform.machine()}"
    mend = "fastssl runs on Linux x86-64 only: take such a machine, or WSL 2 on Windows"
    return found == "Linux x86_64", found, mend


def python() -> Answer:
    found = f"{platform.python_version()} at {sys.executable}"
    return sys.version_info >= (3, 11), found, "make setup PYTHON=/path/to/python3.12"


def imports(package: str, module: str) -> Callable[[], Answer]:
    """A check that the package imports, and nothing more."""

    def check() -> Answer:
        importlib.import_module(module)
        return True, metadata.version(package), ""

    return check


def torch() -> Answer:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    return True, f"{torch.__version__}, built for {built_for}", ""


def gpu() -> Answer:
    import torch

    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        return (
            True,
            f"{torch.cuda.device_count()} x {first.name}, {first.total_memory / GB:.0f} GB",
            "",
        )
    if shutil.which("nvidia-smi") is None:
        return True, "none: runs on the CPU", ""
    if torch.version.cuda is None:
        return False, "an NVIDIA driver, but this torch has no CUDA", "make setup TORCH=pip"
    return (
        False,
        f"an NVIDIA driver, but torch reaches no GPU through CUDA {torch.version.cuda}",
        "where `nvidia-smi` names an older CUDA: a newer driver, or make setup TORCH=system over a"
        " torch built for that CUDA",
    )


def opencv() -> Answer:
    import cv2

    # Both packages hold the module cv2 and overwrite each other; only one of them needs libGL.
    packages = [name for name in ("opencv-python-headless", "opencv-python") if installed_version(name)]
    found = f"{cv2.__version__} from {' and '.join(packages) or cv2.__file__}"
    return len(packages) < 2, found, install_line("opencv-python-headless")


def ffcv() -> Answer:
    """Decodes and shrinks a small JPEG through FFCV's library: turbojpeg and OpenCV at work."""
    import cv2
    import numpy as np
    from ffcv.libffcv import imdecode, resize_crop

    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(64)), axis=-1)
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].ravel()
    decoded = np.zeros_like(picture)
    imdecode(jpeg, decoded, 32, 32, 32, 32)
    half = np.zeros((16, 16, 3), np.uint8)
    resize_crop(decoded, 0, 32, 0, 32, half)
    error = np.abs(half.astype(int) - picture[::2, ::2]).mean()  # 3 where all is well
    if error > 8:
        return False, f"decodes a JPEG wrongly, off by {error:.0f} of 255", install_line("ffcv")
    return True, f"{metadata.version('ffcv')}, decodes and resizes a JPEG", ""


def numba() -> Answer:
    import numba

    @numba.njit
    def total(count):
        result = 0
        for number in range(count):
            result += number
        return result

    if total(10) != 45:
        return False, f"{numba.__version__} compiles wrongly", install_line("numba")
    return True, f"{numba.__version__}, compiles", ""


def compiler() -> Answer:
    """What torch.compile needs: g++ on a CPU; triton, a C compiler and Python.h on a GPU."""
    there = {
        "g++": shutil.which("g++"),
        "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "triton": installed_version("triton"),
    }
    lacking = [name for name in there if not there[name]]
    found = f"lacks {', '.join(lacking)}" if lacking else ", ".join(there)
    major, minor = sys.version_info[:2]
    line = f"apt-get install g++ python{major}.{minor}-dev"
    if lacking == ["triton"]:
        line = install_line("triton")
    return not lacking, found, f"{line}; or train with train.compile=false"


def cores() -> Answer:
    return True, str(len(os.sched_getaffinity(0))), ""


def memory() -> Answer:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return total > 4, f"{total:.0f} GB", "a smaller train.batch_size, or more memory"


def shared_memory() -> Answer:
    size = shutil.disk_usage("/dev/shm").total / GB
    return size > 0.5, f"{size:.1f} GB", "in Docker: docker run --shm-size=2g"


def disk() -> Answer:
    free = shutil.disk_usage(".").free / GB
    return free > 5, f"{free:.0f} GB free in {os.getcwd()}", "make room: runs and betons grow"


LOOKS: dict[str, Callable[[], Answer]] = {
    "Linux x86-64": linux,
    "Python >= 3.11": python,
    "torch": torch,
    "torchvision": imports("torchvision", "torchvision"),
    "timm": imports("timm", "timm"),
    "numba": numba,
    "opencv": opencv,
    "ffcv": ffcv,
    "torch-optimizer": imports("torch-optimizer", "torch_optimizer"),
    "rich": imports("rich", "rich"),
    "typer": imports("typer", "typer"),
    "pydantic": imports("pydantic", "pydantic"),
    "PyYAML": imports("PyYAML", "yaml"),
    "scikit-learn": imports("scikit-learn", "sklearn"),
    "matplotlib": imports("matplotlib", "matplotlib"),
    "safetensors": imports("safetensors", "safetensors"),
    "GPU": gpu,
    "torch.compile": compiler,
    "CPU cores": cores,
    "memory": memory,
    "/dev/shm": shared_memory,
    "disk": disk,
}
OPTIONAL = ("GPU", "torch.compile", "CPU cores", "memory", "/dev/shm", "disk")

if __name__ == "__main__":
    sys.exit(main())
