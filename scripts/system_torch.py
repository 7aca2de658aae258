"""Prints the constraints for an environment over an installed torch (`make setup TORCH=system`).

torch and torchvision are pinned to what is installed, and what they depend on is left out of our
pins: it came with them and works with them.

    python scripts/system_torch.py constraints.txt .venv
"""

import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(names: list[str]) -> set[str]:
    """The canonical names of the packages and of everything they ask for, as far as installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            asked_for = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an optional dependency, or one for another platform
        waiting += [re.match(r"[A-Za-z0-9._-]+", line).group() for line in asked_for if "extra ==" not in line]
    return found


def main(constraints: str, environment: str) -> None:
    installed = {}
    for name in ("torch", "torchvision"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            sys.exit(
                f"fastssl: TORCH=system, but {sys.executable} has no {name}; install it there,"
                " or leave TORCH=system out and it comes from PyPI."
            )
    # A Python that is itself a virtual environment: --system-site-packages shows only what lies
    # beneath that environment, so its own packages are added by path.
    if sys.prefix != sys.base_prefix:
        site = next(Path(environment).glob("lib/python*/site-packages"))
        (site / "fastssl-system-torch.pth").write_text(sysconfig.get_path("purelib") + "\n")

    theirs = with_dependencies(list(installed))
    for line in Path(constraints).read_text().splitlines():
        name = canonical(line.partition("==")[0])
        if name not in theirs and not name.startswith(("nvidia-", "cuda-")):
            print(line)
    for name, version in installed.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main(*sys.argv[1:])
