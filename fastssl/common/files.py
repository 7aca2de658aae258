"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None], keep: Path | None = None) -> None:
    """Let `write` fill a file beside `path`, then rename it: whoever reads sees the old file or the new.

    keep: a name for the old file. Between the two renames, `path` is missing and `keep` is the old file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
