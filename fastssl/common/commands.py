"""Commands in messages: a shell takes them as they are printed."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from fastssl.common.distributed import spans_hosts


def command(*arguments: str | Path) -> str:
    """Return `fastssl ARGUMENTS`, as a shell in this folder finds this environment's `fastssl`."""
    return shlex.join([*_program("fastssl"), *map(str, arguments)])


def training_command(*arguments: str | Path) -> str:
    """Return `fastssl train ARGUMENTS`, in as many processes as torchrun has started on this host.

    The options of torchrun on several hosts are not known, and may differ by host: OPTIONS stands for them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        return command("train", *arguments)
    torchrun, train = _program("torchrun"), ["-m", "fastssl", "train", *map(str, arguments)]
    if spans_hosts():
        return shlex.join([*torchrun, "OPTIONS", *train]) + "  # OPTIONS: those of each host, as before"
    return shlex.join([*torchrun, "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), *train])


def _program(name: str) -> list[str]:
    """How to start a program of this Python environment: by its name if the shell finds that one, else by its path."""
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not own.exists():  # not installed, but run from its source
        return [sys.executable, "-m", name]
    return [name] if found and os.path.samefile(found, own) else [str(own)]
