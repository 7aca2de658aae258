"""Write files that are complete or not there at all, even after a crash or a power cut."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastssl.common.errors import UserError


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object], keep: Path | None = None) -> None:
    """Write a file under a temporary name and rename it, so that readers see the old file or the new one.

    Args:
        path: the file; its folder is made if it is missing.
        content: text (written as UTF-8), bytes, or a function that writes the file at the path that it is given.
        keep: where to move the old file. Between the two renames `path` is missing and `keep` is the old file.

    Example:
        write_atomically(Path("scores.npy"), lambda part: np.save(part, scores))
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            part.write_bytes(content)
        else:
            content(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_durably(part: Path, final: Path) -> None:
    """Rename a finished file, and return when the new name would survive a power cut."""
    os.replace(part, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space, or choose a path that you can write to."
        ) from error
