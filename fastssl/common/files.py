"""Write files that are complete or not there at all, even after a crash or a power cut."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastssl.common.errors import UserError

# What the kernel answers where a file system cannot do what is asked: lock a file, sync a folder.
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
MACHINE_FIXES = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other programs, because too many files are open",
    errno.EAGAIN: "raise the limit on processes and threads (ulimit -u), or end some of them",
    errno.ENOMEM: "free some memory, or raise the limit on the address space (ulimit -v)",
}


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
        sync(part)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_durably(part: Path, final: Path) -> None:
    """Rename a finished file, and return when the new name would survive a power cut."""
    os.replace(part, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Return when the content of a file or folder would survive a power cut, as far as its file system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders, or do not open them.
        if not (error.errno in UNSUPPORTED or (path.is_dir() and error.errno in (errno.EACCES, errno.EBADF))):
            raise


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; the kernel releases the lock when the process ends, however it ends.

    Returns False on a file system without locks (some of Lustre and NFS). Raises BlockingIOError if another process
    holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def machine_fix(error: OSError) -> str | None:
    """Return what helps against an error for which no file is to blame, but a limit of the machine; None for others."""
    return MACHINE_FIXES.get(error.errno or 0)


def write_error(path: Path, error: OSError) -> UserError:
    """Return what to tell the user about `error`, which came while `path` was written: what is at fault, the fix."""
    reason = error.strerror or str(error)
    if fix := machine_fix(error):
        return UserError(f"{path} was not written, because this machine has reached a limit ({reason}): {fix}.")
    if isinstance(error.filename, str | bytes) and not _belongs_to(Path(os.fsdecode(error.filename)), path):
        return UserError(f"{os.fsdecode(error.filename)} cannot be read or written ({reason}), so {path} is missing.")
    if error.errno == errno.EFBIG:
        return UserError(f"{path} cannot be written ({reason}): raise the limit on the size of files (ulimit -f).")
    return UserError(f"{path} cannot be written ({reason}): free some space, or choose a path that you can write to.")


def _belongs_to(file: Path, path: Path) -> bool:
    """Whether writing `path` may touch `file`: itself, what is in it, a folder above it, or its temporary file."""
    file, path = file.absolute(), path.absolute()
    is_temporary = any(part.name.startswith(f".{path.name}.") for part in (file, *file.parents))
    return file == path or path in file.parents or file in path.parents or is_temporary


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UserError that names what is at fault."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error
